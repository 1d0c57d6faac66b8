# SPDX-License-Identifier: Apache-2.0
"""ModelState of the block-causal diffusion families."""

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
from vllm_unmask.engine.sampler import BlockDiffusionSampler
from vllm_unmask.engine.states import BlockGeometry, CanvasStates
from vllm_unmask.options import (
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
        self.denoising: DenoisingRows | None = None

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        return BlockDiffusionSampler(sampler, self), None

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        # Rows are rebuilt every step, so a captured attention call would read
        # stale metadata; the forward still runs as piecewise graphs.
        return AttentionCGSupport.NEVER, "block-causal virtual rows"

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        params = new_req_data.sampling_params
        options = parse_request_options(
            params.extra_args if params is not None else None,
            self.default_options,
            self.geometry.block_length,
        )
        assert new_req_data.prefill_token_ids is not None
        self.states.add_request(req_index, new_req_data.prefill_token_ids, options)

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
        slots = async_tensor_h2d(slots_np, device=self.device, dtype=torch.int64)
        query_len = input_batch.num_scheduled_tokens[batch_index]
        query_start = input_batch.query_start_loc_np[batch_index]

        local = np.arange(2 * length) < query_len[:, None]
        source = np.flatnonzero(local)
        target = (query_start[:, None] + np.arange(2 * length))[local]
        ids = self.states.canvas.ids[slots].view(-1)
        input_batch.input_ids[
            async_tensor_h2d(target, device=self.device, dtype=torch.int64)
        ] = ids[async_tensor_h2d(source, device=self.device, dtype=torch.int64)].to(
            input_batch.input_ids.dtype
        )

        offset = self.states.canvas.pending[slots] * length
        lens = async_tensor_h2d(query_len, device=self.device, dtype=torch.int64)
        start = async_tensor_h2d(query_start, device=self.device, dtype=torch.int64)
        column = offset.unsqueeze(1) + torch.arange(length, device=self.device)
        # A row past the query is never used (see width), but must be readable.
        column = torch.minimum(column, lens.unsqueeze(1) - 1)
        input_batch.logits_indices = (start.unsqueeze(1) + column).view(-1)
        self.denoising = DenoisingRows(
            batch_index, slots_np, slots, (lens - offset).clamp(0, length)
        )
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
