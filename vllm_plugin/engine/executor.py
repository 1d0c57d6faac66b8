# SPDX-License-Identifier: Apache-2.0
"""One message to the worker and one back for every synchronous step.

vLLM's engine asks three times: `execute_model`, then `sample_tokens` with the
grammar bitmask that it filled meanwhile, then `take_draft_token_ids`. Our models take
no bitmask and keep the canvas in the worker, so the first answer is the step's output.
"""

from concurrent.futures import Future
from typing import Any

import vllm.envs as envs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput


def execute_and_sample(worker: Any, scheduler_output: SchedulerOutput) -> Any:
    """A whole step, in the worker's process."""
    output = worker.execute_model(scheduler_output)
    return worker.sample_tokens(None) if output is None else output


class OneCallExecutor(MultiprocExecutor):
    """vLLM's executor of worker processes, with a step in one call.

    For synchronous scheduling: with a step in flight the engine takes the output in
    a second call anyway.
    """

    # Whether the scheduler wants to know what the worker has for draft tokens.
    drafts_wanted = False

    def execute_model(
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> ModelRunnerOutput | None | Future[ModelRunnerOutput | None]:
        if self.scheduler_config.async_scheduling:
            return super().execute_model(scheduler_output, non_block)
        self.drafts_wanted = scheduler_output.has_structured_output_requests
        return self.collective_rpc(
            execute_and_sample,
            args=(scheduler_output,),
            unique_reply_rank=self.output_rank,
            non_block=non_block,
            timeout=envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
        )

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        # The scheduler plans canvases by itself, mostly.
        return super().take_draft_token_ids() if self.drafts_wanted else None
