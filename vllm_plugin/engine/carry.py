# SPDX-License-Identifier: Apache-2.0
"""Shifted logits: families in which row ``i - 1`` scores token ``i``.

The first position of a block is scored by the last row of the block before it. That
row's block is final by then, and in most steps it is not forwarded any more. So its
hidden state is carried per request slot, from the forward that made it final, and takes
its place among the rows that the head reads: one row of the hidden size a request, as
Diffulex keeps a row of logits. The published decoders take the position's token from
that forward instead, greedily (Fast-dLLM v2) or whatever its confidence (Fast-dLLM).
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

if TYPE_CHECKING:
    from vllm_unmask.engine.windows import Speculating


class _Exchange(NamedTuple):
    """What becomes of the hidden states that the head is about to read."""

    slots: torch.Tensor  # int64 [requests] -> request slot
    carried: torch.Tensor  # bool [requests], the first one's row is not among them
    # int64 [n], two of them: rows of windows, and the rows that they are copies of.
    windows: tuple[torch.Tensor, torch.Tensor] | None
    # int64 [prefills] -> request slot, the last rows are theirs; None without any.
    prefills: torch.Tensor | None


class Carry:
    """The hidden state before the open block of every request slot.

    Args:
        max_num_reqs: request slots.
        block_length: positions of a block.
        hidden_size: entries of a hidden state.
        dtype: of the model.
        device: of the model.
    """

    def __init__(
        self,
        max_num_reqs: int,
        block_length: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.length = block_length
        self.hidden = torch.zeros(
            (max_num_reqs, hidden_size), dtype=dtype, device=device
        )
        self.nobody = torch.zeros(0, dtype=torch.int64, device=device)
        self.prefills: torch.Tensor | None = None
        self.exchanging: _Exchange | None = None

    def read_prefills(self, batch: InputBatch) -> list[torch.Tensor]:
        """The rows that prompts are carried on from, int64 [prefills], if any are.

        Of each query without a canvas the last row that ends a block; the last chunk of
        a prompt wins. The sampler sees no logits of them.

        Args:
            batch: vLLM's.
        """
        device, self.exchanging, self.prefills = self.hidden.device, None, None
        num_drafts = batch.num_draft_tokens_per_req
        if num_drafts is None or num_drafts.all():
            # A dummy batch, or one without a prompt.
            return []
        num_final = batch.num_scheduled_tokens[: batch.num_reqs]
        num_final = num_final // self.length * self.length
        prefills = np.flatnonzero((num_drafts == 0) & (num_final > 0))
        if not len(prefills):
            return []
        self.prefills = async_tensor_h2d(
            batch.idx_mapping_np[prefills], device=device, dtype=torch.int64
        )
        rows = batch.query_start_loc_np[prefills] + num_final[prefills] - 1
        nobody = self.nobody
        self.exchanging = _Exchange(nobody, nobody.bool(), None, self.prefills)
        return [async_tensor_h2d(rows, device=device, dtype=torch.int64)]

    def read_canvases(
        self,
        slots: torch.Tensor,
        first: torch.Tensor,
        row: torch.Tensor,
        num_fixed: torch.Tensor,
        parts: list[torch.Tensor],
        speculating: "Speculating | None",
    ) -> list[torch.Tensor]:
        """Shift the logits rows of the requests that denoise; `read_prefills` is first.

        Args:
            slots: int64 [requests] -> request slot.
            first: int64 [requests], rows of each query before the open block.
            row: int64 [requests], the open block's first row.
            num_fixed: int64 [requests], leading prompt ids of the open block.
            parts: int64 [rows] each: the open blocks, the next ones of requests that
                look ahead, windows. A row scores itself.
            speculating: the windows' requests.

        Returns:
            The same, each row the one before it.
        """
        open_rows, *others = parts
        blocks = open_rows.view(-1, self.length) - 1
        # A position of the prompt is not scored. Its own row stands in, as for
        # position 0 in the published code: there need not be another one.
        scored = num_fixed == 0
        inside = scored & (first > 0)
        blocks[:, 0] = torch.where(inside, row - 1, row)
        shifted = [blocks.view(-1), *(part - 1 for part in others)]
        windows = None
        if speculating is not None:
            begin = sum(map(len, shifted[:-1]))
            shifted[-1], windows = self._windows(shifted[-1], begin, speculating)
        self.exchanging = _Exchange(slots, scored & ~inside, windows, self.prefills)
        return shifted

    def _windows(
        self, rows: torch.Tensor, begin: int, speculating: "Speculating"
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The first rows of windows: of a candidate the row that its open block has.

        The next block, in a window, follows a complete candidate or the open block. A
        window that holds a whole canvas has its own.

        Args:
            rows: int64 [requests * windows * block], shifted.
            begin: logits rows before them.
            speculating: the requests.
        """
        windows, width, device = speculating.windows, speculating.width, rows.device
        opening, leader = windows.candidates.opening, windows.candidates.leader
        place = torch.arange(width, device=device)
        opens = place == opening.unsqueeze(1)
        before = windows.first_row + (leader + 1) * self.length - 1
        blocks = rows.view(len(opening), width, self.length)
        own = led = opens
        if speculating.whole is not None:
            whole = speculating.whole.unsqueeze(1)
            own, led = opens | whole, opens & ~whole
        blocks[:, :, 0] = torch.where(led, before.unsqueeze(1), blocks[:, :, 0])
        target = begin + torch.arange(opens.numel(), device=device) * self.length
        of = async_tensor_h2d(speculating.rows * self.length, device=device)
        # Its own row is a copy of itself: no shape depends on the device.
        source = torch.where(own, target.view(opens.shape), of.unsqueeze(1))
        return blocks.view(-1), (target, source.view(-1))

    def exchange(self, hidden: torch.Tensor) -> torch.Tensor:
        """Put carried hidden states among those of a forward; carry what is final.

        Args:
            hidden: [rows, hidden size], of the rows above, changed in place. Others,
                as of a dummy run, are returned as they are.

        Returns:
            Those that have logits.
        """
        plan, self.exchanging = self.exchanging, None
        if plan is None:
            return hidden
        if plan.prefills is not None:
            num_logits = len(hidden) - len(plan.prefills)
            self.hidden[plan.prefills] = hidden[num_logits:]
            hidden = hidden[:num_logits]
        blocks = hidden[: len(plan.slots) * self.length : self.length]
        carried = self.hidden[plan.slots]
        blocks.copy_(torch.where(plan.carried.unsqueeze(1), carried, blocks))
        self.hidden[plan.slots] = blocks
        if plan.windows is not None:
            target, source = plan.windows
            hidden[target] = hidden[source]
        return hidden
