# SPDX-License-Identifier: Apache-2.0
"""vLLM's configuration for a diffusion model on a CPU."""

import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform

IN_PROCESS = "vllm_unmask.engine.executor.InProcessExecutor"
ONE_CALL = "vllm_unmask.engine.executor.OneCallExecutor"


def set_executor(vllm_config: VllmConfig) -> None:
    """On a CPU, keep messages between processes out of a step.

    vLLM's default, "uni" for one worker, becomes "mp" later there. With the engine in
    one process, or an executor of the user's, nothing is changed.
    """
    if not current_platform.is_cpu():
        return
    parallel = vllm_config.parallel_config
    backend = parallel.distributed_executor_backend
    if backend == "mp":
        parallel.distributed_executor_backend = ONE_CALL
    elif backend == "uni" and envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        parallel.distributed_executor_backend = IN_PROCESS
