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

from vllm_unmask.decoding.bad_words import banned_tokens, conflicts
from vllm_unmask.decoding.scoring import ORDERS, SamplingRows, Scores, score
from vllm_unmask.engine.grammar import Grammars
from vllm_unmask.engine.grammar_step import GrammarStep, Unmasked
from vllm_unmask.engine.logprobs import BlockLogprobs

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
        # Request slot -> token sequences that must not appear in its output.
        self.bad_words: dict[int, list[list[int]]] = {}
        self.logprobs = BlockLogprobs(base.logprobs_mode == "raw_logits")
        self.grammars: Grammars = model_state.grammars

    def add_request(self, req_index: int, sampling_params: SamplingParams) -> None:
        self.sampling_states.add_request(req_index, sampling_params)
        self.logit_bias.add_request(req_index, sampling_params)
        self.logprobs.forget(req_index)
        self.bad_words.pop(req_index, None)
        if words := sampling_params.bad_words_token_ids:
            self.bad_words[req_index] = words
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
                nans = logits.isnan().view(len(index), -1).sum(dim=1)
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

        # MASK is never a prediction: a revealed mask would loop forever.
        logits[:, mask_id] = -torch.inf
        raw_logits = logits
        positions = input_batch.positions[input_batch.logits_indices]
        worded = not self.bad_words.keys().isdisjoint(rows.slots_np.tolist())
        members = self.grammars.members(rows.slots_np)
        grammar = GrammarStep(self.grammars, members) if members else None
        logits = self._apply_biases(logits, positions, rows, active, worded, grammar)
        scores = self._score(logits, positions, rows)
        accepted = ops.accept(
            canvas,
            self.states.strategy,
            rows.slots,
            rows.width,
            masked,
            scores.confidence,
            scores.order,
        )
        if worded:
            accepted = self._withdraw_bad_words(accepted, scores, active, rows)
        if grammar is None:
            after = torch.where(accepted, scores.tokens, active)
            step = Unmasked(after, scores.tokens, accepted, rows.width, [])
        else:
            temperature = self.sampling_states.temperature.np[rows.slots_np]
            step = grammar.verify(active, scores, accepted, rows.width, temperature)
        logprobs = self.logprobs.collect(
            raw_logits,
            step.tokens,
            step.accepted,
            canvas.num_fixed[rows.slots],
            rows,
            self.sampling_states.num_logprobs[rows.slots_np],
            input_batch.num_reqs,
        )
        tokens, num_tokens = ops.close_blocks(
            canvas, rows.slots, step.width, step.active, mask_id
        )
        for row in step.failed:
            # The mask is never an output: the scheduler ends the request with an
            # error when it meets one.
            tokens[row, 0] = mask_id
            num_tokens[row] = 1
        return tokens, num_tokens, logprobs

    def _apply_biases(
        self,
        logits: torch.Tensor,
        positions: torch.Tensor,
        rows: "DenoisingRows",
        active: torch.Tensor,
        worded: bool,
        grammar: GrammarStep | None,
    ) -> torch.Tensor:
        """Logit bias, allowed tokens, min_tokens, bad words, grammar, in float32."""
        biased = self.logit_bias.use_logit_bias[rows.slots_np].any()
        if not biased and not worded and grammar is None:
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
            self._ban_bad_words(logits, active, rows)
        if grammar is not None:
            grammar.constrain(logits)
        return logits

    def _score(
        self,
        logits: torch.Tensor,
        positions: torch.Tensor,
        rows: "DenoisingRows",
    ) -> Scores:
        """Scores of the active blocks, each tensor [requests, block]."""
        length, mask_id = self.geometry
        params = self.sampling_states
        temperature = params.temperature.np[rows.slots_np]
        sampled = bool(temperature.any())
        truncated = sampled and bool(
            (
                (temperature > 0)
                & (
                    (params.top_k.np[rows.slots_np] < params.vocab_size)
                    | (params.top_p.np[rows.slots_np] < 1)
                    | (params.min_p.np[rows.slots_np] > 0)
                )
            ).any()
        )
        orders_used = self.states.orders_used(rows.slots_np)
        plain = orders_used == {ORDERS.index("confidence")}
        sampling_rows = None
        slots = None
        if sampled or not plain:
            slots = rows.slots.repeat_interleave(length)
            sampling_rows = SamplingRows(
                params.temperature.gpu[slots],
                params.top_k.gpu[slots].to(torch.int64),
                params.top_p.gpu[slots],
                params.min_p.gpu[slots],
                params.seeds.gpu[slots],
                positions.to(torch.int64),
                self.states.canvas.step[slots],
            )
        flat = score(
            logits,
            sampling_rows,
            sampled=sampled,
            raw_confidence=None
            if slots is None
            else self.states.raw_confidence.gpu[slots],
            orders=None if slots is None else self.states.order.gpu[slots],
            orders_used=orders_used,
            truncated=truncated,
        )
        # A row in which everything is banned falls back to token 0. If that is the
        # mask, any other token will do: a revealed mask would never go away.
        tokens = torch.where(
            flat.tokens == mask_id, (mask_id + 1) % params.vocab_size, flat.tokens
        )
        return Scores(*(x.view(-1, length) for x in flat._replace(tokens=tokens)))

    def _output_before(self, slot: int) -> list[int]:
        """Output tokens already reported for a slot."""
        req_states = self.base.req_states
        start = int(req_states.prompt_len.np[slot])
        end = int(req_states.total_len.gpu[slot])
        return req_states.all_token_ids.gpu[slot, start:end].tolist()

    def _ban_bad_words(
        self, logits: torch.Tensor, active: torch.Tensor, rows: "DenoisingRows"
    ) -> None:
        """Ban, in place, each token that would complete a bad word by itself."""
        length, mask_id = self.geometry
        fixed = self.states.canvas.num_fixed
        for row, slot in enumerate(rows.slots_np.tolist()):
            if words := self.bad_words.get(slot):
                start = int(fixed[slot])
                context = self._output_before(slot)
                block = active[row, start : int(rows.width[row])].tolist()
                for column, token in banned_tokens(context, block, words, mask_id):
                    logits[row * length + start + column, token] = -torch.inf

    def _withdraw_bad_words(
        self,
        accepted: torch.Tensor,
        scores: Scores,
        active: torch.Tensor,
        rows: "DenoisingRows",
    ) -> torch.Tensor:
        """Take back the least sure position of every bad word formed jointly.

        One position alone cannot form a bad word (``_ban_bad_words``), so at
        least one accepted position is left.
        """
        mask_id = self.geometry.mask_token_id
        accepted = accepted.clone()
        for row, slot in enumerate(rows.slots_np.tolist()):
            if not (words := self.bad_words.get(slot)):
                continue
            start = int(self.states.canvas.num_fixed[slot])
            context = self._output_before(slot)
            block = torch.where(accepted[row], scores.tokens[row], active[row])
            for column in conflicts(
                context,
                block[start : int(rows.width[row])].tolist(),
                accepted[row, start:].tolist(),
                scores.confidence[row, start:].tolist(),
                words,
                mask_id,
            ):
                accepted[row, start + column] = False
        return accepted
