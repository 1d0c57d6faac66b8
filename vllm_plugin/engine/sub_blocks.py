# SPDX-License-Identifier: Apache-2.0
"""The hierarchical cache of Fast-dLLM v2: forwards of a part of the open block.

A request with ``cache=sub_block`` forwards its whole block when it visits a sub-block
for the first time, and then the sub-block alone (`decoding.regions.forwarded_part`).
The keys and values of the rest are in the request's pages, as the last forward of the
whole block left them: the sub-block's rows see them by a longer sequence length. The
forward that commits a block has all of it, so what is kept in the end is exact.

What a step needs follows from what the step before has unmasked, and the scheduler
plans queries: so the worker tells it, in the place where vLLM reports draft tokens
(`engine.reporting_scheduler` asks for them).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState

from vllm_unmask.decoding.canvas import active_ids
from vllm_unmask.decoding.regions import first_alone, forwarded_part, open_sub_block
from vllm_unmask.engine.rows import DenoisingRows
from vllm_unmask.engine.states import CanvasStates
from vllm_unmask.engine.strategies import sub_block_length
from vllm_unmask.options import DecodingOptions

Array = np.ndarray[Any, Any]


class PartialQueries(NamedTuple):
    """Queries that have a part of their open block; int64 [queries] each."""

    request: Array  # -> row of the batch
    start: Array  # absolute position of the open block
    before: Array  # rows of the query before the open block
    first: Array  # column of the block that the query begins with, 0 for one before it
    end: Array  # column behind the last
    width: Array  # positions of the block

    @property
    def beyond(self) -> Array:
        """Positions behind the query whose keys and values it sees.

        A block that has not been forwarded yet has none.
        """
        return np.where(self.before > 0, 0, self.width - self.end)


class SubBlocks:
    """The requests that keep keys and values of sub-blocks.

    Args:
        states: canvases of all slots.
        max_model_len: of the model.
        shifted: whether row ``i - 1`` scores position ``i``.
        first_alone: whether a block's first position is unmasked before the others.
    """

    def __init__(
        self, states: CanvasStates, max_model_len: int, shifted: bool, first_alone: bool
    ) -> None:
        self.states = states
        self.max_model_len = max_model_len
        self.shifted = shifted
        self.first_alone = first_alone
        # Slot -> positions of a sub-block, 0 where every step forwards whole blocks.
        self.length = np.zeros(len(states.canvas.ids), np.int64)
        self.used = False  # whether any request has ever had sub-blocks
        # Of the requests of this step that keep them: row of those that denoise, and
        # the sub-block that they visit, int64 [requests, 1].
        self.members: Array = np.zeros(0, np.int64)
        self.visited: torch.Tensor | None = None
        self.plans: torch.Tensor | None = None  # vLLM's draft tokens of all slots

    def add_request(self, slot: int, options: DecodingOptions) -> None:
        """Take over a slot."""
        length = self.states.geometry.block_length
        keeps = options.value("cache") == "sub_block"
        self.length[slot] = sub_block_length(options, length) if keeps else 0
        self.used |= keeps

    def locate(self, batch: InputBatch) -> PartialQueries | None:
        """Which queries of a batch have a part of a block; None for none."""
        # A dummy batch has no drafts.
        if not self.used or batch.num_draft_tokens_per_req is None:
            return None
        keeps = self.length[batch.idx_mapping_np] > 0
        index = np.flatnonzero(keeps & (batch.num_draft_tokens_per_req > 0))
        if not len(index):
            return None
        length = self.states.geometry.block_length
        begin = batch.num_computed_tokens_np[index].astype(np.int64)
        end = begin + batch.num_scheduled_tokens[index]
        start = (end - 1) // length * length
        width = np.minimum(self.max_model_len - start, length)
        first = np.maximum(begin - start, 0)
        found = PartialQueries(
            index, start, np.maximum(start - begin, 0), first, end - start, width
        )
        inside = np.flatnonzero((found.end - first) < width)
        if not len(inside):
            return None
        return PartialQueries(*(field[inside] for field in found))

    def beyond(self, batch: InputBatch) -> Array | None:
        """Positions behind each query that it sees, int64 [requests]; None for none."""
        parts = self.locate(batch)
        if parts is None:
            return None
        beyond = np.zeros(batch.num_reqs, np.int64)
        beyond[parts.request] = parts.beyond
        return beyond

    def place(
        self, batch: InputBatch, req_states: RequestState, rows: DenoisingRows
    ) -> DenoisingRows:
        """Put parts of blocks where their rows are, and note who visits what.

        Args:
            batch: vLLM's. Ids and logits rows are written, a logits row scoring itself;
                where a position has no row, another one of the query stands in.
            req_states: vLLM's.
            rows: the requests that denoise, as if each had its whole block.

        Returns:
            The same as they are.
        """
        if not self.used:
            return rows
        self.plans = req_states.draft_tokens
        self.members = np.flatnonzero(self.length[rows.slots_np])
        if not len(self.members):
            return rows
        parts = self.locate(batch)
        if parts is not None:
            rows = self._place(batch, rows, parts)
        members = rows.slots[self._device(self.members)]
        masked = self._masked(members, rows.width[self._device(self.members)])
        length = self._device(self.length[rows.slots_np[self.members]])
        self.visited = open_sub_block(masked, length)
        if self.first_alone:
            # That position needs nothing of its block: it was not visited.
            alone = first_alone(masked, self.states.canvas.step[members])
            self.visited = self.visited.masked_fill(alone[:, :1], -1)
        return rows

    def _place(
        self, batch: InputBatch, rows: DenoisingRows, parts: PartialQueries
    ) -> DenoisingRows:
        to_device = self._device
        row = np.searchsorted(rows.batch_index, parts.request)
        index, start, width = map(to_device, (row, parts.start, parts.width))
        # A column's row of the batch is this far from it.
        begin = batch.query_start_loc_np[parts.request] + parts.before - parts.first
        begin, first, end = (
            to_device(field).unsqueeze(1) for field in (begin, parts.first, parts.end)
        )
        length = self.states.geometry.block_length
        column = torch.arange(length, device=index.device)
        ids = active_ids(self.states.gather(rows.slots[index]))
        source = torch.minimum(torch.maximum(column, first), end - 1)
        batch.input_ids[begin + source] = ids.gather(1, source).to(
            batch.input_ids.dtype
        )
        # Where the row before scores a position, the part's first one has none.
        scored = torch.maximum(torch.minimum(column, end - 1), first + self.shifted)
        logits_rows = batch.logits_indices.view(-1, length)
        batch.logits_indices = logits_rows.index_copy(0, index, begin + scored).view(-1)
        every = torch.ones_like(logits_rows, dtype=torch.bool)
        inside = (column >= first) & (column < end)
        return rows._replace(
            start=rows.start.index_copy(0, index, start),
            width=rows.width.index_copy(0, index, width),
            num_open=rows.num_open.index_copy(0, index, end.squeeze(1)),
            forwarded=every.index_copy(0, index, inside),
        )

    def plan(self, rows: DenoisingRows, complete: torch.Tensor) -> torch.Tensor | None:
        """Say what the next step forwards, once this one has been carried out.

        Args:
            rows: the requests of the step.
            complete: bool [requests], blocks that the step has completed.

        Returns:
            Column of the open block that each next query begins with, int64 [requests];
            None if all begin with a block.
        """
        if not len(self.members):
            return None
        assert self.visited is not None and self.plans is not None
        index = self._device(self.members)
        slots, complete = rows.slots[index], complete[index]
        start = rows.start[index] + complete * self.states.geometry.block_length
        width = (self.max_model_len - start).clamp(
            max=self.states.geometry.block_length
        )
        masked = self._masked(slots, width)
        length = self._device(self.length[rows.slots_np[self.members]])
        visited = self.visited.masked_fill(complete.unsqueeze(1), -1)
        first, end = forwarded_part(visited, masked, length, width, self.shifted)
        if self.first_alone:
            # Behind a block that is to become final one row is enough.
            end = torch.where(complete & masked[:, 0], 1, end)
        self.plans[slots, 0] = first.to(self.plans.dtype)
        self.plans[slots, 1] = (end - first).to(self.plans.dtype)
        return torch.zeros_like(rows.start).index_copy(0, index, first)

    def _masked(self, slots: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
        """Positions of the open blocks to be unmasked, bool [requests, block].

        Args:
            slots: int64 [requests] -> request slot.
            width: int64 [requests], positions of these blocks.
        """
        mask_id = self.states.geometry.mask_token_id
        _, masked = self.states.ops.open_blocks(
            self.states.canvas, slots, width, mask_id
        )
        return masked

    def _device(self, values: Array) -> torch.Tensor:
        device = self.states.device
        return async_tensor_h2d(values, device=device, dtype=torch.int64)
