# SPDX-License-Identifier: Apache-2.0
"""Grammars around one denoising step.

Logits are constrained before scoring; after acceptance, the host decides what each
block becomes. Only candidates, acceptance and the frontier's best tokens of requests
with a grammar come from the device; the others' path is untouched.
"""

import time
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.engine.grammar import GrammarRequest, Grammars
from vllm_unmask.grammar.state import Status, StepResult
from vllm_unmask.kernels.frontier import constrain_frontier
from vllm_unmask.kernels.row_statistics import NO_CONSTRAINTS, Constraints

# Legal tokens of the frontier among which the look-ahead chooses.
NUM_CANDIDATES = 8


class Unmasked(NamedTuple):
    """What a step made of the active blocks."""

    active: torch.Tensor  # int64 [requests, block], ids after the step
    tokens: torch.Tensor  # int64 [requests, block], what unmasked positions took
    accepted: torch.Tensor  # bool [requests, block], unmasked in this step
    width: torch.Tensor  # int64 [requests], 0 where the request did not take part
    failed: list[int]  # rows of requests that must end with an error


class GrammarStep:
    """One denoising step of the requests that have a grammar.

    Args:
        grammars: all grammars.
        members: rows of the batch of denoising requests, and their requests.
    """

    def __init__(
        self, grammars: Grammars, members: list[tuple[int, GrammarRequest]]
    ) -> None:
        self.length, self.mask_id = grammars.geometry
        self.grammars = grammars
        self.members = members
        self.ready = [(r, m) for r, m in members if m.state is not None]
        self.mask_words = -(-grammars.vocab_size // 32)

    def index(self, device: torch.device) -> torch.Tensor:
        """int64 [ready] -> row of the batch of denoising requests."""
        rows = [row for row, _ in self.ready]
        return async_tensor_h2d(rows, device=device, dtype=torch.int64)

    def rows(self, device: torch.device) -> torch.Tensor:
        """int64 [members] -> row of the batch of denoising requests."""
        rows = [row for row, _ in self.members]
        return async_tensor_h2d(rows, device=device, dtype=torch.int64)

    def first_live(self, num_requests: int, device: torch.device) -> torch.Tensor:
        """Column before which nothing may change: it is verified. int64 [requests]."""
        columns = np.zeros(num_requests, np.int64)
        for row, request in self.ready:
            columns[row] = request.frontier
        return async_tensor_h2d(columns, device=device)

    def constrain(self, logits: torch.Tensor) -> None:
        """Ban, in place, what the grammars do not allow.

        The frontier may take the legal tokens only. Any other position may take
        everything but tokens that are no text, of which a stop token would make the
        model take all to its right for the end.

        Args:
            logits: float32 [requests * block, vocab], the active blocks.
        """
        rows, bitmask = self._frontiers(logits)
        if self.ready:
            self.candidates = constrain_frontier(
                logits,
                _beside(logits, rows),
                _beside(logits, bitmask),
                self.grammars.silent_ids(logits.device),
                self.length,
                min(NUM_CANDIDATES, logits.shape[1]),
            )

    def constraints(
        self, logits: torch.Tensor, num_requests: int, read: torch.Tensor | None
    ) -> Constraints:
        """What `constrain` bans, for a kernel that reads the logits as they are.

        Args:
            logits: [positions, vocab], of the active blocks.
            num_requests: number of these.
            read: as `DenoisingRows.read`.
        """
        rows, bitmask = self._frontiers(logits)
        if not self.ready:
            return NO_CONSTRAINTS
        of_row = np.full(num_requests, -1)
        of_row[[row for row, _ in self.ready]] = len(rows)
        of_row = of_row.repeat(self.length)
        of_row[rows] = np.arange(len(rows))
        if read is not None:
            of_row = of_row[read.numpy()]
            rows = np.searchsorted(read.numpy(), rows)
        self.candidates = constrain_frontier(
            logits[_beside(logits, rows)].float(),
            torch.arange(len(rows), device=logits.device),
            _beside(logits, bitmask),
            self.grammars.silent_ids(logits.device),
            1,
            min(NUM_CANDIDATES, logits.shape[1]),
        )
        bitmasks = np.vstack((bitmask, self.grammars.silent_mask(bitmask.shape[1])))
        return Constraints(
            bitmasks=_beside(logits, bitmasks), bitmask_rows=_beside(logits, of_row)
        )

    def _frontiers(
        self, logits: torch.Tensor
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Logits rows of the frontiers, int64 [ready], and what they may take.

        The second is int32 [ready, words]; bit ``i % 32`` of word ``i // 32`` is token
        ``i``.
        """
        words = -(-logits.shape[1] // 32)
        bitmask = np.zeros((len(self.ready), words), np.int32)
        rows = np.zeros(len(self.ready), np.int64)
        for index, (row, request) in enumerate(self.ready):
            state = request.state
            assert state is not None
            column = min(request.frontier, self.length - 1)
            rows[index] = row * self.length + column
            started = time.perf_counter_ns()
            try:
                state.frontier_mask(bitmask[index, : self.mask_words])
            except Exception:
                # Its own alone: the request takes part no further.
                self.grammars.fail(request)
            request.nanoseconds = time.perf_counter_ns() - started
        return rows, bitmask

    def constrain_draft(
        self, logits: torch.Tensor, drafts: torch.Tensor, ready: torch.Tensor
    ) -> None:
        """Ban, in place, what is not legal behind the drafted tokens.

        Row ``i`` of a block takes what may follow the drafts left of it, from the
        frontier on and up to the first draft that is not legal itself; what comes
        after that one is never asked.

        Args:
            logits: float32 [requests * block, vocab], of the mode that verifies.
            drafts: int64 [requests, block].
            ready: bool [requests], where there is a draft.
        """
        words = -(-logits.shape[1] // 32)
        blocks, wanted = drafts.tolist(), ready.tolist()
        for row, request in self.ready:
            state, first = request.state, request.frontier
            if not wanted[row] or state is None or first >= self.length:
                continue
            bitmask = np.zeros((self.length - first, words), np.int32)
            try:
                num = state.draft_masks(blocks[row][first:], bitmask)
            except Exception:
                self.grammars.fail(request)
                continue
            bits = np.unpackbits(
                bitmask[:num].view(np.uint8), axis=1, bitorder="little"
            )
            legal = (
                torch.from_numpy(bits[:, : logits.shape[1]]).to(logits.device).bool()
            )
            start = row * self.length + first
            logits[start : start + num].masked_fill_(~legal, -torch.inf)

    def verify(
        self,
        before: torch.Tensor,
        scores: Scores,
        accepted: torch.Tensor,
        width: torch.Tensor,
        temperature: np.ndarray[Any, Any],
    ) -> Unmasked:
        """Decide what the blocks become.

        Args:
            before: int64 [requests, block], ids before the step.
            scores: each tensor [requests, block].
            accepted: bool [requests, block], what the acceptance rule would unmask.
            width: int64 [requests], positions of the active block.
            temperature: float32 [requests].
        """
        device = before.device
        parts = [before, scores.tokens, accepted, width.unsqueeze(1)]
        if len(self.ready) == len(before):
            active = self._blocks(parts, temperature)
        else:
            active = torch.where(accepted, scores.tokens, before)
            if self.ready:
                index = self.index(device)
                parts = [part[index] for part in parts]
                active[index] = self._blocks(parts, temperature)
        for row, request in self.members:
            if request.state is None:
                active[row] = before[row]
                width = width.index_fill(0, torch.tensor([row], device=device), 0)
        unmasked = (active != self.mask_id) & (before != active)
        return Unmasked(active, active, unmasked, width, self._failed())

    def _failed(self) -> list[int]:
        return [row for row, request in self.members if request.failed]

    def _blocks(
        self, parts: list[torch.Tensor], temperature: np.ndarray[Any, Any]
    ) -> torch.Tensor:
        """Blocks after the step, int64 [ready, block].

        Args:
            parts: [ready, ...] each: ids before the step, tokens, acceptance, width.
            temperature: float32 [requests].
        """
        blocks = []
        host = zip(*_to_host([*parts, self.candidates]), strict=True)
        for (row, request), values in zip(self.ready, host, strict=True):
            block = values[0]
            try:
                if request.state is not None:
                    block = self._advance(request, temperature[row] > 0, *values)
            except Exception:
                self.grammars.fail(request)
            blocks.append(block)
        return _beside(parts[0], np.array(blocks))

    def _advance(
        self,
        request: GrammarRequest,
        sampled: bool,
        block: list[int],
        tokens: list[int],
        accepted: list[bool],
        size: list[int],
        candidates: list[int],
    ) -> list[int]:
        """Step one request's state; returns its block, which is changed in place."""
        state = request.state
        assert state is not None
        (width,) = size
        if width == 0:
            return block
        start = request.num_fixed
        # What lies beyond max_tokens is never reported; any token completes it.
        end = min(start + max(state.max_tokens - request.first, 0), width)
        started = time.perf_counter_ns()
        result = state.step(
            block[start:end],
            request.first,
            tokens[start:end],
            accepted[start:end],
            candidates,
            sampled,
        )
        request.nanoseconds += time.perf_counter_ns() - started
        request.num_forced = result.num_forced
        self._count(request, result)
        block[start:end] = result.block
        if self.mask_id not in result.block:
            block[end:width] = [self._filler()] * (width - end)
            request.first += end - start
            request.num_fixed = 0
        elif self.grammars.streaming:
            request.first += result.block.index(self.mask_id)
        return block

    def _count(self, request: GrammarRequest, result: StepResult) -> None:
        counters, state = self.grammars.counters, request.state
        assert state is not None
        counters.observe_step(request.nanoseconds / 1000)
        counters.add("grammar_tokens_remasked", result.remasked)
        counters.add("grammar_tokens_forced", result.num_forced)
        counters.add("grammar_lookaheads", result.looked_ahead)
        closed = state.status == Status.CLOSED and not request.closed
        counters.add("grammar_guard_closures", closed)
        request.closed |= closed

    def _filler(self) -> int:
        vocabulary = self.grammars.vocabulary
        assert vocabulary is not None
        return vocabulary.stop_ids[0]


def _beside(tensor: torch.Tensor, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array as a tensor on the device of another; on a CPU without a copy."""
    if tensor.is_cpu:
        return torch.from_numpy(array)
    return async_tensor_h2d(array, device=tensor.device)


def _to_host(parts: list[torch.Tensor]) -> list[list[list[Any]]]:
    """Tensors [rows, ...] as lists, in one copy from a device."""
    # Each is a few microseconds on a CPU, where joining them takes twice as long.
    if parts[0].is_cpu:
        return [part.tolist() for part in parts]
    rows = torch.cat(parts, dim=1).tolist()
    bounds = pairwise((0, *accumulate(part.shape[1] for part in parts)))
    return [[row[start:end] for row in rows] for start, end in bounds]
