# SPDX-License-Identifier: Apache-2.0
"""What blocks start with besides masks: seeds, and tokens unmasked ahead of time."""

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_unmask.decoding.canvas import Canvas
from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.engine.states import BlockGeometry
from vllm_unmask.seeds import Seeds

if TYPE_CHECKING:
    from vllm_unmask.engine.rows import DenoisingRows


class Openings:
    """Seeds of every request slot, and the ids that open blocks started with.

    The latter are kept for requests that look ahead: what they had unmasked when they
    are preempted is what they go on from.

    Args:
        max_num_reqs: request slots.
        geometry: the model's blocks.
        device: of the canvases.
    """

    def __init__(
        self, max_num_reqs: int, geometry: BlockGeometry, device: torch.device
    ) -> None:
        self.max_num_reqs = max_num_reqs
        self.geometry = geometry
        self.device = device
        # Slot -> ids int64 [n], pinned bool [n], from the first output token on, and
        # the number of prompt tokens before it.
        self.seeds: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        # int64 [slots, block], made with the first request that looks ahead.
        self.opened: torch.Tensor | None = None
        self.slots: dict[str, int] = {}  # request id -> slot, of those that look ahead
        self.left: OrderedDict[str, torch.Tensor] = OrderedDict()

    def add_request(
        self,
        slot: int,
        req_id: str,
        seeds: Seeds | None,
        ahead: bool,
        num_prompt: int,
        num_tokens: int,
        canvas: Canvas,
    ) -> None:
        """Take over a slot and write the beginning of its canvas.

        Args:
            slot: the request slot.
            req_id: vLLM's name of the request.
            seeds: the request's.
            ahead: whether it looks ahead.
            num_prompt: tokens of its prompt.
            num_tokens: known tokens, output from before a preemption included.
            canvas: of all slots, with the slot's known tokens in place.
        """
        self.seeds.pop(slot, None)
        if seeds is not None:
            self.seeds[slot] = (
                async_tensor_h2d(seeds.ids, device=self.device, dtype=torch.int64),
                async_tensor_h2d(seeds.pinned, device=self.device, dtype=torch.bool),
                num_prompt,
            )
        if seeds is None and not ahead:
            return
        length, mask_id = self.geometry
        num_fixed = int(canvas.num_fixed[slot])
        start = num_tokens - num_fixed
        starts = torch.tensor([start, start + length], device=self.device)
        seeded, _ = self.seeded(np.array([slot, slot]), starts)
        ids = seeded.view(-1)
        if ahead:
            self.slots[req_id] = slot
            if (left := self.left.pop(req_id, None)) is not None:
                ids[:length] = left
        ids[:num_fixed] = canvas.ids[slot, :num_fixed]
        canvas.ids[slot] = ids
        canvas.num_masks[slot] = (ids[num_fixed:length] == mask_id).sum()
        if ahead:
            if self.opened is None:
                self.opened = torch.zeros_like(canvas.ids[:, :length])
            self.opened[slot] = ids[:length]

    def remove_request(self, req_id: str) -> None:
        """Forget a finished request; keep what a preempted one had unmasked ahead."""
        slot = self.slots.pop(req_id, None)
        if slot is None or self.opened is None:
            return
        # Which of the two it is nobody says, so the oldest go.
        self.left[req_id] = self.opened[slot].clone()
        while len(self.left) > self.max_num_reqs:
            self.left.popitem(last=False)

    def keep(
        self, slots: torch.Tensor, ids: torch.Tensor, pending: torch.Tensor
    ) -> None:
        """Note the beginnings of blocks that a step has opened.

        Args:
            slots: int64 [requests] -> request slot.
            ids: int64 [requests, block], their next blocks.
            pending: bool [slots], whether the next block is open now.
        """
        if self.opened is not None:
            opened = pending[slots].unsqueeze(1)
            self.opened[slots] = torch.where(opened, ids, self.opened[slots])

    def seeded(
        self, slots_np: np.ndarray[Any, Any], start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What blocks start with.

        Args:
            slots_np: int64 [requests] -> request slot.
            start: int64 [requests], absolute position of each block.

        Returns:
            Ids int64 [requests, block], the mask where there is no seed; and which of
            them are pinned, bool.
        """
        length, mask_id = self.geometry
        column = torch.arange(length, device=self.device)
        ids = torch.full((len(slots_np), length), mask_id, device=self.device)
        pinned = torch.zeros_like(ids, dtype=torch.bool)
        for row, slot in enumerate(slots_np.tolist()):
            if slot not in self.seeds:
                continue
            seeds, pins, num_prompt = self.seeds[slot]
            place = start[row] + column - num_prompt
            inside = (place >= 0) & (place < len(seeds))
            place = place.clamp(0, len(seeds) - 1)
            ids[row] = torch.where(inside, seeds[place], mask_id)
            pinned[row] = inside & pins[place]
        return ids, pinned


class NextBlocks:
    """What the blocks after the open ones start with: seeds, and tokens unmasked ahead.

    Args:
        openings: of all slots.
        canvas: of all slots, before the step is closed.
        rows: the requests that denoise.
        chosen: int64 [n] -> row of ``rows``, those with more than masks to come.
        start: int64 [requests], absolute position of the open blocks.
    """

    def __init__(
        self,
        openings: Openings,
        canvas: Canvas,
        rows: "DenoisingRows",
        chosen: np.ndarray[Any, Any],
        start: torch.Tensor,
    ) -> None:
        length, self.mask_id = openings.geometry
        self.openings = openings
        self.canvas = canvas
        self.slots_np = rows.slots_np[chosen]
        index = torch.from_numpy(chosen).to(start.device)
        self.slots = rows.slots[index]
        self.ids, _ = openings.seeded(self.slots_np, start[index] + length)
        self.opening = canvas.pending[self.slots].unsqueeze(1)
        # A block's first step has no row for the next one, except behind a prompt,
        # where it depends on the other requests: so never.
        self.first = (canvas.step[self.slots] == 0).unsqueeze(1)
        self.length = length
        # Slots that look ahead, what they unmasked, bool [m, block], and its scores.
        self.ahead: tuple[np.ndarray[Any, Any], torch.Tensor, Scores] | None = None

    def unmask(
        self,
        chosen: np.ndarray[Any, Any],
        width: torch.Tensor,
        scores: Scores,
        threshold: torch.Tensor,
    ) -> None:
        """Unmask what is sure in the next blocks.

        Args:
            chosen: int64 [m] -> row of these blocks, those that look ahead.
            width: int64 [m], positions that were forwarded.
            scores: each tensor [m, block].
            threshold: float32 [m].
        """
        index = torch.from_numpy(chosen).to(width.device)
        before = self.canvas.ids[self.slots[index], self.length :]
        column = torch.arange(self.length, device=width.device)
        accepted = (before == self.mask_id) & (column < width.unsqueeze(1))
        accepted &= scores.confidence > threshold.unsqueeze(1)
        accepted &= ~self.first[index]
        after = torch.where(accepted, scores.tokens, before)
        # Right after a commit the canvas holds nothing of the next block yet.
        after = torch.where(self.opening[index], self.ids[index], after)
        self.ids = self.ids.index_copy(0, index, after)
        self.ahead = (self.slots_np[chosen], accepted, scores)

    def unmasked(self, slot: int) -> list[tuple[int, int, float]]:
        """Column, token and confidence of what a request unmasked ahead."""
        if self.ahead is None:
            return []
        slots_np, accepted, scores = self.ahead
        row = int(np.flatnonzero(slots_np == slot)[0]) if slot in slots_np else -1
        if row < 0:
            return []
        columns = accepted[row].nonzero()[:, 0].tolist()
        tokens, sure = scores.tokens[row].tolist(), scores.confidence[row].tolist()
        return [(column, tokens[column], sure[column]) for column in columns]

    def write(self) -> None:
        """Put them behind the open blocks, once the step is closed."""
        self.canvas.ids[self.slots, self.length :] = self.ids
        self.openings.keep(self.slots, self.ids, self.canvas.pending)
        masks = (self.ids == self.mask_id).sum(dim=1)
        opened = self.canvas.pending[self.slots]
        kept = self.canvas.num_masks[self.slots]
        self.canvas.num_masks[self.slots] = torch.where(opened, masks, kept)
