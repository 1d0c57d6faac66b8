# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a block, each from the step that unmasked its position."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS

if TYPE_CHECKING:
    from vllm_unmask.engine.rows import DenoisingRows


class BlockLogprobs:
    """Keeps what a block's positions were unmasked with until it is reported.

    Args:
        logits_mode: report logits instead (vLLM's ``raw_logits`` mode).
    """

    def __init__(self, logits_mode: bool) -> None:
        self.logits_mode = logits_mode
        # Request slot -> its active block so far.
        self.kept: dict[int, LogprobsTensors] = {}

    def forget(self, slot: int) -> None:
        """Drop what a slot's previous request left."""
        self.kept.pop(slot, None)

    def slide(self, slots_np: np.ndarray[Any, Any], num_tokens: torch.Tensor) -> None:
        """Follow windows that move behind what they have reported.

        Args:
            slots_np: int64 [requests] -> request slot.
            num_tokens: int64 [requests], positions that the window moves.
        """
        for row, slot in enumerate(slots_np.tolist()):
            if (kept := self.kept.get(slot)) is not None:
                column = torch.arange(len(kept.logprobs), device=num_tokens.device)
                moved = (column + num_tokens[row]) % len(column)
                fields = (field[moved] for field in kept[:3])
                self.kept[slot] = LogprobsTensors(*fields)

    def collect(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        accepted: torch.Tensor,
        num_fixed: torch.Tensor,
        rows: "DenoisingRows",
        num_logprobs: np.ndarray[Any, Any],
        opened: torch.Tensor | None,
    ) -> dict[int, LogprobsTensors]:
        """Note this step's positions; return every wanting request's block.

        Every wanting request returns its whole block every step, its first output
        token first; vLLM reads the rows of the tokens that were committed, so
        nothing here waits for the device.

        Args:
            logits: [requests * block, vocab], the model's own.
            tokens: int64 [requests, block], candidates.
            accepted: bool [requests, block], positions unmasked in this step.
            num_fixed: int64 [requests], leading prompt positions of the block.
            rows: which requests of the batch these are.
            num_logprobs: int32 [requests], vLLM's count or NO_LOGPROBS.
            opened: bool [requests], blocks that are noted but not returned: the
                request has reported another one.

        Returns:
            Batch row -> its block.
        """
        if (num_logprobs == NO_LOGPROBS).all():
            return {}
        length = tokens.shape[1]
        column = torch.arange(length, device=tokens.device)
        blocks: dict[int, LogprobsTensors] = {}
        for row, count in enumerate(num_logprobs.tolist()):
            if count == NO_LOGPROBS:
                continue
            slot = int(rows.slots_np[row])
            now = compute_topk_scores(
                logits[row * length : (row + 1) * length],
                count,
                tokens[row],
                logits_mode=self.logits_mode,
            )
            block = _overwrite(self.kept.get(slot, now), now, accepted[row])
            self.kept[slot] = block
            if opened is not None and opened[row]:
                continue
            shift = (column + num_fixed[row]).clamp(max=length - 1)
            blocks[int(rows.batch_index[row])] = LogprobsTensors(
                *(field[shift] for field in block[:3])
            )
        return blocks


def _overwrite(
    kept: LogprobsTensors, now: LogprobsTensors, fresh: torch.Tensor
) -> LogprobsTensors:
    """``kept``, with the rows in ``fresh`` taken from ``now``."""
    wide = fresh.unsqueeze(1)
    return LogprobsTensors(
        torch.where(wide, now.logprob_token_ids, kept.logprob_token_ids),
        torch.where(wide, now.logprobs, kept.logprobs),
        torch.where(fresh, now.selected_token_ranks, kept.selected_token_ranks),
    )


def concatenate(
    blocks: dict[int, LogprobsTensors], num_reqs: int
) -> LogprobsTensors | None:
    """Join blocks by batch index, padded to the widest request.

    Padding is token 0 at -inf, which vLLM's output processor never reports.

    Args:
        blocks: batch row -> block.
        num_reqs: requests of the whole batch; vLLM looks up those that prefill, too.
    """
    if not blocks:
        return None
    width = max(block.logprob_token_ids.shape[1] for block in blocks.values())

    def pad(tensor: torch.Tensor, value: float) -> torch.Tensor:
        missing = width - tensor.shape[1]
        return torch.nn.functional.pad(tensor, (0, missing), value=value)

    starts = []
    start = 0
    for index in range(num_reqs):
        starts.append(start)
        if index in blocks:
            start += blocks[index].selected_token_ranks.shape[0]
    parts = [blocks[index] for index in sorted(blocks)]
    return LogprobsTensors(
        torch.cat([pad(part.logprob_token_ids, 0) for part in parts]),
        torch.cat([pad(part.logprobs, -torch.inf) for part in parts]),
        torch.cat([part.selected_token_ranks for part in parts]),
        cu_num_generated_tokens=starts,
    )
