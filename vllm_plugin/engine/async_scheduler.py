# SPDX-License-Identifier: Apache-2.0
"""Asynchronous scheduling on the block grid, in one of two layouts.

While a step is in flight nobody knows whether it completes a request's block. There
are two ways to go on, and both keep the device busy:

* ``uniform``: every step takes all requests and schedules two blocks of each, which is
  right in either case;
* ``exact``: requests take turns. A step takes half of them, those that are not in
  flight, with a second block only where one is complete: fewer rows, in twice as many
  forward passes. One request alone waits for each of its steps.

Rows are nearly free beside few requests and not beside many, so that the better layout
is a matter of load. ``auto`` measures both by the clock, as speculation does (`depth`).
"""

from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_unmask.engine.depth import Depth
from vllm_unmask.engine.scheduler import BlockDiffusionScheduler


class LayoutPlan:
    """The layout of each step.

    Args:
        layout: the server's option.
        clock: seconds.
    """

    def __init__(self, layout: str, clock: Callable[[], float] = perf_counter) -> None:
        self.exact = layout == "exact"
        # Of its two depths 0 is uniform, and 1 takes turns.
        self.depth = Depth(1, clock) if layout == "auto" else None
        # Of the steps under way, how many more requests they serve than there are.
        self.num_more: deque[int] = deque()

    def next_step(self, num_running: int, measurable: bool) -> None:
        """Choose.

        Args:
            num_running: requests that share it, or take turns.
            measurable: whether a layout alone decides what a step costs.
        """
        if self.depth is not None:
            self.exact = measurable and self.depth.choose(num_running) > 0

    def start(self, num_running: int, num_scheduled: int, measured: bool) -> None:
        """The step begins; `measured` without a prompt in it."""
        self.num_more.append(num_scheduled - num_running)
        if self.depth is not None:
            whole = self.exact or num_scheduled == num_running
            self.depth.start(num_running, int(self.exact), measured and whole)

    def finish(self) -> None:
        """The oldest step under way ends."""
        num_more = self.num_more.popleft()
        if self.depth is not None:
            self.depth.finish(num_more)


class BlockDiffusionAsyncScheduler(BlockDiffusionScheduler, AsyncScheduler):
    """Scheduling with a step in flight; canvases by themselves, not behind prompts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        served = self.vllm_config.model_config.hf_config.unmask_served
        self.layout = LayoutPlan(served["server"]["layout"])
        self.held: set[str] = set()  # not in this step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        decoding = [r for r in self.running if not r.is_prefill_chunk]
        num_running = len(self.running)
        # Windows have a depth of their own, which two layouts would confuse.
        speculating = self.windows.wanted or self.windows.fixed
        usual = len(decoding) == num_running > 0
        self.layout.next_step(num_running, usual and not speculating)
        self.uniform = not self.layout.exact
        self.held = set()
        if self.layout.exact:
            idle = [r for r in decoding if not self._in_flight(r)]
            chosen = idle[: -(-len(decoding) // 2)]
            self.held = {r.request_id for r in decoding}
            self.held -= {r.request_id for r in chosen}
        output = super().schedule(throttle_prefills)
        if num_scheduled := output.num_scheduled_tokens:
            canvases = output.scheduled_spec_decode_tokens
            usual &= num_scheduled.keys() == canvases.keys()
            measured = usual and not speculating
            self.layout.start(num_running, len(num_scheduled), measured)
        return output

    def _mamba_block_aligned_split(
        self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        if request.request_id in self.held:
            return 0
        return super()._mamba_block_aligned_split(
            request, num_new_tokens, *args, **kwargs
        )

    def _open_first_blocks(self, scheduler_output: SchedulerOutput) -> None:
        """Not: the next step is planned before it is known what became of a block."""

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> Any:
        if scheduler_output.num_scheduled_tokens:
            self.layout.finish()
        return super().update_from_output(scheduler_output, model_runner_output)
