# SPDX-License-Identifier: Apache-2.0
"""vLLM's configuration where every position of a model sees every other one.

Then the keys and values of a prompt depend on the canvas behind it, and a canvas is
forwarded whole or not at all.
"""

from dataclasses import replace

from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_unmask.limits import refused
from vllm_unmask.options import ServerOptions

logger = init_logger("vllm.vllm_unmask.families.full_config")


def prepare_full_attention(
    vllm_config: VllmConfig, options: ServerOptions
) -> ServerOptions:
    """Switch off what full attention rules out, or refuse it where it was asked for.

    Returns:
        The options that hold then.

    Raises:
        ValueError: an option of vLLM's or ours that cannot be honoured.

    """
    _refuse_options(options)
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    if scheduler.async_scheduling:
        raise ValueError(
            "--async-scheduling is not supported for models with full attention: what "
            "a step forwards depends on the step before it; remove it"
        )
    scheduler.async_scheduling = False
    if scheduler.long_prefill_token_threshold:
        raise ValueError(
            f"--long-prefill-token-threshold {scheduler.long_prefill_token_threshold} "
            "is not supported for models with full attention: they forward a prompt "
            "whole; remove it"
        )
    if cache.enable_prefix_caching:
        # vLLM does not tell whether the user asked for it.
        logger.info("Prefix caching is off: a prompt's KV depends on what follows it.")
        cache.enable_prefix_caching = False
    _fit_context(vllm_config)
    return replace(options, layout="exact")


def _refuse_options(options: ServerOptions) -> None:
    because = "as in this model every position sees every other one"
    if options.layout == "uniform":
        raise refused(
            "layout", options.layout, "auto or exact", f"is not possible, {because}"
        )
    if options.causal_kv:
        raise refused("causal_kv", True, "false", f"is not possible, {because}")


def _fit_context(vllm_config: VllmConfig) -> None:
    """Make the context what one forward can hold."""
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    if model.max_model_len <= budget:
        return
    if model.original_max_model_len not in (None, -1, budget):
        raise ValueError(
            f"--max-model-len {model.original_max_model_len} is more than "
            f"--max-num-batched-tokens {budget}: a model with full attention forwards "
            "prompt and canvas in one step; lower the one or raise the other"
        )
    logger.info(
        "The context is %d tokens, as many as --max-num-batched-tokens, of the "
        "model's %d: with full attention prompt and canvas are forwarded in one step.",
        budget,
        model.max_model_len,
    )
    model.max_model_len = budget
