# SPDX-License-Identifier: Apache-2.0
"""Scheduling on the block grid.

vLLM counts a canvas as draft tokens. Three things are different for a
block-causal model, and all follow from one rule: *every query starts on the
block grid*, at the first block whose KV is not final.

1. Prefill is cut at block borders, and a prompt tail that does not fill a block
   is forwarded again with the first canvas. With nothing in flight the step that
   completes the prompt forwards that canvas too, behind the prompt.
2. A canvas is scheduled whole or not at all: a cut one would be another mask
   pattern than the model was trained for. (The last block before
   ``max_model_len`` may be shorter; it is then shorter in every step.)
3. A block is reported in the step that completes it, one step before its KV is
   final, so for that step the request stands one block behind its tokens.

With nothing in flight the scheduler knows where the device stands and says so
in ``num_computed_tokens``. With a step in flight (`async_scheduler`) it cannot know
whether that step completes a block; if it schedules the request all the same, it
schedules two blocks, which is right in either case, and vLLM's own accounting catches
up.
"""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_unmask.engine.depth import WindowPlan
from vllm_unmask.engine.metrics import Watch
from vllm_unmask.engine.page_sharing import PageSharing
from vllm_unmask.engine.tracing import TRACE_KEY, VERSION, forget_trace, read_trace
from vllm_unmask.options import (
    DecodingOptions,
    admitted_options,
    server_options_from_dict,
)


class BlockDiffusionScheduler(Scheduler):
    """Synchronous scheduling.

    Layout ``exact``: the second block is scheduled only when the first one is
    complete, so no row is forwarded that nothing reads. Layout ``uniform``:
    always two blocks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        served = self.vllm_config.model_config.hf_config.unmask_served
        self.block_length: int = served["block_length"]
        # Queries start at multiples of this.
        self.grid = self.block_length
        self.mask_token_id: int = served["mask_token_id"]
        self.uniform = served["server"]["layout"] == "uniform"
        self.asynchronous: bool = self.scheduler_config.async_scheduling
        # Routes every scheduling decision through _mamba_block_aligned_split,
        # vLLM's hook for queries that must end on a grid.
        self.need_mamba_block_aligned_split = True
        # Requests whose last reported block still awaits its final forward.
        self.pending: set[str] = set()
        self.sharing = PageSharing(self.kv_cache_manager, self._first_open_position)
        self.default_options = server_options_from_dict(served["server"]).decoding
        # Requests that also unmask in their next block, which every step forwards.
        self.looking_ahead: set[str] = set()
        # Blocks of rows behind the canvases of requests that speculate.
        self.windows = WindowPlan(
            served["server"]["max_candidates"] - 1,
            self.block_length,
            self.block_size if served["attention"] != "full" else None,
            served["server"]["adaptive_candidates"],
            served["verify_windows"],
        )
        row = self.vllm_config.parallel_config.data_parallel_rank
        self.accepted = Watch(served["counters"], row, "speculation_accepted")
        # Request id -> request and strategy, of those that asked for a trace.
        self.traced: dict[str, tuple[Request, str]] = {}
        self.traces: str = served["traces"]
        # Request id -> canvas rows it has in the step, where its prompt has more.
        self.rows_behind_prompt: dict[str, int] = {}
        self.usual = False  # whether the step has no prompt in it
        # Request id -> rows it had in the step whose output is being processed.
        self.num_forwarded: dict[str, int] = {}

    def _first_open_position(self, request: Request) -> int:
        """Start of the first block whose KV is not final."""
        length = self.block_length
        start = request.num_tokens // length * length
        return start - length if request.request_id in self.pending else start

    def _canvas_length(self, request: Request) -> int:
        """Positions of the next query, from the first open position on."""
        req_id = request.request_id
        second = req_id in self.pending or req_id in self.looking_ahead
        blocks = 2 if self.uniform or second else 1
        return (blocks + self.windows.of(req_id)) * self.block_length

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        options = admitted_options(
            params and params.extra_args, self.default_options, self.block_length
        )
        self._admit(request, options)
        super().add_request(request)

    def _admit(self, request: Request, options: DecodingOptions) -> None:
        """Note what the options of a request ask of the scheduler."""
        if "lookahead" in options.fillers:
            self.looking_ahead.add(request.request_id)
        if (options.answer_block_length or self.block_length) < self.block_length:
            self.sharing.apart.add(request.request_id)
        self.windows.add(request.request_id, options)
        if options.trace:
            self.traced[request.request_id] = (request, options.strategy)

    def _plan_canvas(self, request: Request) -> None:
        start = self._first_open_position(request)
        end = start + self._canvas_length(request)
        request.num_computed_tokens = start
        request.spec_token_ids = [-1] * (end - request.num_tokens)

    def _in_flight(self, request: Request) -> bool:
        return request.num_output_placeholders > 0

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        num_running = len(self.running)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        if self.windows.wanted and num_running < self.max_num_running_reqs:
            free -= sum(2 + r.num_tokens // self.block_size for r in self.waiting)
        self.windows.next_step(num_running, free)
        for request in self.running:
            if request.is_prefill_chunk:
                continue
            if self._in_flight(request):
                # Two blocks behind whatever is in flight.
                owed = (
                    request.num_tokens
                    + request.num_output_placeholders
                    - request.num_computed_tokens
                )
                blocks = 2 + self.windows.of(request.request_id)
                request.spec_token_ids = [-1] * (blocks * self.block_length - owed)
            else:
                self._plan_canvas(request)
        output = super().schedule(throttle_prefills)
        if output.num_scheduled_tokens:
            self.usual = self._is_usual(output)
            self.windows.start(num_running, self.usual)
        return output

    def _is_usual(self, output: SchedulerOutput) -> bool:
        """Whether a step is what most are: no prompt in it."""
        drafts = output.scheduled_spec_decode_tokens
        decoding = output.num_scheduled_tokens.keys() == drafts.keys()
        return decoding and not self.rows_behind_prompt

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        self._open_first_blocks(scheduler_output)
        super()._update_after_schedule(scheduler_output)

    def _open_first_blocks(self, scheduler_output: SchedulerOutput) -> None:
        """Append the first canvas to every query that completes a prompt.

        As far as the step has room for it, and if the page that holds the end of
        the prompt holds the block as well: a new page would have to be asked for
        where running out of pages means preemption.
        """
        self.rows_behind_prompt = {}
        room = (
            self.max_num_scheduled_tokens - scheduler_output.total_num_scheduled_tokens
        )
        num_scheduled = scheduler_output.num_scheduled_tokens
        drafts = scheduler_output.scheduled_spec_decode_tokens
        for req_id in [req_id for req_id in num_scheduled if req_id not in drafts]:
            request = self.requests[req_id]
            known = request.num_computed_tokens + num_scheduled[req_id]
            start = known // self.grid * self.grid
            end = min(start + self.block_length, self.max_model_len)
            pages = -(-known // self.block_size)
            fits = end - known <= room and end <= pages * self.block_size
            if known < request.num_tokens or not fits:
                continue
            room -= end - known
            num_scheduled[req_id] += end - known
            scheduler_output.total_num_scheduled_tokens += end - known
            drafts[req_id] = [-1] * (end - known)
            self.rows_behind_prompt[req_id] = end - start

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Cut a query to the grid; 0 leaves the request for a later step."""
        length = self.block_length
        if not request.spec_token_ids:
            start = (
                request.num_computed_tokens
                + num_new_local_computed_tokens
                + num_external_computed_tokens
            )
            if start + num_new_tokens >= request.num_tokens:
                return num_new_tokens
            return num_new_tokens // self.grid * self.grid
        windows = self.windows.optional(request.request_id) * length
        if self._in_flight(request):
            whole = (2 + self.windows.of(request.request_id)) * length - windows
        else:
            room = self.max_model_len - request.num_computed_tokens
            whole = min(self._canvas_length(request) - windows, room)
        if num_new_tokens < whole:
            return 0
        # Windows are scheduled whole or not at all.
        return whole + min((num_new_tokens - whole) // length * length, windows)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Nothing: the canvas lives in the worker, and schedule() plans its length."""

    def update_draft_token_ids_in_output(
        self, draft_token_ids: DraftTokenIds, scheduler_output: SchedulerOutput
    ) -> None:
        return None

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> Any:
        self.num_forwarded = (
            scheduler_output.num_scheduled_tokens | self.rows_behind_prompt
        )
        sampled = model_runner_output.sampled_token_ids
        for req_id in scheduler_output.scheduled_spec_decode_tokens:
            request = self.requests.get(req_id)
            # Output of a step from before a preemption says nothing about the
            # canvas that was opened since.
            if request is None or request.num_stale_output_tokens > 0:
                continue
            if sampled and sampled[model_runner_output.req_id_to_index[req_id]]:
                self.pending.add(req_id)
            else:
                self.pending.discard(req_id)
        if scheduler_output.num_scheduled_tokens:
            self.windows.finish(self.accepted.take())
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self.traced:
            self._add_traces(outputs)
        return outputs

    def _add_traces(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Put traces into the final outputs, and where a stop string may end one."""
        for of_client in outputs.values():
            for output in of_client.outputs:
                if output.request_id not in self.traced:
                    continue
                request, strategy = self.traced[output.request_id]
                params = request.sampling_params
                if not output.finished and not (params and params.stop):
                    continue
                trace = read_trace(
                    self.traces, output.request_id, list(request.output_token_ids)
                )
                about = {
                    "version": VERSION,
                    "block_length": self.block_length,
                    "mask_token_id": self.mask_token_id,
                    "strategy": strategy,
                }
                output.kv_transfer_params = {
                    **(output.kv_transfer_params or {}),
                    TRACE_KEY: about | trace,
                }
                if output.finished:
                    del self.traced[output.request_id]
                    forget_trace(self.traces, output.request_id)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        if new_token_ids and new_token_ids[0] == self.mask_token_id:
            # The sampler's sign that this request cannot go on.
            request.status = RequestStatus.FINISHED_ERROR
            request.resumable = False
            return [], True
        if not self.asynchronous and self._goes_on(request, new_token_ids):
            request.append_output_token_ids(new_token_ids)
            return new_token_ids, False
        return super()._update_request_with_output(
            request, new_token_ids, *args, **kwargs
        )

    def _goes_on(self, request: Request, new_token_ids: list[int]) -> bool:
        """Whether none of these tokens ends the request.

        vLLM asks that of every token by itself (`check_stop`), and most blocks have
        none that does.
        """
        params = request.sampling_params
        if params is None or params.repetition_detection is not None:
            return False
        num_new = len(new_token_ids)
        return (
            request.num_tokens + num_new < self.max_model_len
            and request.num_output_tokens + num_new < request.max_tokens
            and params.eos_token_id not in new_token_ids
            and (
                not params.stop_token_ids
                or set(params.stop_token_ids).isdisjoint(new_token_ids)
            )
        )

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        # vllm:diffusion_num_canvas_positions counts every row that a denoising
        # step forwards, known ids included: what a committed token really costs.
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            self.num_forwarded[request_id],
            num_accepted_tokens,
            None,
            request_id,
        )

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.pending.discard(request.request_id)
        self.sharing.preempt(request)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.pending.discard(request.request_id)
        self.looking_ahead.discard(request.request_id)
        self.sharing.apart.discard(request.request_id)
        self.windows.forget(request.request_id)
        aborted = request.status == RequestStatus.FINISHED_ABORTED
        if aborted and self.traced.pop(request.request_id, None):
            forget_trace(self.traces, request.request_id)
        return super()._free_request(request, *args, **kwargs)
