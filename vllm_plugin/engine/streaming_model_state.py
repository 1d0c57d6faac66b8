# SPDX-License-Identifier: Apache-2.0
"""ModelState of the families with causal attention and a streaming window."""

from collections import OrderedDict
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_unmask.decoding.streaming import close_windows, write_windows
from vllm_unmask.engine.attention import build_row_metadata
from vllm_unmask.engine.denoising import Stepper
from vllm_unmask.engine.model_state import BlockDiffusionModelState, DenoisingRows

if TYPE_CHECKING:
    from vllm_unmask.engine.logprobs import BlockLogprobs
    from vllm_unmask.engine.tracing import Record


class Left(NamedTuple):
    """What a request that left its slot had made of its window."""

    ids: torch.Tensor  # int64 [2 * W], a row of `Canvas.ids`
    step: torch.Tensor  # int64, a row of `Canvas.step`
    logprobs: LogprobsTensors | None
    trace: "Record | None"
    stalled: bool  # of its grammar


class StreamingStepper(Stepper):
    """Denoising steps after which a window moves on."""

    def _close(
        self,
        rows: DenoisingRows,
        width: torch.Tensor,
        after: torch.Tensor,
        opened: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, num_tokens, complete = super()._close(rows, width, after, opened)
        self.logprobs.slide(rows.slots_np, num_tokens)
        return tokens, num_tokens, complete


class StreamingModelState(BlockDiffusionModelState):
    """Feeds windows to the forward pass, in the order that causal attention needs.

    A query is ``[tokens whose KV is not final | window]``, the former known: the end
    of a prompt, or what the step before reported. A window's keys and values go to
    the slots of its rows, not of its positions, and the next query overwrites them.
    """

    stepper_cls = StreamingStepper

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: Any,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.grid = 1
        ops = self.states.ops
        self.states.ops = SimpleNamespace(
            open_blocks=ops.open_blocks, accept=ops.accept, close_blocks=close_windows
        )
        self.slots: dict[str, int] = {}  # request id -> slot
        self.left: OrderedDict[str, Left] = OrderedDict()
        self.logprobs: BlockLogprobs | None = None
        # Slot -> log-probabilities to go on with, once the sampler has taken it over.
        self.returned: dict[int, LogprobsTensors] = {}

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        ours, _ = super().custom_sampler(sampler)
        self.logprobs = ours.stepper.logprobs
        return ours, None

    def num_fixed(self, num_tokens: int, num_prompt: int) -> int:
        return 0

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        req_id = new_req_data.req_id
        self.slots[req_id] = req_index
        self.returned.pop(req_index, None)
        if (left := self.left.pop(req_id, None)) is None:
            return
        canvas = self.states.canvas
        canvas.ids[req_index], canvas.step[req_index] = left.ids, left.step
        if left.logprobs is not None:
            self.returned[req_index] = left.logprobs
        if left.trace is not None:
            self.tracer.records[req_index] = left.trace
        if (request := self.grammars.requests.get(req_index)) is not None:
            request.stalled = left.stalled

    def remove_request(self, req_id: str) -> None:
        """Forget a finished request; keep what a preempted one has decided."""
        slot = self.slots.pop(req_id, None)
        if slot is None:
            return
        request = self.grammars.requests.get(slot)
        super().remove_request(req_id)
        assert self.logprobs is not None
        canvas = self.states.canvas
        # Which of the two it is nobody says, so the oldest go.
        self.left[req_id] = Left(
            canvas.ids[slot].clone(),
            canvas.step[slot].clone(),
            self.logprobs.kept.get(slot),
            self.tracer.records.get(slot),
            request is not None and (request.state or request).stalled,
        )
        while len(self.left) > self.max_num_reqs:
            self.left.popitem(last=False)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        if self.returned:
            assert self.logprobs is not None
            self.logprobs.kept |= self.returned
            self.returned = {}

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """One causal row a request for the backend."""
        return build_row_metadata(
            input_batch,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            causal=True,
        )

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, Any]:
        """Write reported tokens and windows; choose the windows' rows for logits."""
        self.denoising = None
        num_drafts = input_batch.num_draft_tokens_per_req
        if num_drafts is None or not num_drafts.any():
            return {}
        length, mask_id = self.geometry
        batch_index = np.flatnonzero(num_drafts)
        slots_np = input_batch.idx_mapping_np[batch_index]
        query_len = input_batch.num_scheduled_tokens[batch_index]
        to_device = partial(async_tensor_h2d, device=self.device, dtype=torch.int64)
        slots, width = to_device(slots_np), to_device(num_drafts[batch_index])
        num_known = to_device(query_len - num_drafts[batch_index])
        query_start = to_device(input_batch.query_start_loc_np[batch_index])
        num_tokens = input_batch.num_tokens
        input_ids = input_batch.input_ids[:num_tokens]
        positions = input_batch.positions[:num_tokens]

        first_row = query_start + num_known
        start = positions[query_start] + num_known
        # Known tokens, of which a step has reported `length` at most. Where there are
        # none the window's first row stands in, and is written again.
        back = torch.arange(1, length + 1, device=self.device)
        back = torch.minimum(back, num_known.unsqueeze(1))
        place = (start.unsqueeze(1) - back).clamp(min=0)
        known = req_states.all_token_ids.gpu[slots.unsqueeze(1), place]
        input_ids[first_row.unsqueeze(1) - back] = known.to(input_ids.dtype)
        input_batch.logits_indices = write_windows(
            self.states.canvas.ids[slots, :length],
            mask_id,
            first_row,
            width,
            start,
            input_ids,
            positions,
        )
        self.denoising = DenoisingRows(
            batch_index, slots_np, slots, width, width, start, None, None
        )
        return {}
