# SPDX-License-Identifier: Apache-2.0
"""Token sequences that must not appear in the outputs of their requests."""

from typing import TYPE_CHECKING, Any

import torch

from vllm_unmask.decoding.bad_words import banned_tokens, conflicts
from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.engine.states import CanvasStates

if TYPE_CHECKING:
    from vllm_unmask.engine.rows import DenoisingRows


class BadWords:
    """Bad words of every request slot that has some.

    Args:
        states: canvases of the slots.
        req_states: vLLM's per-slot tokens.
    """

    def __init__(self, states: CanvasStates, req_states: Any) -> None:
        self.states = states
        self.req_states = req_states
        self.words: dict[int, list[list[int]]] = {}

    def add_request(self, slot: int, words: list[list[int]] | None) -> None:
        self.words.pop(slot, None)
        if words:
            self.words[slot] = words

    def concern(self, rows: "DenoisingRows") -> bool:
        """Whether any of the requests has bad words."""
        return not self.words.keys().isdisjoint(rows.slots_np.tolist())

    def _output_before(self, slot: int) -> list[int]:
        """Output tokens already reported for a slot."""
        start = int(self.req_states.prompt_len.np[slot])
        end = int(self.req_states.total_len.gpu[slot])
        return self.req_states.all_token_ids.gpu[slot, start:end].tolist()

    def ban(
        self, logits: torch.Tensor, active: torch.Tensor, rows: "DenoisingRows"
    ) -> None:
        """Ban, in place, each token that would complete a bad word by itself.

        Args:
            logits: float32 [requests * block, vocab].
            active: int64 [requests, block].
            rows: the requests that denoise.
        """
        length, mask_id = self.states.geometry
        fixed = self.states.canvas.num_fixed
        for row, slot in enumerate(rows.slots_np.tolist()):
            if words := self.words.get(slot):
                start = int(fixed[slot])
                context = self._output_before(slot)
                block = active[row, start : int(rows.width[row])].tolist()
                for column, token in banned_tokens(context, block, words, mask_id):
                    logits[row * length + start + column, token] = -torch.inf

    def withdraw(
        self,
        accepted: torch.Tensor,
        scores: Scores,
        active: torch.Tensor,
        rows: "DenoisingRows",
    ) -> torch.Tensor:
        """Take back the least sure position of every bad word formed jointly.

        One position alone cannot form a bad word (``ban``), so at least one accepted
        position is left.
        """
        mask_id = self.states.geometry.mask_token_id
        accepted = accepted.clone()
        for row, slot in enumerate(rows.slots_np.tolist()):
            if not (words := self.words.get(slot)):
                continue
            start = int(self.states.canvas.num_fixed[slot])
            context = self._output_before(slot)
            block = torch.where(accepted[row], scores.tokens[row], active[row])
            for column in conflicts(
                context,
                block[start : int(rows.width[row])].tolist(),
                accepted[row, start:].tolist(),
                scores.confidence[row, start:].tolist(),
                words,
                mask_id,
            ):
                accepted[row, start + column] = False
        return accepted
