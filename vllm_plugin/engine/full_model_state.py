# SPDX-License-Identifier: Apache-2.0
"""ModelState of the families in which every position sees every other one."""

from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_unmask.decoding.canvas import active_ids
from vllm_unmask.engine.attention import build_row_metadata
from vllm_unmask.engine.full_scheduler import refresh_period
from vllm_unmask.engine.model_state import BlockDiffusionModelState
from vllm_unmask.engine.rows import DenoisingRows
from vllm_unmask.options import DecodingOptions


class FullAttentionModelState(BlockDiffusionModelState):
    """Feeds whole canvases to the forward pass (`full_scheduler` says what a step is).

    Every request of a step denoises, and its query goes from position 0 or from the
    open block to some position behind that block.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: Any,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        # Request slot -> end of its canvas in the last full step.
        self.canvas_end = np.zeros(self.max_num_reqs, np.int64)
        # Request slot -> steps from one full step to the next, and those since the
        # open block's first; int64 on the device.
        self.period = torch.ones(self.max_num_reqs, dtype=torch.int64, device=device)
        self.num_steps = torch.zeros_like(self.period)

    def num_fixed(self, num_tokens: int, num_prompt: int) -> int:
        return 0

    def _admit(self, slot: int, options: DecodingOptions) -> None:
        self.period[slot] = refresh_period(options)
        self.num_steps[slot] = 0

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
        """One row a request for the backend: its query sees all of its canvas."""
        beyond = self._beyond(input_batch)
        return build_row_metadata(
            input_batch,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            causal=False,
            beyond=beyond,
        )

    def _beyond(self, batch: InputBatch) -> np.ndarray[Any, Any] | None:
        """Canvas positions behind each query, int64 [requests]; None if nowhere any."""
        if batch.num_draft_tokens_per_req is None:  # a dummy batch
            return None
        length = batch.num_scheduled_tokens.astype(np.int64)
        start, slots = batch.num_computed_tokens_np, batch.idx_mapping_np
        full = start == 0
        self.canvas_end[slots[full]] = length[full]
        beyond = np.maximum(self.canvas_end[slots] - start - length, 0)
        return beyond if beyond.any() else None

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, Any]:
        """Write known tokens, open blocks and masks; choose the open blocks' rows."""
        self.denoising = None
        if self.carry is not None:
            self.carry.read_prefills(input_batch)
        if input_batch.num_draft_tokens_per_req is None:
            return {}
        length, mask_id = self.geometry
        slots = input_batch.idx_mapping
        bounds = input_batch.query_start_loc[: len(slots) + 1].long()
        first, end = bounds[:-1], bounds[1:]
        num_tokens = input_batch.num_tokens
        positions = input_batch.positions[:num_tokens].long()
        # Reported tokens are whole blocks, so the open one lies behind the known ones.
        start = req_states.total_len.gpu[slots].long()
        open_row = first + start - positions[first]
        num_open = end - open_row
        query = torch.repeat_interleave(end - first, output_size=num_tokens)
        column = torch.arange(num_tokens, device=self.device) - open_row[query]
        known = req_states.all_token_ids.gpu[slots[query], positions]
        opened = active_ids(self.states.gather(slots))
        ids = opened[query, column.clamp(0, length - 1)]
        ids = torch.where(column < length, ids, mask_id)
        ids = torch.where(column < 0, known, ids)
        input_batch.input_ids[:num_tokens] = ids
        if self.openings.seeds:
            self._write_seeds(input_batch, start)

        columns = torch.arange(length, device=self.device)
        rows = torch.minimum(open_row.unsqueeze(1) + columns, end.unsqueeze(1) - 1)
        logits_rows = [rows.view(-1)]
        if self.carry is not None:
            none = torch.zeros_like(open_row)
            logits_rows = self.carry.read_canvases(
                slots, open_row - first, open_row, none, logits_rows, None
            )
        (input_batch.logits_indices,) = logits_rows
        self.denoising = DenoisingRows(
            np.arange(len(slots)),
            input_batch.idx_mapping_np,
            slots,
            num_open.clamp(0, length),
            num_open,
            start,
            None,
            None,
        )
        return {}

    def _write_seeds(self, batch: InputBatch, start: torch.Tensor) -> None:
        """Put the seeds of later blocks where they are seen already.

        Args:
            batch: vLLM's.
            start: int64 [requests], absolute position of the open blocks.
        """
        for index, slot in enumerate(batch.idx_mapping_np.tolist()):
            if slot not in self.openings.seeds:
                continue
            seeds, _, num_prompt = self.openings.seeds[slot]
            behind = int(start[index]) + self.geometry.block_length
            seeds = seeds[behind - num_prompt :]
            end = int(batch.query_start_loc_np[index + 1])
            num_behind = int(batch.positions[end - 1]) + 1 - behind
            rows = batch.input_ids[end - max(num_behind, 0) : end]
            rows[: len(seeds)] = seeds[: len(rows)]

    def num_rolled_back(
        self, rows: DenoisingRows, complete: torch.Tensor
    ) -> torch.Tensor:
        """Back to the open block, or to position 0 where the next step is full."""
        num_steps = torch.where(complete, 0, self.num_steps[rows.slots] + 1)
        self.num_steps[rows.slots] = num_steps
        full = num_steps % self.period[rows.slots] == 0
        return rows.num_open + torch.where(full, rows.start, 0)
