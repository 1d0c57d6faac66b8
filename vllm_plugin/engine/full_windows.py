# SPDX-License-Identifier: Apache-2.0
"""Self-speculation where every position of a model sees every other one.

What a step forwards there is its *query*: the whole canvas, or what a cache policy
leaves of it (`engine.full_scheduler`). Where the next step forwards the same positions,
a window behind the query holds just that, with the open block as guessed, and sees what
the next step would: itself, and of the cache what the query sees beside itself. So a
window has as many rows as the query, and no step that forwards other positions than the
one before it is carried out on one.

Keys and values of windows are not written: nothing has to be allocated for them.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_unmask.decoding.drafting import Candidates
from vllm_unmask.engine.attention import RowPlan
from vllm_unmask.engine.full_scheduler import NEVER, CanvasPlan
from vllm_unmask.engine.rows import DenoisingRows
from vllm_unmask.engine.speculation import Drafts
from vllm_unmask.engine.windows import Speculating, WindowMetadata, Windows

Array = np.ndarray[Any, Any]


class CanvasWindows(NamedTuple):
    """The requests of a batch that speculate; int64 [requests] each, on the host."""

    request: Array  # -> row of the batch
    num: Array  # windows
    length: Array  # rows of a window, and of the query before them
    first: Array  # absolute position of a window's first row
    row: Array  # row of the first window
    beyond: Array  # cached positions behind a window that it sees
    block_length: int

    @property
    def starts(self) -> list[tuple[int, int, int]]:
        """Of every window: row here, place among the request's, first row."""
        return [
            (i, window, row + window * length)
            for i, (num, length, row) in enumerate(
                zip(
                    self.num.tolist(),
                    self.length.tolist(),
                    self.row.tolist(),
                    strict=True,
                )
            )
            for window in range(num)
        ]

    def cut(self, batch: InputBatch) -> tuple[RowPlan, Array]:
        """Rows for the platform's attention: queries, and windows in pieces of a block.

        It does not know what windows see, and should do little for them.

        Returns:
            The rows, and which of them are of windows, bool [rows].
        """
        piece = self.block_length
        ends = batch.query_start_loc_np[1 : batch.num_reqs + 1].tolist()
        behind = dict(zip(self.request.tolist(), self.row.tolist(), strict=True))
        request, bounds, after = [], [0], []
        for i, end in enumerate(ends):
            first = behind.get(i, end)
            cuts = [first, *range(first + piece, end, piece), *[end][: end > first]]
            request += [i] * len(cuts)
            bounds += cuts
            after += [end - cut for cut in cuts]
        request_np = np.array(request)
        start = np.array(bounds, np.int32)
        after_np = np.array(after, np.int32)
        first_rows = np.array([behind.get(i, end) for i, end in enumerate(ends)])
        plan = RowPlan(request_np, start, after_np, after_np)
        return plan, start[:-1] >= first_rows[request_np]

    def metadata(self, block_table: torch.Tensor, num_rows: int) -> WindowMetadata:
        """What attention needs to know of the windows.

        Args:
            block_table: int32 [batch, pages].
            num_rows: rows of the batch.
        """
        bounds, seen, request, holes = [0], [], [], []
        for i, _, row in self.starts:
            length, first = int(self.length[i]), int(self.first[i])
            # What lies between two windows is skipped.
            bounds += [row, row + length]
            seen += [-1, first + int(self.beyond[i])]
            request += [int(self.request[i])] * 2
            holes += [[first, length]] * 2
        device, longest = block_table.device, int(self.length[self.num > 0].max())

        def to_device(values: Any) -> torch.Tensor:
            return async_tensor_h2d(np.array(values), device=device, dtype=torch.int32)

        everything = torch.full(
            (-(-longest // 32),), -1, dtype=torch.int32, device=device
        )
        return WindowMetadata(
            block_table[to_device(request).long()],
            to_device(seen),
            to_device(bounds),
            everything.expand(num_rows, -1),
            longest,
            to_device(holes) if self.beyond.any() else None,
        )


class WindowRows(NamedTuple):
    """Every row of a batch's windows; int64 [rows] each."""

    row: torch.Tensor  # of the batch
    request: torch.Tensor  # row of `CanvasWindows`
    window: torch.Tensor
    position: torch.Tensor  # absolute


class CanvasDrafts(Drafts):
    """`Drafts` of requests whose steps forward whole canvases."""

    def __init__(self, max_num_reqs: int, *args: Any) -> None:
        super().__init__(max_num_reqs, *args)
        # Request slot -> steps of a block from one full step to the next, and the
        # positions from which and up to which a next block may be a candidate.
        self.period = torch.ones(max_num_reqs, dtype=torch.int64, device=self.device)
        self.opens = torch.zeros(
            (max_num_reqs, 2), dtype=torch.int64, device=self.device
        )

    def plan(self, slot: int, plan: CanvasPlan) -> None:
        """Take over a slot; what its steps forward."""
        self.period[slot] = plan.period
        # A block's first step is full, and has the same rows as the one before it if
        # that is, too, and the canvas ends where it did.
        opens = (plan.settled, plan.end) if plan.period == 1 else (1, 0)
        self.opens[slot] = torch.tensor(opens)

    def may_open(self, slots: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        first, end = self.opens[slots].unbind(1)
        return (start >= first) & (start + 2 * self.geometry.block_length <= end)

    def find_windows(self, batch: InputBatch) -> CanvasWindows | None:
        """The requests of a batch that speculate, None without any.

        They have a draft token more for every window.
        """
        num_drafts, length = batch.num_draft_tokens_per_req, self.geometry.block_length
        if num_drafts is None or not batch.has_structured_output_reqs:
            # Nobody asks for candidates.
            return None
        # A block that the context cuts is left alone.
        index = np.flatnonzero(
            (self.limit[batch.idx_mapping_np] > 0) & (num_drafts >= length)
        )
        if not len(index):
            return None
        num = num_drafts[index].astype(np.int64) - length
        rows = batch.num_scheduled_tokens[index].astype(np.int64) // (1 + num)
        return CanvasWindows(
            index,
            num,
            rows,
            batch.num_computed_tokens_np[index].astype(np.int64),
            batch.query_start_loc_np[index].astype(np.int64) + rows,
            np.zeros_like(rows),
            length,
        )

    def place(self, windows: CanvasWindows) -> WindowRows | None:
        """All rows of the windows, None without any."""
        of_window = [
            np.stack(
                np.broadcast_arrays(
                    row + np.arange(windows.length[i]),
                    i,
                    window,
                    windows.first[i] + np.arange(windows.length[i]),
                )
            )
            for i, window, row in windows.starts
        ]
        if not of_window:
            return None
        rows = np.concatenate(of_window, axis=1)
        return WindowRows(
            *async_tensor_h2d(rows, device=self.device, dtype=torch.int64)
        )

    def guessed(
        self,
        slots: torch.Tensor,
        rows: WindowRows,
        start: torch.Tensor,
        opened: torch.Tensor,
    ) -> torch.Tensor:
        """Ids of the open block in windows, int64 [rows]; anything outside of it.

        A window that is a next block has the block complete that it follows.

        Args:
            slots: int64 [requests] -> request slot.
            rows: of the windows.
            start: int64 [requests], absolute position of the open block.
            opened: int64 [requests, block], the open blocks.
        """
        length = self.geometry.block_length
        candidates = Candidates(*(field[slots] for field in self.candidates))
        which = torch.arange(len(slots), device=self.device)
        led = candidates.ids[which, candidates.leader.clamp(min=0)]
        front = torch.where((candidates.leader >= 0).unsqueeze(1), led, opened)
        column = (rows.position - start[rows.request]).clamp(0, length - 1)
        opens = rows.window == candidates.opening[rows.request]
        guess = candidates.ids[rows.request, rows.window, column]
        return torch.where(opens, front[rows.request, column], guess)

    def read_windows(
        self,
        windows: CanvasWindows,
        slots: torch.Tensor,
        start: torch.Tensor,
        num_steps: torch.Tensor,
        num_rows: int,
    ) -> tuple[Speculating, torch.Tensor]:
        """The windows' logits rows.

        Args:
            windows: of the batch, in which every request denoises.
            slots: int64 [requests] -> request slot.
            start: int64 [requests], absolute position of the open block.
            num_steps: int64 [slots], steps that it has had.
            num_rows: rows of the batch.
        """
        length = self.geometry.block_length
        num, each, first, row = (
            async_tensor_h2d(x, device=self.device, dtype=torch.int64)
            for x in (windows.num, windows.length, windows.first, windows.row)
        )
        width = int(windows.num.max())
        fitting = Candidates(*(field[slots] for field in self.candidates)).up_to(num)
        window = torch.arange(width, device=self.device)
        opens = (window == fitting.opening.unsqueeze(1)) * length
        rows = (row + start - first).unsqueeze(1) + window * each.unsqueeze(1) + opens
        column = torch.arange(length, device=self.device)
        rows = (rows.unsqueeze(2) + column).clamp(max=num_rows - 1)
        of_batch = Windows(
            windows.request, row, num * each, start, fitting, torch.zeros_like(num) > 0
        )
        period = self.period[slots]
        left = period - 1 - num_steps[slots] % period
        most = torch.where(period == 1, NEVER, left)
        speculating = Speculating(windows.request, of_batch, width, most, first == 0)
        return speculating, rows.view(-1)

    def tell(
        self, told: torch.Tensor, rows: DenoisingRows, num_steps: torch.Tensor
    ) -> None:
        """Say what the scheduler needs to know, where vLLM reports draft tokens.

        Args:
            told: int [slots, 2 or more], vLLM's draft tokens.
            rows: the requests of the step.
            num_steps: int64 [requests], steps that the open block has had.
        """
        count = self.candidates.count[rows.slots]
        told[rows.slots, 0] = num_steps.to(told.dtype)
        told[rows.slots, 1] = count.to(told.dtype)
