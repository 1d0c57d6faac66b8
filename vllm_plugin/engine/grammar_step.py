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

from vllm_unmask.decoding.scoring import Scores, top_tokens
from vllm_unmask.engine.grammar import GrammarRequest, Grammars
from vllm_unmask.grammar.state import Status, StepResult

# Legal tokens of the frontier among which the look-ahead chooses.
NUM_CANDIDATES = 8


def apply_bitmask(logits: torch.Tensor, bitmask: np.ndarray[Any, Any]) -> None:
    """Ban, in place, every token whose bit is 0.

    Args:
        logits: float32 [rows, vocab].
        bitmask: int32 [rows, ceil(vocab / 32)], token ``i`` at bit ``i % 32`` of word
            ``i // 32``.
    """
    if logits.device.type == "cpu":
        # xgrammar's own loop goes bit by bit here: 0.6 ms a row of 150,000.
        bits = np.unpackbits(bitmask.view(np.uint8), axis=1, bitorder="little")
        banned = torch.from_numpy(bits[:, : logits.shape[1]] == 0)
        logits.masked_fill_(banned, -torch.inf)
        return
    import xgrammar

    device_mask = async_tensor_h2d(bitmask, device=logits.device)
    xgrammar.apply_token_bitmask_inplace(logits, device_mask)


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
        self.frontier = np.zeros(len(self.ready), np.int64)  # rows of the logits
        self.mask_words = -(-grammars.vocab_size // 32)

    def index(self, device: torch.device) -> torch.Tensor:
        """int64 [ready] -> row of the batch of denoising requests."""
        rows = [row for row, _ in self.ready]
        return async_tensor_h2d(rows, device=device, dtype=torch.int64)

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
        for index, (row, request) in enumerate(self.ready):
            state = request.state
            assert state is not None
            column = min(request.frontier, self.length - 1)
            self.frontier[index] = row * self.length + column
            started = time.perf_counter_ns()
            try:
                state.frontier_mask(bitmask[index, : self.mask_words])
            except Exception:
                # Its own alone: the request takes part no further.
                self.grammars.fail(request)
            request.nanoseconds = time.perf_counter_ns() - started
        if not self.ready:
            return
        device = logits.device
        rows = async_tensor_h2d(self.frontier, device=device)
        frontier = logits[rows]
        blocks = logits.view(-1, self.length, logits.shape[1])
        silent_ids = self.grammars.silent_ids(device)
        if len(self.ready) == len(blocks):
            logits.index_fill_(1, silent_ids, -torch.inf)
        else:
            blocks[self.index(device).unsqueeze(1), :, silent_ids] = -torch.inf
        apply_bitmask(frontier, bitmask)
        logits[rows] = frontier
        top = top_tokens(frontier, min(NUM_CANDIDATES, logits.shape[1]))
        self.candidates = torch.where(top.values > -torch.inf, top.indices, -1)

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
        index = self.index(device)
        # One copy to the host: [ready, before | tokens | accepted | width | candidates]
        parts = [before, scores.tokens, accepted.long(), width.unsqueeze(1)]
        if len(self.ready) < len(before):
            parts = [part[index] for part in parts]
        if self.ready:
            parts.append(self.candidates)
        host = torch.cat(parts, dim=1).cpu().numpy()
        blocks = host[:, : self.length].copy()
        for i, (row, request) in enumerate(self.ready):
            if request.state is None:
                continue
            try:
                self._advance(request, host[i], blocks[i], bool(temperature[row] > 0))
            except Exception:
                self.grammars.fail(request)
        after = async_tensor_h2d(blocks, device=device, dtype=torch.int64)
        if len(self.ready) < len(before):
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
        row: np.ndarray[Any, Any],
        block: np.ndarray[Any, Any],
        sampled: bool,
    ) -> None:
        """Step one request's state; writes ``block``, int64 [block]."""
        state, length = request.state, self.length
        assert state is not None
        width = int(row[3 * length])
        if width == 0:
            return
        start = request.num_fixed
        # What lies beyond max_tokens is never reported; any token completes it.
        end = min(start + max(state.max_tokens - request.first, 0), width)
        started = time.perf_counter_ns()
        result = state.step(
            row[start:end],
            request.first,
            row[length + start : length + end],
            row[2 * length + start : 2 * length + end].astype(bool),
            row[3 * length + 1 :],
            sampled,
        )
        request.nanoseconds += time.perf_counter_ns() - started
        self._count(request, result)
        block[start:end] = result.block
        if not (result.block == self.mask_id).any():
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
