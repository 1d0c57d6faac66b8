# SPDX-License-Identifier: Apache-2.0
"""S2D2 in the engine: a draft in one forward, its verification in the next.

A step of a request that verifies takes one forward or two. By the scores of the first
a routing policy decides whether to go on as the strategy would, or to have the first
span of masks verified. Then the canvas stays as it is, and the next forward also holds
the block as drafted and a block of masks: row ``i`` of that one sees the drafted rows
left of ``i`` and itself, as the same weights do when they decode one by one. The
canvas's own rows give the draft's law once more, so no law is kept in between. With
shifted logits the drafted rows themselves do that, and there are no masks.

What the strategy edits or masks again is part of the draft, as in the authors' code
(phymhan/S2D2, LLaDA2/generate_utils.py): the verifier sees the edited block, and edits
and verified tokens are written together. So an edit may replace what was verified.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_unmask.decoding import routing, verifying
from vllm_unmask.decoding.reading import row_statistics
from vllm_unmask.decoding.sampling import transform, uniform
from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.decoding.verifying import ACCEPTANCE_STREAM, RESIDUAL_STREAM
from vllm_unmask.engine.grammar_step import GrammarStep
from vllm_unmask.engine.states import put, select, take
from vllm_unmask.engine.verification import COLUMNS, Memory

if TYPE_CHECKING:
    from vllm_unmask.engine.denoising import Stepper
    from vllm_unmask.engine.rows import DenoisingRows


class Drafted(NamedTuple):
    """The requests of a step that verify, and what their windows say."""

    rows: np.ndarray[Any, Any]  # int64 [requests] -> row of the denoising requests
    ready: torch.Tensor  # bool [requests], this forward verifies a draft
    ids: torch.Tensor  # int64 [requests, block], the blocks as drafted
    # [requests * block, vocab], what verifies; None if no draft is ready.
    logits: torch.Tensor | None


class Choice(NamedTuple):
    """What a step does with the blocks."""

    before: torch.Tensor  # int64 [all, block], edited and masked again
    scores: Scores  # each tensor [all, block]
    accepted: torch.Tensor  # bool [all, block], masks of ``before`` that are unmasked


class Decided(NamedTuple):
    """What becomes of a step in which requests verify."""

    choice: Choice
    wait: torch.Tensor  # bool [all], for the next forward to verify
    checked: torch.Tensor  # int64 [all, block], drafts that were verified, -1 elsewhere


class VerificationStep:
    """One denoising step of the requests that verify.

    Args:
        stepper: carries out the step.
        drafted: the requests concerned.
        rows: all requests that denoise.
        worded: whether any request has bad words.
    """

    def __init__(
        self,
        stepper: "Stepper",
        drafted: Drafted,
        rows: "DenoisingRows",
        worded: bool,
    ) -> None:
        self.stepper, self.verifier = stepper, stepper.verifier
        self.length, self.mask_id = stepper.geometry
        self.drafted, self.rows, self.worded = drafted, rows, worded
        device = rows.slots.device
        self.index = async_tensor_h2d(drafted.rows, device=device)
        self.slots = rows.slots[self.index]
        self.start = rows.start[self.index]
        self.positions = rows.positions(self.length)[self.index]
        options = self.verifier.options[rows.slots_np[drafted.rows]]
        columns = async_tensor_h2d(np.ascontiguousarray(options.T), device=device)
        self.parameters = dict(zip(COLUMNS, columns, strict=True))

    def decide(
        self,
        active: torch.Tensor,
        masked: torch.Tensor,
        logits: torch.Tensor,
        choice: Choice,
    ) -> Decided:
        """Verify what was drafted; route the others, and hold their drafts.

        Args:
            active: int64 [all, block], the blocks before the step.
            masked: bool [all, block], their positions to be unmasked.
            logits: float32 [all * block, vocab], after biases, the mask at -inf.
            choice: what the strategy would do.
        """
        verifier, index, slots = self.verifier, self.index, self.slots
        ready, ids = self.drafted.ready, self.drafted.ids
        own = logits.view(-1, self.length, logits.shape[1])[index].flatten(0, 1)
        scores, accepted = choice.scores, choice.accepted[index]
        tokens, before = scores.tokens[index], choice.before[index]
        gaps = masked[index] | ((before == self.mask_id) & (before != active[index]))
        span = verifying.first_span(gaps)
        memory = take(verifier.memory, slots)
        wanted, after, bucket = self._route(
            span, gaps, own, scores.confidence[index], memory
        )
        # A draft that found no room is not drafted again: that might never end.
        routed = ~ready & ~verifier.waiting[slots] & span.any(dim=1)
        wait = routed & wanted
        bucket = torch.where(routed, bucket, verifier.bucket[slots])
        accepted = accepted & ~wait.unsqueeze(1)
        checked = torch.full_like(ids, -1)
        if self.drafted.logits is not None:
            verified = self._verify(span, own, self.drafted.logits)
            mine = ready.unsqueeze(1)
            accepted = torch.where(mine, verified.accepted, accepted)
            tokens = torch.where(verified.accepted, verified.tokens, tokens)
            # The block that the verifier has seen.
            before = torch.where(mine & ~gaps, ids, before)
            checked = torch.where(mine & span, ids, checked)
            corrected = verified.accepted & (verified.tokens != ids)
            told = (ready, mine & span, verified.accepted, corrected)
            verifier.totals += torch.stack([what.sum() for what in told])
        self._learn(memory, after, routed, wait, bucket, accepted.sum(dim=1))
        verifier.waiting[slots] = wait
        self.stepper.drafts.hold(slots, torch.where(gaps, tokens, before), wait)
        before = torch.where(wait.unsqueeze(1), active[index], before)
        none = torch.zeros_like(self.rows.slots, dtype=torch.bool)
        return Decided(
            Choice(
                choice.before.index_copy(0, index, before),
                scores._replace(tokens=scores.tokens.index_copy(0, index, tokens)),
                choice.accepted.index_copy(0, index, accepted),
            ),
            none.index_copy(0, index, wait),
            torch.full_like(active, -1).index_copy(0, index, checked),
        )

    def _learn(
        self,
        memory: Memory,
        after: Memory,
        routed: torch.Tensor,
        wait: torch.Tensor,
        bucket: torch.Tensor,
        gained: torch.Tensor,
    ) -> None:
        """Remember what was decided, and what it was worth once that is known.

        Args:
            memory: before the step.
            after: as routing left it.
            routed: bool [requests], where that counts.
            wait: bool [requests], where the worth is not known yet.
            bucket: int64 [requests], situation of the decision.
            gained: int64 [requests], positions unmasked.
        """
        verifier, ready = self.verifier, self.drafted.ready
        memory = select(routed, after, memory)
        rewarded = routing.reward_bandit(memory.bandit, bucket, ready, gained)
        resolved = (ready | verifier.waiting[self.slots] | routed) & ~wait
        memory = select(resolved, memory._replace(bandit=rewarded), memory)
        put(verifier.memory, self.slots, memory)
        verifier.bucket[self.slots] = bucket

    def _verify(
        self, span: torch.Tensor, own: torch.Tensor, logits: torch.Tensor
    ) -> verifying.Verified:
        """Accept or correct, after the biases and transforms of the requests.

        Args:
            span: bool [requests, block], masks that may be verified.
            own: float32 [requests * block, vocab], of the diffusion mode.
            logits: [requests * block, vocab], of the other mode; the mask is banned
                here, in place.
        """
        stepper, slots = self.stepper, self.slots
        ready, ids = self.drafted.ready, self.drafted.ids
        logits[:, self.mask_id] = -torch.inf
        some = self.rows.choose(self.drafted.rows, self.start, self.length)
        logits, _ = stepper.biases.apply(logits, some, ids, self.worded, None, False)
        members = stepper.grammars.members(some.slots_np)
        if members:
            GrammarStep(stepper.grammars, members).constrain_draft(logits, ids, ready)
        sampling, rows = stepper.sampling_states, slots.repeat_interleave(self.length)
        draft_law, verifier_law = (
            transform(
                law,
                sampling.temperature.gpu[rows],
                sampling.top_k.gpu[rows].to(torch.int64),
                sampling.top_p.gpu[rows],
                sampling.min_p.gpu[rows],
            ).unflatten(0, span.shape)
            for law in (own, logits)
        )
        seeds, steps = sampling.seeds.gpu[rows], stepper.canvas.step[rows]
        accepting, correcting = (
            uniform(seeds, self.positions.flatten(), steps, stream).view(span.shape)
            for stream in (ACCEPTANCE_STREAM, RESIDUAL_STREAM)
        )
        return verifying.verify(
            ids,
            span & ready.unsqueeze(1),
            draft_law,
            verifier_law,
            sampling.temperature.gpu[slots] == 0,
            self.parameters["tempering"],
            accepting,
            correcting,
        )

    def _route(
        self,
        span: torch.Tensor,
        masked: torch.Tensor,
        logits: torch.Tensor,
        confidence: torch.Tensor,
        memory: Memory,
    ) -> tuple[torch.Tensor, Memory, torch.Tensor]:
        """Whether to verify, bool [requests]; the memory; the bandit's bucket."""
        p = self.parameters
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
            self.verifier.vocab_size,
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
        bucket = routing.situation(span, masked, entropy, self.verifier.vocab_size)
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
        return wanted, Memory(hysteresis, learnt), bucket
