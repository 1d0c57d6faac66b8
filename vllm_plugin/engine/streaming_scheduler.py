# SPDX-License-Identifier: Apache-2.0
"""Scheduling of streaming windows (`decoding.streaming`).

A query is ``[tokens that the step before reported | window]``, and the window begins
behind the tokens that are known. It lies on no grid: a prompt is cut anywhere, and
every token before the reported ones has its final keys and values. A query is
scheduled whole, and with nothing in flight.
"""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_unmask.engine.scheduler import BlockDiffusionScheduler


class StreamingScheduler(BlockDiffusionScheduler):
    """Synchronous scheduling of windows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grid = 1
        # Request id -> first position whose KV is not final, once it has denoised.
        self.final: dict[str, int] = {}

    def _first_open_position(self, request: Request) -> int:
        return self.final.get(request.request_id, request.num_tokens)

    def _canvas_length(self, request: Request) -> int:
        end = min(request.num_tokens + self.block_length, self.max_model_len)
        return end - self._first_open_position(request)

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> Any:
        # What a step reports is behind the tokens that it has made final.
        for req_id in scheduler_output.scheduled_spec_decode_tokens:
            if (request := self.requests.get(req_id)) is not None:
                self.final[req_id] = request.num_tokens
        return super().update_from_output(scheduler_output, model_runner_output)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.final.pop(request.request_id, None)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.final.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)
