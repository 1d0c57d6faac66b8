# SPDX-License-Identifier: Apache-2.0
"""Executors of a CPU: what lies between the engine core and its workers.

A small step is over in milliseconds there, and messages between processes are a good
part of it. One worker shares the engine core's process, several have one of their own.
"""

import os
import sys
from concurrent.futures import Future
from typing import Any

import torch
import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

logger = init_logger("vllm.vllm_unmask.engine.executor")

# With fewer cores than this the one that vLLM reserves is too much to leave out.
MANY_CORES = 8
# Multiplications of a forward pass (estimated) below which one thread is faster: the
# others would spend the time waking up and waiting for each other.
SMALL_FORWARD = 1 << 27


def compute_cores(vllm_config: VllmConfig) -> list[int]:
    """Logical CPUs for the OpenMP threads of a worker in this process.

    Those that vLLM gives to the first worker (VLLM_CPU_OMP_THREADS_BIND). It leaves
    out a core for the scheduler's process, which here is this one: where cores are
    few, that one computes as well. Empty if vLLM is told to bind nothing.
    """
    manager = OMPProcessManager(vllm_config)
    if manager.skip_setup:
        return []
    cores: list[int] = manager.cpu_lists[0]
    if manager.auto_setup and len(cores) < MANY_CORES:
        cores = cores + manager.reserved_cpu_list
    return sorted(cores)


class InProcessExecutor(UniProcExecutor):
    """One worker in the engine core's process, as vLLM has it on a GPU.

    vLLM's CPU platform starts a process for it because OpenMP is set up by environment
    variables. Here the library that is already loaded is told, and its threads, which
    start later, inherit the CPUs of the one that starts them. A small forward pass is
    done by one thread.
    """

    def _init_executor(self) -> None:
        if cores := compute_cores(self.vllm_config):
            if sys.platform == "linux":
                os.sched_setaffinity(0, cores)
            torch.set_num_threads(len(cores))
            logger.info("The engine core computes on the CPUs %s itself.", cores)
        self.num_threads = torch.get_num_threads()
        model = self.vllm_config.model_config
        layers = model.get_num_layers(self.vllm_config.parallel_config)
        # Four matrices of attention, and an MLP of eight.
        self.size = 12 * layers * model.get_hidden_size() ** 2
        super()._init_executor()

    def execute_model(
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> ModelRunnerOutput | None | Future[ModelRunnerOutput | None]:
        size = scheduler_output.total_num_scheduled_tokens * self.size
        number = 1 if size < SMALL_FORWARD else self.num_threads
        if number != torch.get_num_threads():
            # vLLM has replaced `torch.set_num_threads` by a warning. Between one and
            # all of them OpenMP neither ends threads nor starts any.
            torch._C.set_num_threads(number)
        return super().execute_model(scheduler_output, non_block)


def execute_and_sample(worker: Any, scheduler_output: SchedulerOutput) -> Any:
    """A whole step, in the worker's process."""
    output = worker.execute_model(scheduler_output)
    return worker.sample_tokens(None) if output is None else output


class OneCallExecutor(MultiprocExecutor):
    """vLLM's executor of worker processes, with a step in one call.

    vLLM's engine asks three times: `execute_model`, then `sample_tokens` with the
    grammar bitmask that it filled meanwhile, then `take_draft_token_ids`. Our models
    take no bitmask and keep the canvas in the worker, so the first answer is the
    step's output.

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
