# SPDX-License-Identifier: Apache-2.0
"""One denoising step of a batch of requests, from logits to canvases."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_unmask.decoding.canvas import stay
from vllm_unmask.decoding.regions import first_alone
from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.engine.biases import Biases
from vllm_unmask.engine.candidates import AHEAD_STEPS, Candidates
from vllm_unmask.engine.grammar_step import GrammarStep, Unmasked
from vllm_unmask.engine.logprobs import BlockLogprobs
from vllm_unmask.engine.openings import NextBlocks
from vllm_unmask.engine.rows import DenoisingRows, StepLogits
from vllm_unmask.engine.strategy_step import StrategyStep
from vllm_unmask.engine.verification_step import Choice, VerificationStep

if TYPE_CHECKING:
    from vllm_unmask.engine.model_state import BlockDiffusionModelState


# Logits up to which a CPU has a step of greedy requests in one call. More are better
# read by several threads, and then calls are not what a step costs.
_ONE_CALL = 1 << 18


class Stepped(NamedTuple):
    """What one step, or several, have done with the requests that denoise."""

    tokens: torch.Tensor  # int64 [requests, block], reported, left aligned
    num_tokens: torch.Tensor  # int64 [requests], how many of them
    # Batch row -> log-probabilities of the open block, for the requests that want them.
    logprobs: dict[int, LogprobsTensors]
    # Each tensor [requests, block]; None where no later step can ask for them.
    scores: Scores | None
    complete: torch.Tensor  # bool [requests], the block has no mask and is not held
    num_steps: torch.Tensor  # int64 [requests], how many they are

    def then(
        self, rows: np.ndarray[Any, Any], opened: torch.Tensor, later: "Stepped"
    ) -> "Stepped":
        """These steps and later ones of some of the requests, in the same forward.

        Args:
            rows: int64 [n] -> row here, the requests of the later step.
            opened: bool [n], whether it was one on a block that was not reported.
            later: the later step.
        """
        index = async_tensor_h2d(rows, device=self.tokens.device)
        tokens = torch.where(opened.unsqueeze(1), self.tokens[index], later.tokens)
        num_tokens = torch.where(opened, self.num_tokens[index], later.num_tokens)
        assert self.scores is not None and later.scores is not None
        scores = zip(self.scores, later.scores, strict=True)
        return Stepped(
            self.tokens.index_copy(0, index, tokens),
            self.num_tokens.index_copy(0, index, num_tokens),
            self.logprobs | later.logprobs,
            Scores(*(x.index_copy(0, index, y) for x, y in scores)),
            self.complete.index_copy(0, index, later.complete),
            self.num_steps.index_add(0, index, later.num_steps),
        )


class Stepper:
    """Carries out denoising steps.

    Args:
        base: vLLM's sampler, whose per-slot sampling parameters hold.
        model_state: canvases, strategies, grammars and so on of the slots.
    """

    def __init__(self, base: Sampler, model_state: "BlockDiffusionModelState") -> None:
        self.states = model_state.states
        self.canvas = self.states.canvas
        self.geometry = model_state.geometry
        self.first_alone = model_state.first_alone
        self.sampling_states = base.sampling_states
        self.biases = Biases(base, self.states)
        self.bad_words = self.biases.bad_words
        self.logprobs = BlockLogprobs(base.logprobs_mode == "raw_logits")
        self.grammars = model_state.grammars
        self.strategies = model_state.strategies
        self.openings = model_state.openings
        self.candidates = Candidates(self.sampling_states, self.states)
        self.tracer = model_state.tracer
        self.verifier = model_state.verifier
        self.drafts = model_state.drafts
        self.answers = model_state.answers
        # Only blocks on a CPU have that operator: no window, nothing on a GPU.
        has_operator = hasattr(self.states.ops, "greedy_step")
        self.one_call = has_operator and not self.first_alone

    def step(
        self,
        inputs: StepLogits,
        rows: DenoisingRows,
        closing: torch.Tensor | None = None,
        opened: torch.Tensor | None = None,
    ) -> Stepped:
        """Score, accept, write, commit.

        Args:
            inputs: logits; those of the mask are banned here, in place.
            rows: the requests.
            closing: bool [requests], blocks that are complete and wait for their
                report: nothing but that happens to them.
            opened: bool [requests], blocks behind one that this forward has reported:
                they are not reported, even if the step completes them.
        """
        length, mask_id = self.geometry
        ops, canvas = self.states.ops, self.canvas
        if self._is_one_call(inputs, rows):
            return self._greedy(inputs.logits, rows)
        if closing is not None:
            rows, whole = rows._replace(width=rows.width.where(~closing, 0)), rows.width
        active, masked = ops.open_blocks(canvas, rows.slots, rows.width, mask_id)
        if rows.forwarded is not None:
            masked = masked & rows.forwarded
        reach = self.answers.reach(rows, masked)

        # MASK is never a prediction: a revealed mask would loop forever.
        raw_logits = inputs.logits
        raw_logits[:, mask_id] = -torch.inf
        worded = self.bad_words.concern(rows)
        members = self.grammars.members(rows.slots_np)
        grammar = GrammarStep(self.grammars, members) if members else None
        groups = self.strategies.groups(rows.slots_np)
        fused = any("credit" in group.fillers for group in groups)
        wide = bool(groups) or inputs.drafted is not None
        logits, constraints = self.biases.apply(
            raw_logits, rows, active, worded, grammar, fused, wide
        )
        strategy, device = None, active.device
        if groups:
            strategy = StrategyStep(
                self.strategies,
                self.openings,
                groups,
                canvas,
                rows,
                active,
                masked,
                reach,
                self.sampling_states,
                None if grammar is None else grammar.first_live(len(active), device),
            )
            strategy.read(logits)
        scores = self.candidates.score(
            logits,
            rows.start,
            rows.slots_np,
            rows.slots,
            known=None if strategy is None else strategy.known,
            constraints=constraints,
            read=rows.read,
        )
        accepted = ops.accept(
            canvas,
            self.states.strategy,
            rows.slots,
            rows.width,
            masked if reach is None else reach,
            scores.confidence,
            scores.order,
        )
        before, early, hold, wait, checked = active, None, None, None, None
        if strategy is not None:
            before, scores, accepted, early, hold = strategy.decide(scores, accepted)
        if self.first_alone:
            alone = first_alone(masked, canvas.step[rows.slots])
            leading = alone[:, :1]
            accepted = torch.where(leading, alone, accepted)
            masked = masked & ~leading
        if inputs.drafted is not None:
            verification = VerificationStep(self, inputs.drafted, rows, worded)
            choice = Choice(before, scores, accepted)
            (before, scores, accepted), wait, checked = verification.decide(
                active, masked, logits, choice
            )
            rows = rows._replace(width=rows.width.where(~wait, 0))
        if strategy is not None:
            strategy.remember(wait)
        if worded:
            accepted = self.bad_words.withdraw(accepted, scores, before, rows)
        if grammar is None:
            after = torch.where(accepted, scores.tokens, before)
            done = Unmasked(after, scores.tokens, accepted, rows.width, [])
        else:
            temperature = self.sampling_states.temperature.np[rows.slots_np]
            done = grammar.verify(before, scores, accepted, rows.width, temperature)
        if self.verifier.adaptive and opened is None:
            unmasked = self.verifier.num_unmasked(done.accepted)
            self.grammars.counters.add("speculation_tokens_unmasked", unmasked)
        num_fixed = canvas.num_fixed[rows.slots]
        fresh, chosen = done.accepted, done.tokens
        if early is not None:
            # Seeded and edited tokens are told as well.
            fresh = fresh | early | (done.active != active)
            chosen = torch.where(done.active == mask_id, done.tokens, done.active)
        logprobs = self.logprobs.collect(
            raw_logits,
            chosen,
            fresh,
            num_fixed,
            rows,
            self.sampling_states.num_logprobs[rows.slots_np],
            opened,
        )
        width = done.width
        following = None
        if strategy is not None:
            hold = strategy.held(hold, done.active, grammar)
            hold = hold if wait is None else hold & ~wait
            width = torch.where(hold, 0, width)
            following = self._next_blocks(rows, strategy, inputs, opened)
        if closing is not None:
            width = width.where(~closing, whole)
        tokens, num_tokens, complete = self._close(rows, width, done.active, opened)
        self.answers.observe(rows, tokens, num_tokens)
        if self.tracer.concern(rows):
            self.tracer.observe(
                rows,
                active,
                done.active,
                scores,
                checked,
                opened is not None,
                done.width if closing is None else done.width.where(~closing, whole),
                closing,
                num_fixed,
                num_tokens,
                self.grammars,
                following,
            )
        if strategy is not None:
            # A block without a row does not count the step; a held one had its rows.
            canvas.step[rows.slots] += hold
            if following is not None:
                following.write()
        for row in done.failed:
            # The mask is never an output: the scheduler ends the request with an
            # error when it meets one.
            tokens[row, 0] = mask_id
            num_tokens[row] = 1
        once = torch.ones_like(num_tokens)
        return Stepped(tokens, num_tokens, logprobs, scores, complete, once)

    def _is_one_call(self, inputs: StepLogits, rows: DenoisingRows) -> bool:
        """Whether all that the step does is done by one operator."""
        return (
            self.one_call
            and inputs.logits.numel() <= _ONE_CALL
            and inputs.drafted is None
            and rows.forwarded is None
            and bool(self.strategies.greedy[rows.slots_np].all())
            and not self.grammars.members(rows.slots_np)
        )

    def _greedy(self, logits: torch.Tensor, rows: DenoisingRows) -> Stepped:
        tokens, num_tokens = self.states.ops.greedy_step(
            self.canvas,
            self.states.strategy,
            rows.slots,
            rows.width,
            logits,
            rows.read,
            self.geometry.mask_token_id,
        )
        complete = self.canvas.pending[rows.slots]
        once = torch.ones_like(num_tokens)
        return Stepped(tokens, num_tokens, {}, None, complete, once)

    def open_blocks(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Open blocks and their masked positions, each [requests, block].

        Args:
            slots: int64 [requests] -> request slot, of whole blocks.
        """
        length, mask_id = self.geometry
        width = torch.full_like(slots, length)
        return self.states.ops.open_blocks(self.canvas, slots, width, mask_id)

    def _close(
        self,
        rows: DenoisingRows,
        width: torch.Tensor,
        after: torch.Tensor,
        opened: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Write the blocks; report those that are complete.

        Returns:
            Reported tokens int64 [requests, block], their number int64 [requests], and
            whether the blocks are complete, reported or not, bool [requests].
        """
        mask_id, canvas = self.geometry.mask_token_id, self.canvas
        before = None if opened is None else self.states.gather(rows.slots)
        tokens, num_tokens = self.states.ops.close_blocks(
            canvas, rows.slots, width, after, mask_id
        )
        complete = canvas.pending[rows.slots]
        if len(self.verifier.now):
            self.verifier.reported(rows.slots, complete)
        if opened is not None and before is not None:
            stay(canvas, rows.slots, before, after, width > 0, opened)
            num_tokens = num_tokens.where(~opened, 0)
        return tokens, num_tokens, complete

    def _next_blocks(
        self,
        rows: DenoisingRows,
        strategy: StrategyStep,
        inputs: StepLogits,
        opened: torch.Tensor | None,
    ) -> NextBlocks | None:
        """What follows the open blocks where that is more than masks."""
        opens = self.strategies.opens(rows.slots_np)
        if opened is not None and opens.any():
            # They stay where the block behind a reported one has its place.
            opens &= ~opened.cpu().numpy()
        if not opens.any():
            return None
        chosen = np.flatnonzero(opens)
        following = NextBlocks(self.openings, self.canvas, rows, chosen, rows.start)
        if rows.ahead is not None:
            assert inputs.ahead is not None
            length, mask_id = self.geometry
            slots_np = rows.slots_np[rows.ahead.rows]
            logits = inputs.ahead.float()
            logits[:, mask_id] = -torch.inf
            self.grammars.silence(logits, slots_np)
            index = async_tensor_h2d(rows.ahead.rows, device=logits.device)
            start = rows.start[index] + length
            scores = self.candidates.score(
                logits, start, slots_np, rows.slots[index], AHEAD_STEPS
            )
            following.unmask(
                np.searchsorted(chosen, rows.ahead.rows),
                rows.ahead.width,
                scores,
                self.strategies.threshold_ahead(slots_np),
            )
        return following
