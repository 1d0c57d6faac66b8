# SPDX-License-Identifier: Apache-2.0
"""ModelState of the block-causal diffusion families."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_unmask.engine.attention import build_block_causal_metadata
from vllm_unmask.engine.grammar import Grammars
from vllm_unmask.engine.sampler import BlockDiffusionSampler
from vllm_unmask.engine.states import BlockGeometry, CanvasStates
from vllm_unmask.options import (
    GRAMMAR_KEY,
    DecodingOptions,
    parse_request_options,
    server_options_from_dict,
)


class DenoisingRows(NamedTuple):
    """The requests of a step that denoise, and the logits rows they read."""

    batch_index: np.ndarray[Any, Any]  # int64 [requests] -> row of the batch
    slots_np: np.ndarray[Any, Any]  # int64 [requests] -> request slot
    slots: torch.Tensor  # int64 [requests] -> request slot
    width: torch.Tensor  # int64 [requests], positions of the active block, 0..L
    num_open: torch.Tensor  # int64 [requests], rows whose KV this step leaves open


class BlockDiffusionModelState(ModelState):
    """Feeds canvases to the forward pass and block-causal rows to attention.

    A request without scheduled draft tokens is prefilling; one with them is
    denoising, and its query is its canvas, cut to what the scheduler gave it.
    """

    # All output comes from the canvas, which vLLM counts as draft tokens.
    num_new_sampled_tokens_per_step = 0

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: Any,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        served = self.model_config.hf_config.unmask_served
        self.geometry = BlockGeometry(served["block_length"], served["mask_token_id"])
        self.default_options: DecodingOptions = server_options_from_dict(
            served["server"]
        ).decoding
        self.states = CanvasStates(self.max_num_reqs, self.geometry, device)
        self.grammars = Grammars(vllm_config, self.geometry)
        self.asynchronous = vllm_config.scheduler_config.async_scheduling
        self.denoising: DenoisingRows | None = None

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        return BlockDiffusionSampler(sampler, self), None

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        # Rows are rebuilt every step, so a captured attention call would read
        # stale metadata; the forward still runs as piecewise graphs.
        return AttentionCGSupport.NEVER, "block-causal virtual rows"

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        params = new_req_data.sampling_params
        extra_args = dict((params and params.extra_args) or {})
        record = extra_args.pop(GRAMMAR_KEY, None)
        options = parse_request_options(
            extra_args, self.default_options, self.geometry.block_length
        )
        token_ids = new_req_data.prefill_token_ids
        assert token_ids is not None
        self.states.add_request(req_index, token_ids, options)
        num_prompt = len(new_req_data.prompt_token_ids or ())
        self.grammars.add_request(
            req_index, new_req_data.req_id, record, token_ids, num_prompt
        )

    def remove_request(self, req_id: str) -> None:
        self.grammars.remove_request(req_id)

    def apply_staged_writes(self) -> None:
        self.states.apply_staged_writes()

    def prepare_inputs_embeds(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],
        input_batch: InputBatch,
        req_states: RequestState,
    ) -> torch.Tensor | None:
        return None

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {}

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, Any]:
        """Write the canvases to ``input_ids`` and choose the logits rows.

        A canvas follows the part of its prompt that the step computes, if any.
        Logits are computed for the active block alone: neither for a block that
        is complete nor for masks that nothing reads yet.
        """
        self.denoising = None
        num_drafts = input_batch.num_draft_tokens_per_req
        if num_drafts is None or not num_drafts.any():
            return {}
        length = self.geometry.block_length
        batch_index = np.flatnonzero(num_drafts)
        slots_np = input_batch.idx_mapping_np[batch_index]
        query_len = input_batch.num_scheduled_tokens[batch_index]
        # With a step in flight, known tokens in front of the drafts say nothing:
        # they may be the drafts of that step.
        known = query_len - num_drafts[batch_index]
        lead = np.zeros_like(known) if self.asynchronous else known // length * length
        to_device = partial(async_tensor_h2d, device=self.device, dtype=torch.int64)
        slots = to_device(slots_np)
        width, num_open, input_batch.logits_indices = self.states.ops.write_inputs(
            self.states.canvas,
            slots,
            to_device(input_batch.query_start_loc_np[batch_index]),
            to_device(query_len),
            to_device(lead),
            input_batch.input_ids,
        )
        self.denoising = DenoisingRows(batch_index, slots_np, slots, width, num_open)
        return {}

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
        return build_block_causal_metadata(
            input_batch,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            self.geometry.block_length,
        )
