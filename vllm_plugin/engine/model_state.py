# SPDX-License-Identifier: Apache-2.0
"""ModelState of the block-causal diffusion families."""

from functools import partial
from typing import Any

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

from vllm_unmask.decoding.learned import Filter, load_filter
from vllm_unmask.engine.answers import Answers
from vllm_unmask.engine.attention import build_block_causal_metadata, count_final_rows
from vllm_unmask.engine.carry import Carry
from vllm_unmask.engine.denoising import Stepped, Stepper
from vllm_unmask.engine.grammar import Grammars
from vllm_unmask.engine.openings import Openings
from vllm_unmask.engine.rows import DenoisingRows, positions_read, read_ahead
from vllm_unmask.engine.sampler import BlockDiffusionSampler
from vllm_unmask.engine.speculation import Drafts
from vllm_unmask.engine.states import BlockGeometry, CanvasStates
from vllm_unmask.engine.strategies import SPECULATION, Strategies
from vllm_unmask.engine.strategy_data import Delimiters
from vllm_unmask.engine.sub_blocks import SubBlocks
from vllm_unmask.engine.throttle import Asked
from vllm_unmask.engine.tracing import Tracer
from vllm_unmask.engine.verification import Verifier
from vllm_unmask.engine.windows import Windows, attend_in_windows, write_windows
from vllm_unmask.options import (
    GRAMMAR_KEY,
    DecodingOptions,
    admitted_options,
    server_options_from_dict,
)
from vllm_unmask.seeds import parse_seeds


class BlockDiffusionModelState(ModelState):
    """Feeds canvases to the forward pass and block-causal rows to attention.

    A request without scheduled draft tokens is prefilling; one with them is
    denoising, and its query is its canvas, cut to what the scheduler gave it.
    """

    # All output comes from the canvas, which vLLM counts as draft tokens.
    num_new_sampled_tokens_per_step = 0
    stepper_cls: type[Stepper] = Stepper
    drafts_cls: type[Drafts] = Drafts

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: Any,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        served = self.model_config.hf_config.unmask_served
        self.vocab_size: int = served["vocab_size"]
        self.geometry = BlockGeometry(served["block_length"], served["mask_token_id"])
        # A prompt's KV is final up to a multiple of this.
        self.grid = self.geometry.block_length
        self.default_options: DecodingOptions = server_options_from_dict(
            served["server"]
        ).decoding
        self.states = CanvasStates(self.max_num_reqs, self.geometry, device)
        self.grammars = Grammars(vllm_config, self.geometry)
        learned = None
        if served["filter"]:
            learned = load_filter(served["filter"], self.geometry.block_length)
            learned = Filter(*(x.to(device) for x in learned))
        self.openings = Openings(self.max_num_reqs, self.geometry, device)
        delimiters = Delimiters(self.model_config, self.vocab_size, device)
        self.strategies = Strategies(
            self.max_num_reqs, self.geometry, device, learned, delimiters
        )
        self.answers = Answers(self.max_num_reqs, self.geometry, device, delimiters)
        parallel = vllm_config.parallel_config
        self.tracer = Tracer(served["traces"], parallel.rank == 0, *self.geometry)
        self.drafts = self.drafts_cls(
            self.max_num_reqs,
            self.geometry,
            served["server"]["max_candidates"],
            served["verify_windows"],
            self.model_config.max_model_len,
            device,
        )
        self.verifier = Verifier(
            self.max_num_reqs,
            self.geometry,
            self.vocab_size,
            device,
            served["server"]["adaptive_verification"],
        )
        if self.drafts.depth:
            attend_in_windows(model)
        self.first_alone: bool = served["first_alone"]
        self.carry: Carry | None = None
        if served["shifted"]:
            self.carry = model.carry = Carry(
                self.max_num_reqs,
                self.geometry.block_length,
                self.model_config.get_hidden_size(),
                self.model_config.dtype,
                device,
            )
        self.windows: Windows | None = None
        self.causal_kv: bool = served["server"]["causal_kv"]
        self.asynchronous = vllm_config.scheduler_config.async_scheduling
        self.sub_blocks = SubBlocks(
            self.states,
            self.model_config.max_model_len,
            served["shifted"],
            self.first_alone,
        )
        self.denoising: DenoisingRows | None = None

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        return BlockDiffusionSampler(sampler, self), None

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        # Rows are rebuilt every step, so a captured attention call would read
        # stale metadata; the forward still runs as piecewise graphs.
        return AttentionCGSupport.NEVER, "block-causal virtual rows"

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        params = new_req_data.sampling_params
        extra_args = (params and params.extra_args) or {}
        record = extra_args.get(GRAMMAR_KEY)
        options = admitted_options(
            extra_args, self.default_options, self.geometry.block_length
        )
        token_ids = new_req_data.prefill_token_ids
        assert token_ids is not None and params is not None
        num_prompt = len(new_req_data.prompt_token_ids or ())
        seeds = parse_seeds(
            extra_args, self.vocab_size, self.geometry.mask_token_id, None
        )
        num_fixed = self.num_fixed(len(token_ids), num_prompt)
        self.states.add_request(
            req_index, token_ids[len(token_ids) - num_fixed :], options
        )
        req_id = new_req_data.req_id
        self.strategies.add_request(
            req_index, req_id, options, params, num_prompt, seeds
        )
        speculates = not SPECULATION.isdisjoint(options.fillers)
        self.tracer.add_request(req_index, req_id, options.trace, speculates)
        self.drafts.add_request(req_index, options)
        self.verifier.add_request(req_index, req_id, options)
        self.answers.add_request(req_index, options, token_ids, num_prompt)
        self.openings.add_request(
            req_index,
            req_id,
            seeds,
            "lookahead" in options.fillers,
            num_prompt,
            len(token_ids),
            self.states.canvas,
        )
        self.grammars.add_request(
            req_index, req_id, record, token_ids[num_prompt:], num_fixed
        )
        if not self.asynchronous:
            self.sub_blocks.add_request(req_index, options)
        self._admit(req_index, options, num_prompt, params.max_tokens)

    def _admit(
        self,
        slot: int,
        options: DecodingOptions,
        num_prompt: int,
        max_tokens: int | None,
    ) -> None:
        """Note what the options of a request ask of a kind of attention."""

    def num_fixed(self, num_tokens: int, num_prompt: int) -> int:
        """Known tokens that lie in the open block, of a grid from position 0."""
        return num_tokens % self.geometry.block_length

    def num_rolled_back(self, rows: DenoisingRows, stepped: Stepped) -> torch.Tensor:
        """Rows of each query that the next one forwards again, or masks at its end.

        Args:
            rows: the requests of a step.
            stepped: what was done with them.
        """
        skipped = self.sub_blocks.plan(rows, stepped.complete)
        return rows.num_open if skipped is None else rows.num_open - skipped

    def remove_request(self, req_id: str) -> None:
        self.grammars.remove_request(req_id)
        self.openings.remove_request(req_id)
        self.strategies.remove_request(req_id)
        self.verifier.remove_request(req_id)

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
        prefills = []
        if self.carry is not None:
            prefills = self.carry.read_prefills(input_batch)
        if num_drafts is None or not num_drafts.any():
            if prefills:
                (input_batch.logits_indices,) = prefills
            return {}
        length, mask_token_id = self.geometry
        batch_index = np.flatnonzero(num_drafts)
        slots_np = input_batch.idx_mapping_np[batch_index]
        query_len = input_batch.num_scheduled_tokens[batch_index]
        # With a step in flight, known tokens in front of the drafts say nothing:
        # they may be the drafts of that step.
        known = query_len - num_drafts[batch_index]
        lead = np.zeros_like(known) if self.asynchronous else known // length * length
        to_device = partial(async_tensor_h2d, device=self.device, dtype=torch.int64)
        slots = to_device(slots_np)
        query_start = to_device(input_batch.query_start_loc_np[batch_index])
        canvas_len = to_device(query_len)
        windows = self.windows
        if windows is not None:
            # Of requests that speculate, what lies behind the open block is windows.
            behind = to_device(np.searchsorted(batch_index, windows.requests))
            first = windows.first_row - query_start[behind]
            canvas_len = canvas_len.index_copy(0, behind, first)
            write_windows(
                windows,
                input_batch.input_ids[: input_batch.num_tokens],
                input_batch.positions[: input_batch.num_tokens],
            )
        width, num_open, input_batch.logits_indices = self.states.ops.write_inputs(
            self.states.canvas,
            slots,
            query_start,
            canvas_len,
            to_device(lead),
            input_batch.input_ids,
        )
        first = canvas_len - num_open
        start = input_batch.positions[query_start] + first
        num_open = num_open + to_device(query_len) - canvas_len
        denoising = DenoisingRows(
            batch_index, slots_np, slots, width, num_open, start, None, None
        )
        denoising = self.sub_blocks.place(input_batch, req_states, denoising)
        if not self.asynchronous:
            self.drafts.reports = req_states.draft_tokens
        asked = int(input_batch.has_structured_output_reqs)
        self.verifier.begin(slots_np, bool(asked & Asked.DRAFT))
        logits_rows = [input_batch.logits_indices]
        whole = self.strategies.reads_all[slots_np].any()
        ahead = speculating = read = None
        looking = self.strategies.looking_ahead(slots_np) if whole else batch_index[:0]
        if len(looking):
            end = query_len + input_batch.query_start_loc_np[batch_index]
            ahead, rows = read_ahead(looking, num_open, to_device(end), length)
            logits_rows.append(rows)
        if windows is not None:
            speculating, rows = self.drafts.read(batch_index, windows, input_batch)
            logits_rows.append(rows)
        # A GPU alone knows the masks, and would have to be waited for.
        on_host = self.device.type == "cpu" and self.carry is None
        whole = whole or len(logits_rows) > 1 or len(self.verifier.now) > 0
        if on_host and not whole:
            open_rows = logits_rows[0].numpy()
            masked = input_batch.input_ids.numpy()[open_rows] == mask_token_id
            members = self.grammars.members(slots_np)
            read_np = positions_read(masked.reshape(-1, length), members)
            if read_np is not None:
                read = torch.from_numpy(read_np)
                logits_rows = [torch.from_numpy(open_rows[read_np])]
        if self.carry is not None:
            fixed = self.states.canvas.num_fixed[slots]
            logits_rows = self.carry.read_canvases(
                slots, first, query_start + first, fixed, logits_rows, speculating
            )
            logits_rows += prefills
        if len(logits_rows) > 1:
            logits_rows = [torch.cat(logits_rows)]
        (input_batch.logits_indices,) = logits_rows
        self.denoising = denoising._replace(
            ahead=ahead, speculating=speculating, read=read
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
        self.windows = self.drafts.locate(
            input_batch, self.states.canvas.pending, self.asynchronous
        )
        num_final = None
        if self.causal_kv:
            num_final = count_final_rows(
                input_batch,
                self.states.canvas.pending,
                self.geometry.block_length,
                self.asynchronous,
            )
        return build_block_causal_metadata(
            input_batch,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            self.geometry.block_length,
            self.windows,
            num_final,
            self.sub_blocks.beyond(input_batch),
            self.answers.locate(input_batch),
        )
