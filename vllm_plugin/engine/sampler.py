# SPDX-License-Identifier: Apache-2.0
"""The sampler: one denoising step for every request that denoises."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_unmask.engine.bad_words import BadWords
from vllm_unmask.engine.candidates import AHEAD_STEPS, Candidates
from vllm_unmask.engine.grammar import Grammars
from vllm_unmask.engine.grammar_step import GrammarStep, Unmasked
from vllm_unmask.engine.logprobs import BlockLogprobs
from vllm_unmask.engine.openings import NextBlocks
from vllm_unmask.engine.strategy_step import StrategyStep

if TYPE_CHECKING:
    from vllm_unmask.engine.model_state import BlockDiffusionModelState, DenoisingRows

# What vLLM's runner reads of a sampler that keeps no penalty counts.
_NO_PENALTIES = SimpleNamespace(output_bin_counts=None)


def _place(
    values: torch.Tensor, index: np.ndarray[Any, Any], batch: torch.Tensor
) -> torch.Tensor:
    """``batch`` with ``values`` at ``index``, its rows of the denoising requests.

    In most steps those are all, in order, and nothing is left of ``batch``.
    """
    values = values.to(batch.dtype)
    if len(index) < len(batch):
        rows = async_tensor_h2d(index, device=batch.device, dtype=torch.int64)
        batch[rows] = values
        return batch
    return values


class BlockDiffusionSampler:
    """Replaces vLLM's sampler through ``ModelState.custom_sampler``.

    Sampling parameters and logit biases stay in vLLM's own per-slot states;
    the canvas and the strategy come from ``CanvasStates``.
    """

    penalties_state = _NO_PENALTIES

    def __init__(self, base: Sampler, model_state: "BlockDiffusionModelState") -> None:
        self.base = base
        self.model_state = model_state
        self.states = model_state.states
        self.geometry = model_state.geometry
        self.compute_nans = base.compute_nans
        self.sampling_states = base.sampling_states
        self.logit_bias = next(
            processor
            for processor in base.logits_processors
            if isinstance(processor, LogitBiasState)
        )
        self.has_staged_writes = False
        self.bad_words = BadWords(self.states, base.req_states)
        self.logprobs = BlockLogprobs(base.logprobs_mode == "raw_logits")
        self.grammars: Grammars = model_state.grammars
        self.strategies = model_state.strategies
        self.openings = model_state.openings
        self.candidates = Candidates(self.sampling_states, self.states)
        self.tracer = model_state.tracer

    def add_request(self, req_index: int, sampling_params: SamplingParams) -> None:
        self.sampling_states.add_request(req_index, sampling_params)
        self.logit_bias.add_request(req_index, sampling_params)
        self.logprobs.forget(req_index)
        self.bad_words.add_request(req_index, sampling_params.bad_words_token_ids)
        self.has_staged_writes = True

    def apply_staged_writes(self) -> None:
        # The runner calls this every step; only new requests write.
        if self.has_staged_writes:
            self.sampling_states.apply_staged_writes()
            self.logit_bias.apply_staged_writes()
            self.has_staged_writes = False

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        num_reqs = input_batch.num_reqs
        length = self.geometry.block_length
        # A prefill that ends inside a block goes back to the block's start: the
        # tail is forwarded again with the first canvas.
        num_rejected = (input_batch.seq_lens[:num_reqs] % length).to(torch.int32)
        tokens = torch.zeros(
            (num_reqs, length), dtype=torch.int64, device=logits.device
        )
        num_sampled = torch.zeros_like(num_rejected)
        num_nans = None
        logprobs = None
        rows = self.model_state.denoising
        if rows is not None:
            index = rows.batch_index
            if self.compute_nans:
                nans = logits[: len(index) * length].isnan()
                nans = nans.view(len(index), -1).sum(dim=1)
                num_nans = _place(nans, index, torch.zeros_like(num_rejected))
            reported, num_reported, logprobs = self._denoise(logits, input_batch, rows)
            tokens = _place(reported, index, tokens)
            num_sampled = _place(num_reported, index, num_sampled)
            num_rejected = _place(rows.num_open, index, num_rejected)
        return SamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _denoise(
        self, logits: torch.Tensor, input_batch: InputBatch, rows: "DenoisingRows"
    ) -> tuple[torch.Tensor, torch.Tensor, LogprobsTensors | None]:
        """One denoising step of the active blocks: score, accept, write, commit.

        Args:
            logits: [requests * block, vocab], the active blocks' rows.
            input_batch: vLLM's batch.
            rows: which of its requests denoise.

        Returns:
            Reported tokens int64 [requests, block], left aligned, and their number
            int64 [requests]; log-probabilities.
        """
        mask_id = self.geometry.mask_token_id
        ops, canvas = self.states.ops, self.states.canvas
        active, masked = ops.open_blocks(canvas, rows.slots, rows.width, mask_id)
        num_rows = active.numel()

        # MASK is never a prediction: a revealed mask would loop forever.
        logits[:, mask_id] = -torch.inf
        positions = input_batch.positions[input_batch.logits_indices]
        ahead_logits, ahead_positions = logits[num_rows:], positions[num_rows:]
        raw_logits, positions = logits[:num_rows], positions[:num_rows]
        worded = self.bad_words.concern(rows)
        members = self.grammars.members(rows.slots_np)
        grammar = GrammarStep(self.grammars, members) if members else None
        groups = self.strategies.groups(rows.slots_np)
        fused = any("credit" in group.fillers for group in groups)
        logits = self._apply_biases(
            raw_logits, positions, rows, active, worded, grammar, fused
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
                positions,
                self.sampling_states,
                None if grammar is None else grammar.first_live(len(active), device),
            )
            strategy.read(logits)
        scores = self.candidates.score(
            logits,
            positions,
            rows.slots_np,
            rows.slots,
            known=None if strategy is None else strategy.known,
        )
        accepted = ops.accept(
            canvas,
            self.states.strategy,
            rows.slots,
            rows.width,
            masked,
            scores.confidence,
            scores.order,
        )
        before, opened = active, None
        if strategy is not None:
            before, scores, accepted, opened, hold = strategy.decide(scores, accepted)
        if worded:
            accepted = self.bad_words.withdraw(accepted, scores, before, rows)
        if grammar is None:
            after = torch.where(accepted, scores.tokens, before)
            step = Unmasked(after, scores.tokens, accepted, rows.width, [])
        else:
            temperature = self.sampling_states.temperature.np[rows.slots_np]
            step = grammar.verify(before, scores, accepted, rows.width, temperature)
        num_fixed = canvas.num_fixed[rows.slots]
        fresh, chosen = step.accepted, step.tokens
        if opened is not None:
            # Seeded and edited tokens are told as well.
            fresh = fresh | opened | (step.active != active)
            chosen = torch.where(step.active == mask_id, step.tokens, step.active)
        logprobs = self.logprobs.collect(
            raw_logits,
            chosen,
            fresh,
            num_fixed,
            rows,
            self.sampling_states.num_logprobs[rows.slots_np],
            input_batch.num_reqs,
        )
        width = step.width
        following = None
        if strategy is not None:
            hold = strategy.held(hold, step.active, grammar)
            width = torch.where(hold, 0, width)
            following = self._next_blocks(rows, strategy, ahead_logits, ahead_positions)
        tokens, num_tokens = ops.close_blocks(
            canvas, rows.slots, width, step.active, mask_id
        )
        if self.tracer.concern(rows):
            self.tracer.observe(
                rows,
                active,
                step.active,
                scores.confidence,
                step.width,
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
        for row in step.failed:
            # The mask is never an output: the scheduler ends the request with an
            # error when it meets one.
            tokens[row, 0] = mask_id
            num_tokens[row] = 1
        return tokens, num_tokens, logprobs

    def _next_blocks(
        self,
        rows: "DenoisingRows",
        strategy: StrategyStep,
        logits: torch.Tensor,
        positions: torch.Tensor,
    ) -> NextBlocks | None:
        """What follows the open blocks where that is more than masks.

        Args:
            rows: the requests that denoise.
            strategy: their step.
            logits: [requests that look ahead * block, vocab], their next blocks.
            positions: int64 [requests that look ahead * block], absolute.
        """
        opens = self.strategies.opens(rows.slots_np)
        if not opens.any():
            return None
        chosen = np.flatnonzero(opens)
        following = NextBlocks(
            self.openings, self.states.canvas, rows, chosen, strategy.start
        )
        if rows.ahead is not None:
            slots_np = rows.slots_np[rows.ahead.rows]
            logits = logits.float()
            self.grammars.silence(logits, slots_np)
            slots = rows.slots[async_tensor_h2d(rows.ahead.rows, device=logits.device)]
            scores = self.candidates.score(
                logits, positions, slots_np, slots, AHEAD_STEPS
            )
            following.unmask(
                np.searchsorted(chosen, rows.ahead.rows),
                rows.ahead.width,
                scores,
                self.strategies.threshold_ahead(slots_np),
            )
        return following

    def _apply_biases(
        self,
        logits: torch.Tensor,
        positions: torch.Tensor,
        rows: "DenoisingRows",
        active: torch.Tensor,
        worded: bool,
        grammar: GrammarStep | None,
        fused: bool,
    ) -> torch.Tensor:
        """Logit bias, allowed tokens, min_tokens, bad words, grammar, in float32."""
        biased = self.logit_bias.use_logit_bias[rows.slots_np].any()
        if not biased and not worded and grammar is None and not fused:
            return logits.float()
        # A copy: log-probabilities are reported from the model's own logits.
        logits = torch.empty_like(logits, dtype=torch.float32).copy_(logits)
        if biased:
            length = self.geometry.block_length
            slots = rows.slots.repeat_interleave(length)
            context = LogitsContext(
                expanded_idx_mapping=slots,
                idx_mapping=rows.slots,
                idx_mapping_np=rows.slots_np,
                expanded_local_pos=torch.zeros_like(slots, dtype=torch.int32),
                input_ids=active.reshape(-1),
                # vLLM's row i scores token i + 1, ours scores token i.
                pos=positions - 1,
                seq_lens_upper_bound_np=np.zeros(0, dtype=np.int32),
            )
            logits = self.logit_bias.apply(logits, context)
        if worded:
            self.bad_words.ban(logits, active, rows)
        if grammar is not None:
            grammar.constrain(logits)
        return logits
