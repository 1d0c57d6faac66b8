# SPDX-License-Identifier: Apache-2.0
"""vLLM's configuration for models with causal attention and a streaming window."""

from dataclasses import replace

from vllm.config import VllmConfig

from vllm_unmask.limits import refused
from vllm_unmask.options import ServerOptions


def prepare_streaming(vllm_config: VllmConfig, options: ServerOptions) -> ServerOptions:
    """Switch off what a streaming window rules out, or refuse what was asked for.

    Returns:
        The options that hold then.

    Raises:
        ValueError: an option of vLLM's or ours that cannot be honoured.

    """
    because = "as this model has a window that moves on with every reported token"
    if options.layout == "uniform":
        raise refused(
            "layout", options.layout, "auto or exact", f"has no use, {because}"
        )
    if options.causal_kv:
        raise refused(
            "causal_kv", True, "false", "has no use, as this model's KV always is"
        )
    if (options.max_candidates or 1) > 1:
        raise refused(
            "max_candidates", options.max_candidates, "1", f"is not possible, {because}"
        )
    scheduler = vllm_config.scheduler_config
    if scheduler.async_scheduling:
        raise ValueError(
            "--async-scheduling is not supported for models with a streaming window: "
            "where a step begins depends on the step before it; remove it"
        )
    scheduler.async_scheduling = False
    return replace(options, max_candidates=1, layout="exact")
