# SPDX-License-Identifier: Apache-2.0
"""Synchronous scheduling of what the worker reports.

Two things that the next query of a request needs follow from what its last step has
done, so the worker alone knows them, and only when that step is over:

* which part of the open block it forwards (`engine.sub_blocks`). Such queries are the
  exception to the rule that queries start on the block grid;
* whether a draft waits for its verification (`engine.verification_step`), and so
  whether the query has windows.

The worker tells in the place where vLLM reports draft tokens, so nothing may be in
flight. With the server option `adaptive_verification` it is told in turn whether there
may be drafts (`engine.throttle`).
"""

from typing import Any, cast

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from vllm_unmask.engine.metrics import Watch
from vllm_unmask.engine.scheduler import BlockDiffusionScheduler
from vllm_unmask.engine.throttle import Asked, Throttle
from vllm_unmask.options import DecodingOptions


class ReportingScheduler(BlockDiffusionScheduler):
    """Synchronous scheduling, of parts and windows where the worker asks for them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Request id -> first column and rows of what its next query has of the open
        # block; None: all of it.
        self.parts: dict[str, tuple[int, int] | None] = {}
        # Requests that denoise in this step and whose report the next one needs.
        self.asking: set[str] = set()
        served = self.vllm_config.model_config.hf_config.unmask_served
        self.throttle: Throttle | None = None
        if served["server"]["adaptive_verification"]:
            self.throttle = Throttle()
        row = self.vllm_config.parallel_config.data_parallel_rank
        self.unmasked = Watch(served["counters"], row, "speculation_tokens_unmasked")

    def _admit(self, request: Request, options: DecodingOptions) -> None:
        super()._admit(request, options)
        if options.value("cache") == "sub_block":
            self.parts[request.request_id] = None
        if request.request_id in self.windows.fixed:
            self.windows.fixed[request.request_id] = 0
            if self.throttle and options.value("route") != "always":
                self.throttle.requests.add(request.request_id)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        throttle, num_running = self.throttle, len(self.running)
        if throttle is None:
            return super().schedule(throttle_prefills)
        throttle.next_step(num_running)
        if not throttle.allowed:
            # What waits is not verified any more.
            self.windows.fixed |= dict.fromkeys(throttle.requests, 0)
        output = super().schedule(throttle_prefills)
        if output.num_scheduled_tokens:
            throttle.start(num_running, self.usual)
        return output

    def _canvas_length(self, request: Request) -> int:
        part = self.parts.get(request.request_id)
        if part is None:
            return super()._canvas_length(request)
        _, rows = part
        return rows + self.block_length * (request.request_id in self.pending)

    def _plan_canvas(self, request: Request) -> None:
        part = self.parts.get(request.request_id)
        if part is None:
            super()._plan_canvas(request)
            return
        first, _ = part
        start = self._first_open_position(request) + first
        end = start + self._canvas_length(request)
        request.num_computed_tokens = start
        request.spec_token_ids = [-1] * (end - request.num_tokens)

    def _open_first_blocks(self, scheduler_output: SchedulerOutput) -> None:
        super()._open_first_blocks(scheduler_output)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        partial = self.parts.keys() & drafts.keys()
        for req_id in partial:
            # vLLM counts drafts from the last token on that it knows, and a part may
            # begin behind that.
            del drafts[req_id][scheduler_output.num_scheduled_tokens[req_id] :]
        self.asking = partial | (self.windows.fixed.keys() & drafts.keys())
        asked = Asked(0)
        if self.throttle is not None:
            members = self.throttle.requests & drafts.keys()
            self.throttle.members = len(members)
            if self.throttle.allowed:
                asked |= Asked.DRAFT
            else:
                self.asking -= members
        if self.asking:
            # vLLM reads a truth value, and hands on what it is given.
            asked |= Asked.REPORT
            flag = scheduler_output.has_structured_output_requests | asked
            scheduler_output.has_structured_output_requests = cast(bool, flag)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take over what the worker asks for: a part, or windows."""
        reports = zip(
            draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True
        )
        for req_id, report in reports:
            if req_id not in self.asking:
                continue
            if req_id in self.parts:
                self.parts[req_id] = report[0], report[1]
            elif req_id in self.windows.fixed:
                self.windows.fixed[req_id] = report[0]

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> Any:
        if self.throttle is not None and scheduler_output.num_scheduled_tokens:
            self.throttle.finish(self.unmasked.take())
        return super().update_from_output(scheduler_output, model_runner_output)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if request.request_id in self.parts:
            self.parts[request.request_id] = None
        if request.request_id in self.windows.fixed:
            self.windows.fixed[request.request_id] = 0
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.parts.pop(request.request_id, None)
        if self.throttle is not None:
            self.throttle.requests.discard(request.request_id)
        return super()._free_request(request, *args, **kwargs)
