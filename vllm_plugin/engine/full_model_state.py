# SPDX-License-Identifier: Apache-2.0
"""ModelState of the families in which every position sees every other one."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_unmask.decoding.canvas import active_ids
from vllm_unmask.engine.attention import build_row_metadata
from vllm_unmask.engine.denoising import Stepped
from vllm_unmask.engine.full_scheduler import plan_canvas
from vllm_unmask.engine.full_windows import CanvasDrafts, CanvasWindows
from vllm_unmask.engine.model_state import BlockDiffusionModelState
from vllm_unmask.engine.rows import DenoisingRows
from vllm_unmask.options import DecodingOptions


class FullAttentionModelState(BlockDiffusionModelState):
    """Feeds whole canvases to the forward pass (`full_scheduler` says what a step is).

    Every request of a step denoises, and its query goes from position 0 or from the
    open block to some position behind that block. Windows may follow it.
    """

    drafts_cls = CanvasDrafts
    drafts: CanvasDrafts

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
        # Request slot -> steps that the open block has had; int64 on the device.
        self.num_steps = torch.zeros(
            self.max_num_reqs, dtype=torch.int64, device=device
        )
        self.canvases: CanvasWindows | None = None
        # vLLM's draft tokens of all slots, in a step whose candidates are asked for.
        self.told: torch.Tensor | None = None

    def num_fixed(self, num_tokens: int, num_prompt: int) -> int:
        return 0

    def _admit(
        self,
        slot: int,
        options: DecodingOptions,
        num_prompt: int,
        max_tokens: int | None,
    ) -> None:
        context = self.model_config.max_model_len
        length = self.geometry.block_length
        most = context if max_tokens is None else max_tokens
        self.drafts.plan(slot, plan_canvas(options, num_prompt, most, length, context))
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
        self.canvases = windows = self.drafts.find_windows(input_batch)
        lengths = input_batch.num_scheduled_tokens.astype(np.int64)
        if windows is not None:
            lengths[windows.request] = windows.length
        beyond = self._beyond(input_batch, lengths)
        if windows is not None:
            if beyond is not None:
                windows = windows._replace(beyond=beyond[windows.request])
            ends = input_batch.query_start_loc_np[windows.request + 1]
            for first, end in zip(windows.row, ends, strict=True):
                # Nothing is written there, nor is there a place.
                slot_mappings[:, first:end] = PAD_SLOT_ID
        return build_row_metadata(
            input_batch,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            causal=False,
            beyond=beyond,
            windows=windows if windows is not None and windows.num.any() else None,
        )

    def _beyond(
        self, batch: InputBatch, length: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any] | None:
        """Canvas positions behind each query, int64 [requests]; None if nowhere any.

        Args:
            batch: vLLM's.
            length: int64 [requests], rows of each query without windows.
        """
        if batch.num_draft_tokens_per_req is None:  # a dummy batch
            return None
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
        to_device = partial(async_tensor_h2d, device=self.device, dtype=torch.int64)
        slots = input_batch.idx_mapping
        bounds = input_batch.query_start_loc[: len(slots) + 1].long()
        first, end = bounds[:-1], bounds[1:]
        num_tokens = input_batch.num_tokens
        positions = input_batch.positions[:num_tokens].long()
        # Reported tokens are whole blocks, so the open one lies behind the known ones.
        start = req_states.total_len.gpu[slots].long()
        open_row = first + start - positions[first]
        # Windows included: they are rolled back as well.
        num_open = end - open_row
        query = torch.repeat_interleave(end - first, output_size=num_tokens)
        opened = active_ids(self.states.gather(slots))
        windows, of_windows, speculating = self.canvases, None, None
        if windows is not None:
            asked = to_device(windows.request)
            end = end.index_copy(0, asked, to_device(windows.row))
            if (of_windows := self.drafts.place(windows)) is not None:
                positions[of_windows.row] = of_windows.position
                input_batch.positions[:num_tokens] = positions
        column = positions - start[query]
        ids = opened[query, column.clamp(0, length - 1)]
        if windows is not None and of_windows is not None:
            ids[of_windows.row] = self.drafts.guessed(
                slots[asked], of_windows, start[asked], opened[asked]
            )
        ids = torch.where(column < length, ids, mask_id)
        known = req_states.all_token_ids.gpu[slots[query], positions]
        ids = torch.where(column < 0, known, ids)
        input_batch.input_ids[:num_tokens] = ids
        if self.openings.seeds:
            self._write_seeds(input_batch, positions, start)

        columns = torch.arange(length, device=self.device)
        rows = torch.minimum(open_row.unsqueeze(1) + columns, end.unsqueeze(1) - 1)
        logits_rows = [rows.view(-1)]
        asks = input_batch.has_structured_output_reqs
        self.told = req_states.draft_tokens if asks else None
        if windows is not None:
            speculating, rows = self.drafts.read_windows(
                windows, slots[asked], start[asked], self.num_steps, num_tokens
            )
            logits_rows.append(rows)
        if self.carry is not None:
            none = torch.zeros_like(open_row)
            logits_rows = self.carry.read_canvases(
                slots, open_row - first, open_row, none, logits_rows, speculating
            )
        input_batch.logits_indices = torch.cat(logits_rows)
        self.denoising = DenoisingRows(
            np.arange(len(slots)),
            input_batch.idx_mapping_np,
            slots,
            (end - open_row).clamp(0, length),
            num_open,
            start,
            None,
            speculating,
        )
        return {}

    def _write_seeds(
        self, batch: InputBatch, positions: torch.Tensor, start: torch.Tensor
    ) -> None:
        """Put the seeds of later blocks where they are seen already.

        Args:
            batch: vLLM's.
            positions: int64 [rows], absolute.
            start: int64 [requests], absolute position of the open blocks.
        """
        for index, slot in enumerate(batch.idx_mapping_np.tolist()):
            if slot not in self.openings.seeds:
                continue
            seeds, _, num_prompt = self.openings.seeds[slot]
            first, end = batch.query_start_loc_np[index : index + 2].tolist()
            place = positions[first:end] - num_prompt
            behind = positions[first:end] >= start[index] + self.geometry.block_length
            inside = behind & (place < len(seeds))
            rows = batch.input_ids[first:end]
            ids = seeds[place.clamp(0, len(seeds) - 1)].to(rows.dtype)
            rows.copy_(torch.where(inside, ids, rows))

    def num_rolled_back(self, rows: DenoisingRows, stepped: Stepped) -> torch.Tensor:
        """Back to the open block, or to position 0 where the next step is full."""
        num_steps = self.num_steps[rows.slots] + stepped.num_steps
        num_steps = torch.where(stepped.complete, 0, num_steps)
        self.num_steps[rows.slots] = num_steps
        if self.told is not None:
            self.drafts.tell(self.told, rows, num_steps)
        full = num_steps % self.drafts.period[rows.slots] == 0
        return rows.num_open + torch.where(full, rows.start, 0)
