# SPDX-License-Identifier: Apache-2.0
"""Candidates and their scores, with the sampling parameters of the request slots."""

from typing import Any

import numpy as np
import torch

from vllm_unmask.decoding.composition import Evidence
from vllm_unmask.decoding.reading import score
from vllm_unmask.decoding.scoring import ORDERS, SamplingRows, Scores
from vllm_unmask.decoding.statistics import greedy_scores
from vllm_unmask.engine.states import CanvasStates
from vllm_unmask.kernels.row_statistics import NO_CONSTRAINTS, Constraints

# Draws for the next block are others than those that it takes once it is open.
AHEAD_STEPS = 1 << 32


class Candidates:
    """Scores blocks.

    Args:
        sampling: vLLM's per-slot sampling parameters.
        states: canvases and the options that scoring reads.
    """

    def __init__(self, sampling: Any, states: CanvasStates) -> None:
        self.sampling = sampling
        self.states = states

    def score(
        self,
        logits: torch.Tensor,
        start: torch.Tensor,
        slots_np: np.ndarray[Any, Any],
        request_slots: torch.Tensor,
        first_step: int = 0,
        known: Evidence | None = None,
        constraints: Constraints = NO_CONSTRAINTS,
        read: torch.Tensor | None = None,
    ) -> Scores:
        """Candidates of one block of each request, each tensor [requests, block].

        Args:
            logits: [requests * block, vocab], banned tokens at -inf; of those the rows
                in ``read``.
            start: int64 [requests], absolute position of the blocks.
            slots_np: int64 [requests] -> request slot.
            request_slots: the same on the device.
            first_step: added to the step that random draws depend on.
            known: what has been read of all these rows already.
            constraints: what is banned beside the logits, where a kernel reads them.
            read: as `DenoisingRows.read`; other positions get token and score 0.
        """
        length = self.states.geometry.block_length
        params = self.sampling
        temperature = params.temperature.np[slots_np]
        sampled = bool(temperature.any())
        truncated = sampled and bool(
            (
                (temperature > 0)
                & (
                    (params.top_k.np[slots_np] < params.vocab_size)
                    | (params.top_p.np[slots_np] < 1)
                    | (params.min_p.np[slots_np] > 0)
                )
            ).any()
        )
        orders_used = self.states.orders_used(slots_np)
        best = None if known is None else known.statistics
        orders_known = frozenset() if known is None else known.orders
        if best is not None and not sampled and orders_used <= orders_known:
            order = self.states.order.gpu[request_slots].unsqueeze(1)
            return self._never_mask(greedy_scores(best, order))
        plain = orders_used == {ORDERS.index("confidence")}
        sampling_rows = None
        slots = None
        if sampled or not plain:
            slots = request_slots.repeat_interleave(length)
            column = torch.arange(length, device=start.device)
            positions = (start.unsqueeze(1) + column).view(-1)
            if read is not None:
                slots, positions = slots[read], positions[read]
            sampling_rows = SamplingRows(
                params.temperature.gpu[slots],
                params.top_k.gpu[slots].to(torch.int64),
                params.top_p.gpu[slots],
                params.min_p.gpu[slots],
                params.seeds.gpu[slots],
                positions.to(torch.int64),
                self.states.canvas.step[slots] + first_step,
            )
        flat = score(
            logits,
            sampling_rows,
            sampled=sampled,
            raw_confidence=None
            if slots is None
            else self.states.raw_confidence.gpu[slots],
            orders=None if slots is None else self.states.order.gpu[slots],
            orders_used=orders_used,
            truncated=truncated,
            raw_used=bool(self.states.raw_confidence.np[slots_np].any()),
            constraints=constraints,
        )
        if read is not None:
            size = len(request_slots) * length
            tokens, confidence = (
                x.new_zeros(size).index_copy_(0, read, x) for x in flat[:2]
            )
            order = confidence  # of plain requests one tensor
            if flat.order is not flat.confidence:
                order = flat.order.new_zeros(size).index_copy_(0, read, flat.order)
            flat = Scores(tokens, confidence, order)
        return self._never_mask(Scores(*(x.view(-1, length) for x in flat)))

    def _never_mask(self, scores: Scores) -> Scores:
        # A row in which everything is banned falls back to token 0, and in no other is
        # the mask a candidate. If it is that, any other token will do: a revealed mask
        # would never go away.
        mask_id = self.states.geometry.mask_token_id
        if mask_id > 0:
            return scores
        other = (mask_id + 1) % self.sampling.vocab_size
        tokens = torch.where(scores.tokens == mask_id, other, scores.tokens)
        return scores._replace(tokens=tokens)
