# SPDX-License-Identifier: Apache-2.0
"""The choice of a scheduler."""

from typing import Any

from vllm_unmask.engine.async_scheduler import BlockDiffusionAsyncScheduler
from vllm_unmask.engine.full_scheduler import FullAttentionScheduler
from vllm_unmask.engine.reporting_scheduler import ReportingScheduler
from vllm_unmask.engine.scheduler import BlockDiffusionScheduler
from vllm_unmask.engine.streaming_scheduler import StreamingScheduler


def create_scheduler(*args: Any, **kwargs: Any) -> BlockDiffusionScheduler:
    """The scheduler for the model's attention and the engine's mode.

    The mode is decided after our config hook, which names this function to vLLM.
    """
    config = kwargs["vllm_config"]
    attention = config.model_config.hf_config.unmask_served["attention"]
    cls: type[BlockDiffusionScheduler] = ReportingScheduler
    if attention == "full":
        cls = FullAttentionScheduler
    elif attention == "causal":
        cls = StreamingScheduler
    elif config.scheduler_config.async_scheduling:
        cls = BlockDiffusionAsyncScheduler
    return cls(*args, **kwargs)
