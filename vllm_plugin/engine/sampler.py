# SPDX-License-Identifier: Apache-2.0
"""The sampler: denoising steps for every request that denoises."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_unmask.engine import logprobs
from vllm_unmask.engine.denoising import Stepped
from vllm_unmask.engine.rows import DenoisingRows, StepLogits
from vllm_unmask.engine.verification_step import Drafted

if TYPE_CHECKING:
    from vllm_unmask.engine.model_state import BlockDiffusionModelState

# Counters of what `Verifier.totals` adds up.
VERIFIED = (
    "speculation_verified",
    "speculation_tokens_drafted",
    "speculation_tokens_verified",
    "speculation_tokens_corrected",
)
# What vLLM's runner reads of a sampler that keeps no penalty counts.
_NO_PENALTIES = SimpleNamespace(output_bin_counts=None)


def _place(
    values: torch.Tensor, index: np.ndarray[Any, Any], batch: torch.Tensor
) -> torch.Tensor:
    """``batch`` with ``values`` at ``index``, its rows of the denoising requests."""
    rows = async_tensor_h2d(index, device=batch.device, dtype=torch.int64)
    batch[rows] = values.to(batch.dtype)
    return batch


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
        self.stepper = model_state.stepper_cls(base, model_state)
        self.has_staged_writes = False
        self.num_steps = 0

    def add_request(self, req_index: int, sampling_params: SamplingParams) -> None:
        stepper = self.stepper
        self.sampling_states.add_request(req_index, sampling_params)
        stepper.biases.add_request(req_index, sampling_params)
        stepper.logprobs.forget(req_index)
        self.has_staged_writes = True

    def apply_staged_writes(self) -> None:
        # The runner calls this every step; only new requests write.
        if self.has_staged_writes:
            self.sampling_states.apply_staged_writes()
            self.stepper.biases.logit_bias.apply_staged_writes()
            self.has_staged_writes = False

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        num_reqs = input_batch.num_reqs
        rows = self.model_state.denoising
        if rows is None:
            return self._prefilled(input_batch)
        nans = self._count_nans(logits, rows) if self.compute_nans else None
        stepped = self._denoise(logits, rows)
        self.stepper.tracer.end_forward(rows)
        self._count_verified(logits.is_cuda)
        rolled_back = self.model_state.num_rolled_back(rows, stepped)
        output = SamplerOutput(
            sampled_token_ids=stepped.tokens,
            logprobs_tensors=logprobs.concatenate(stepped.logprobs, num_reqs),
            num_nans=None if nans is None else nans.to(torch.int32),
            num_sampled=stepped.num_tokens.to(torch.int32),
            num_rejected=rolled_back.to(torch.int32),
        )
        index = rows.batch_index
        if len(index) == num_reqs:
            return output
        batch = self._prefilled(input_batch)
        for name in ("sampled_token_ids", "num_sampled", "num_rejected"):
            values = _place(getattr(output, name), index, getattr(batch, name))
            setattr(output, name, values)
        if output.num_nans is not None:
            none = torch.zeros_like(batch.num_sampled)
            output.num_nans = _place(output.num_nans, index, none)
        return output

    def _prefilled(self, input_batch: InputBatch) -> SamplerOutput:
        """Output of a batch in which no request denoises."""
        num_reqs = input_batch.num_reqs
        # A prefill that ends inside a block goes back to the block's start: the
        # tail is forwarded again with the first canvas.
        num_rejected = input_batch.seq_lens[:num_reqs] % self.model_state.grid
        num_rejected = num_rejected.to(torch.int32)
        shape = num_reqs, self.geometry.block_length
        return SamplerOutput(
            sampled_token_ids=torch.zeros(
                shape, dtype=torch.int64, device=num_rejected.device
            ),
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=torch.zeros_like(num_rejected),
            num_rejected=num_rejected,
        )

    def _count_verified(self, waits: bool) -> None:
        """Tell the counters; not in every step if that waits for the device."""
        verifier = self.model_state.verifier
        totals = verifier.totals
        self.num_steps += 1
        due = self.num_steps % 64 == 0 if waits else len(verifier.now) > 0
        if verifier.slots and due:
            for name, count in zip(VERIFIED, totals.tolist(), strict=True):
                self.stepper.grammars.counters.add(name, count)
            totals.zero_()

    def _num_open(self, rows: DenoisingRows) -> int:
        """Logits rows of the open blocks."""
        if rows.read is not None:
            return len(rows.read)
        return len(rows.slots_np) * self.geometry.block_length

    def _count_nans(self, logits: torch.Tensor, rows: DenoisingRows) -> torch.Tensor:
        """NaNs in the logits of each open block, int64 [requests]."""
        num = logits[: self._num_open(rows)].isnan().sum(dim=1)
        if rows.read is not None:
            size = len(rows.slots_np) * self.geometry.block_length
            num = num.new_zeros(size).index_copy_(0, rows.read, num)
        return num.view(len(rows.slots_np), -1).sum(dim=1)

    def _denoise(self, logits: torch.Tensor, rows: DenoisingRows) -> Stepped:
        """The denoising steps of one forward pass.

        Args:
            logits: [rows, vocab]: the open blocks, the next blocks of requests that
                look ahead, the windows of requests that speculate.
            rows: the requests that denoise.
        """
        length = self.geometry.block_length
        end = ahead = self._num_open(rows)
        if rows.ahead is not None:
            ahead += len(rows.ahead.rows) * length
        speculating, drafts = rows.speculating, self.model_state.drafts
        inputs = StepLogits(
            logits[:end], logits[end:ahead], self._drafted(logits[ahead:], rows)
        )
        stepped = self.stepper.step(inputs, rows, drafts.take_closing(rows.slots))
        if speculating is None:
            return stepped
        return drafts.follow(self.stepper, speculating, logits[ahead:], rows, stepped)

    def _drafted(self, logits: torch.Tensor, rows: DenoisingRows) -> Drafted | None:
        """What the windows of requests that verify say.

        Args:
            logits: [rows, vocab], of the windows.
            rows: the requests that denoise.
        """
        verifier, device = self.model_state.verifier, logits.device
        mine = verifier.now
        if not len(mine):
            return None
        length, speculating = self.geometry.block_length, rows.speculating
        last = self.model_state.drafts.to_verify - 1
        none = torch.zeros(len(mine), dtype=torch.bool, device=device)
        ids = torch.zeros((len(mine), length), dtype=torch.int64, device=device)
        if speculating is None or speculating.width <= last:
            return Drafted(mine, none, ids, None)
        place = np.searchsorted(speculating.rows, mine)
        index = async_tensor_h2d(place, device=device, dtype=torch.int64)
        windows = logits.view(len(speculating.rows), -1, length, logits.shape[1])
        candidates = speculating.windows.candidates
        return Drafted(
            mine,
            candidates.count[index] == last + 1,
            candidates.ids[index, 0],
            windows[index, last].flatten(0, 1),
        )
