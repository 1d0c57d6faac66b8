# SPDX-License-Identifier: Apache-2.0
"""S2D2 in the engine: a draft in one forward, its verification in the next.

A step of a request that verifies takes one forward or two. By the scores of the first
a routing policy decides whether to go on as the strategy would, or to have the first
span of masks verified. Then the canvas stays as it is, and the next forward also holds
the block as drafted and a block of masks: row ``i`` of that one sees the drafted rows
left of ``i`` and itself, as the same weights do when they decode one by one. The
canvas's own rows give the draft's law once more, so no law is kept in between. With
shifted logits the drafted rows themselves do that, and there are no masks.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_unmask.decoding import routing, verifying
from vllm_unmask.decoding.reading import row_statistics
from vllm_unmask.decoding.sampling import transform, uniform
from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.decoding.verifying import ACCEPTANCE_STREAM, RESIDUAL_STREAM
from vllm_unmask.engine.states import BlockGeometry
from vllm_unmask.options import DecodingOptions

# Options that routing and acceptance read, as columns of a table of slots.
_COLUMNS = (
    "route",
    "acceptance_estimate",
    "estimate_parameter",
    "verify_cost",
    "cost_per_token",
    "min_score",
    "score_on",
    "score_off",
    "min_span",
    "exploration",
    "tempering",
    "threshold",
)


class Drafted(NamedTuple):
    """The requests of a step that verify, and what their windows say."""

    rows: np.ndarray[Any, Any]  # int64 [requests] -> row of the denoising requests
    ready: torch.Tensor  # bool [requests], this forward verifies a draft
    ids: torch.Tensor  # int64 [requests, block], the blocks as drafted
    # [requests * block, vocab], what verifies; None if no draft is ready.
    logits: torch.Tensor | None


class Decided(NamedTuple):
    """What becomes of a step in which requests verify."""

    scores: Scores  # each tensor [all, block]
    accepted: torch.Tensor  # bool [all, block]
    untouched: torch.Tensor  # bool [all], what was there before stays as it was
    wait: torch.Tensor  # bool [all], for the next forward to verify


class _Memory(NamedTuple):
    """What policies remember of a request."""

    verified: torch.Tensor  # bool [slots]
    bandit: routing.Bandit

    def take(self, slots: torch.Tensor) -> "_Memory":
        return _Memory(
            self.verified[slots], routing.Bandit(*(x[slots] for x in self.bandit))
        )

    def put(self, slots: torch.Tensor, values: "_Memory") -> None:
        for kept, new in zip(self, values, strict=True):
            if isinstance(kept, torch.Tensor):
                kept[slots] = new
            else:
                for field, value in zip(kept, new, strict=True):
                    field[slots] = value


class Verifier:
    """Options and memory of every request slot that verifies.

    Args:
        max_num_reqs: request slots.
        geometry: the model's blocks.
        vocab_size: entries of a logits row.
        device: of the canvases.
    """

    def __init__(
        self,
        max_num_reqs: int,
        geometry: BlockGeometry,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.max_num_reqs = max_num_reqs
        self.geometry = geometry
        self.vocab_size = vocab_size
        self.device = device
        self.options = np.zeros((max_num_reqs, len(_COLUMNS)), np.float32)
        self.mine = np.zeros(max_num_reqs, np.bool_)
        # Now, and when the open block was opened: a preempted request goes on from
        # there, as from its tokens.
        self.memory = self._new_memory(max_num_reqs)
        self.opened = self._new_memory(max_num_reqs)
        self.bucket = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        # bool [slots]: a draft waits for its verification.
        self.waiting = torch.zeros(max_num_reqs, dtype=torch.bool, device=device)
        # Drafts verified, positions accepted, positions corrected, so far.
        self.totals = torch.zeros(3, dtype=torch.int64, device=device)
        self.slots: dict[str, int] = {}
        self.left: OrderedDict[str, _Memory] = OrderedDict()

    def _new_memory(self, count: int) -> _Memory:
        return _Memory(
            torch.zeros(count, dtype=torch.bool, device=self.device),
            routing.new_bandit(count, self.device),
        )

    def add_request(self, slot: int, req_id: str, options: DecodingOptions) -> None:
        """Take over a slot."""
        self.mine[slot] = "s2d2" in options.fillers
        if not self.mine[slot]:
            return
        kind = list(routing.ESTIMATES.values())
        parameter = kind[int(options.number("acceptance_estimate"))]
        # No score counts sure positions where the rule has no threshold.
        unset = {"estimate_parameter": parameter, "threshold": 1.0}
        self.options[slot] = [
            options.number(name, unset.get(name, 0)) for name in _COLUMNS
        ]
        self.waiting[slot] = False
        self.slots[req_id] = slot
        where = torch.tensor([slot], device=self.device)
        memory = self.left.pop(req_id, None) or self._new_memory(1)
        self.memory.put(where, memory)
        self.opened.put(where, memory)

    def remove_request(self, req_id: str) -> None:
        """Forget a finished request; keep what a preempted one has learnt."""
        slot = self.slots.pop(req_id, None)
        if slot is None:
            return
        where = torch.tensor([slot], device=self.device)
        self.left[req_id] = self.opened.take(where)
        if len(self.left) > self.max_num_reqs:
            # Which of the two it is nobody says, so the oldest go.
            self.left.popitem(last=False)

    def reported(self, slots: torch.Tensor, done: torch.Tensor) -> None:
        """Blocks were reported: what comes next is a new block.

        Args:
            slots: int64 [requests] -> request slot.
            done: bool [requests].
        """
        now, before = self.memory.take(slots), self.opened.take(slots)
        self.opened.put(slots, _select(done, now, before))

    def members(self, slots_np: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Rows of those of the slots, int64 [requests], whose requests verify."""
        return np.flatnonzero(self.mine[slots_np])

    def decide(
        self,
        drafted: Drafted,
        slots: torch.Tensor,
        slots_np: np.ndarray[Any, Any],
        masked: torch.Tensor,
        logits: torch.Tensor,
        verifier_logits: torch.Tensor | None,
        scores: Scores,
        accepted: torch.Tensor,
        step: torch.Tensor,
        positions: torch.Tensor,
        sampling: Any,
    ) -> Decided:
        """Verify what was drafted; route the others.

        Args:
            drafted: the requests concerned.
            slots: int64 [all] -> request slot, of all requests that denoise.
            slots_np: the same on the host.
            masked: bool [all, block].
            logits: float32 [all * block, vocab], of the diffusion mode, banned tokens
                at -inf.
            verifier_logits: float32 [concerned * block, vocab], of the other mode.
            scores: each tensor [all, block].
            accepted: bool [all, block], what the strategy would unmask.
            step: int64 [all], denoising step of the block.
            positions: int64 [all * block], absolute.
            sampling: vLLM's sampling parameters of all slots.
        """
        length = self.geometry.block_length
        index = async_tensor_h2d(drafted.rows, device=self.device)
        mine = slots[index]
        columns = np.ascontiguousarray(self.options[slots_np[drafted.rows]].T)
        p = dict(
            zip(_COLUMNS, async_tensor_h2d(columns, device=self.device), strict=True)
        )
        own = logits.view(-1, length, logits.shape[1])[index].flatten(0, 1)
        span = verifying.first_span(masked[index])
        tokens, chosen = scores.tokens[index], accepted[index]
        before, ready = self.memory.take(mine), drafted.ready
        wanted, after, bucket = self._route(
            span, masked[index], own, scores.confidence[index], p, before
        )
        # A draft that found no room is not drafted again: that might never end.
        routed = ~ready & ~self.waiting[mine] & span.any(dim=1)
        wait = routed & wanted
        bucket = torch.where(routed, bucket, self.bucket[mine])
        chosen = chosen & ~wait.unsqueeze(1)
        if verifier_logits is not None:
            verified = self._verify(
                drafted,
                span,
                (own, verifier_logits),
                p["tempering"],
                mine,
                step[index],
                positions.view(-1, length)[index],
                sampling,
            )
            chosen = torch.where(ready.unsqueeze(1), verified.accepted, chosen)
            corrected = verified.accepted & (verified.tokens != drafted.ids)
            for place, what in enumerate((ready, verified.accepted, corrected)):
                self.totals[place] += what.sum()
            tokens = torch.where(verified.accepted, verified.tokens, tokens)
        memory = _select(routed, after, before)
        gained = routing.reward_bandit(memory.bandit, bucket, ready, chosen.sum(dim=1))
        resolved = (ready | self.waiting[mine] | routed) & ~wait
        memory = _select(resolved, memory._replace(bandit=gained), memory)
        self.memory.put(mine, memory)
        self.bucket[mine], self.waiting[mine] = bucket, wait
        none = torch.zeros_like(slots, dtype=torch.bool)
        return Decided(
            scores._replace(tokens=scores.tokens.index_copy(0, index, tokens)),
            accepted.index_copy(0, index, chosen),
            none.index_copy(0, index, wait | ready),
            none.index_copy(0, index, wait),
        )

    def _verify(
        self,
        drafted: Drafted,
        span: torch.Tensor,
        laws: tuple[torch.Tensor, torch.Tensor],
        tempering: torch.Tensor,
        slots: torch.Tensor,
        step: torch.Tensor,
        positions: torch.Tensor,
        sampling: Any,
    ) -> verifying.Verified:
        """Accept or correct, after the transforms of the requests."""
        length = span.shape[1]
        rows = slots.repeat_interleave(length)
        draft_law, verifier_law = (
            transform(
                law,
                sampling.temperature.gpu[rows],
                sampling.top_k.gpu[rows].to(torch.int64),
                sampling.top_p.gpu[rows],
                sampling.min_p.gpu[rows],
            ).unflatten(0, span.shape)
            for law in laws
        )
        seeds, steps = sampling.seeds.gpu[rows], step.repeat_interleave(length)
        accepting, correcting = (
            uniform(seeds, positions.flatten(), steps, stream).view(span.shape)
            for stream in (ACCEPTANCE_STREAM, RESIDUAL_STREAM)
        )
        return verifying.verify(
            drafted.ids,
            span & drafted.ready.unsqueeze(1),
            draft_law,
            verifier_law,
            sampling.temperature.gpu[slots] == 0,
            tempering,
            accepting,
            correcting,
        )

    def _route(
        self,
        span: torch.Tensor,
        masked: torch.Tensor,
        logits: torch.Tensor,
        confidence: torch.Tensor,
        p: dict[str, torch.Tensor],
        memory: _Memory,
    ) -> tuple[torch.Tensor, _Memory, torch.Tensor]:
        """Whether to verify, bool [requests]; the memory; the bandit's bucket."""
        best = row_statistics(logits)
        first, gap, entropy = (
            x.view(span.shape) for x in (best.probability, best.gap, best.entropy)
        )
        acceptance = routing.estimate_acceptance(
            p["acceptance_estimate"].long(),
            p["estimate_parameter"],
            confidence,
            first,
            first * (-gap).exp(),
            entropy,
            self.vocab_size,
        )
        score = routing.score(
            routing.expected_accepted(acceptance, span),
            span,
            confidence,
            masked,
            p["threshold"],
            p["verify_cost"],
            p["cost_per_token"] > 0,
        )
        bucket = routing.situation(span, masked, entropy, self.vocab_size)
        hysteresis = routing.route_hysteresis(
            memory.verified, score, p["score_on"], p["score_off"]
        )
        bandit, learnt = routing.route_bandit(memory.bandit, bucket, p["exploration"])
        yes = torch.ones_like(hysteresis)
        ways = torch.stack(
            (
                yes,
                ~yes,
                routing.route_span_length(span, p["min_span"].long()),
                routing.route_threshold(score, p["min_score"]),
                hysteresis,
                bandit,
            )
        )
        wanted = ways.gather(0, p["route"].long().unsqueeze(0)).squeeze(0)
        return wanted, _Memory(hysteresis, learnt), bucket


def _select(where: torch.Tensor, yes: _Memory, no: _Memory) -> _Memory:
    """Of each request the one or the other."""

    def choose(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where(where.view(-1, *[1] * (a.dim() - 1)), a, b)

    bandit = zip(yes.bandit, no.bandit, strict=True)
    return _Memory(
        choose(yes.verified, no.verified),
        routing.Bandit(*(choose(a, b) for a, b in bandit)),
    )
