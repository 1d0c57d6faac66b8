# SPDX-License-Identifier: Apache-2.0
"""Grammars around one denoising step.

Logits are constrained before scoring; after acceptance, the host decides what each
block becomes. Only candidates, acceptance and the frontier's best tokens of requests
with a grammar come from the device; the others' path is untouched.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.engine.grammar import GrammarRequest, Grammars
from vllm_unmask.grammar.state import Status, StepResult
from vllm_unmask.kernels.frontier import constrain_frontier

# Legal tokens of the frontier among which the look-ahead chooses.
NUM_CANDIDATES = 8


class Unmasked(NamedTuple):
    """What a step made of the active blocks."""

    active: torch.Tensor  # int64 [requests, block], ids after the step
    tokens: torch.Tensor  # int64 [requests, block], what each position took
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
        if self.ready:
            device = logits.device
            self.candidates = constrain_frontier(
                logits,
                async_tensor_h2d(rows, device=device),
                async_tensor_h2d(bitmask, device=device),
                self.grammars.silent_ids(device),
                self.length,
                min(NUM_CANDIDATES, logits.shape[1]),
            )

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
        index = None
        parts = [before, scores.tokens, accepted, width]
        if len(self.ready) < len(before):
            index = self.index(device)
            parts = [part[index] for part in parts]
        if self.ready:
            parts.append(self.candidates)
        host = _to_host(parts)
        blocks = host[0].copy()
        for i, (row, request) in enumerate(self.ready):
            if request.state is None:
                continue
            block = [part[i] for part in host]
            try:
                self._advance(request, block, blocks[i], bool(temperature[row] > 0))
            except Exception:
                self.grammars.fail(request)
        after = async_tensor_h2d(blocks, device=device, dtype=torch.int64)
        if index is not None:
            every = torch.where(accepted, scores.tokens, before)
            after = every.index_copy_(0, index, after)
        active = after
        for row, request in self.members:
            if request.state is None:
                active[row] = before[row]
                width = width.index_fill(0, torch.tensor([row], device=device), 0)
        unmasked = (active != self.mask_id) & (before != active)
        tokens = torch.where(unmasked, active, scores.tokens)
        return Unmasked(active, tokens, unmasked, width, self._failed())

    def _failed(self) -> list[int]:
        return [row for row, request in self.members if request.failed]

    def _advance(
        self,
        request: GrammarRequest,
        host: list[np.ndarray[Any, Any]],
        block: np.ndarray[Any, Any],
        sampled: bool,
    ) -> None:
        """Step one request's state; writes ``block``, int64 [block]."""
        state = request.state
        assert state is not None
        before, tokens, accepted, size, candidates = host
        width = int(size)
        if width == 0:
            return
        start = request.num_fixed
        # What lies beyond max_tokens is never reported; any token completes it.
        end = min(start + max(state.max_tokens - request.first, 0), width)
        started = time.perf_counter_ns()
        result = state.step(
            before[start:end],
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
        if self.mask_id not in result.block.tolist():
            block[end:width] = self._filler()
            request.first += end - start
            request.num_fixed = 0

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


def _to_host(parts: list[torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    """Tensors of as many rows each, in one copy; on a CPU without any."""
    if parts[0].device.type == "cpu":
        return [part.numpy() for part in parts]
    wide = [part if part.dim() > 1 else part.unsqueeze(1) for part in parts]
    host = torch.cat([part.long() for part in wide], dim=1).cpu().numpy()
    ends = np.cumsum([part.shape[1] for part in wide])[:-1]
    split = np.split(host, ends, axis=1)
    kinds = {torch.bool: bool}
    return [
        array.reshape(part.shape).astype(kinds.get(part.dtype, np.int64))
        for array, part in zip(split, parts, strict=True)
    ]
