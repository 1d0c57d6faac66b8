# SPDX-License-Identifier: Apache-2.0
"""Functions on a family's model class that tests run beside an engine."""

import copy
from typing import Any

import engine_calls
import torch


def loading_error(
    llm: Any,
    weights: dict[str, torch.Tensor],
    parts: int = 1,
    quantized: bool = False,
    tied: bool = False,
) -> str | None:
    """What a fresh model of the engine's class says to these weights; None: nothing.

    Args:
        parts: into how many calls of ``load_weights`` they are split, after a first
            one with all of them; 1: one call in all.
        quantized: whether the model believes that they are quantized.
        tied: whether its head is its embedding.

    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = copy.copy(engine_calls.model_runner(llm).vllm_config)
    # Layers enter themselves there by name, and the engine's own are in already.
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    config.model_config = copy.copy(config.model_config)
    hf_config = copy.deepcopy(config.model_config.hf_config)
    hf_config.tie_word_embeddings = tied
    config.model_config.hf_config = config.model_config.hf_text_config = hf_config
    with set_current_vllm_config(config), set_default_torch_dtype(torch.float32):
        model = initialize_model(config)
    model._quantized = quantized
    items = list(weights.items())
    try:
        model.load_weights(items)
        for part in range(parts if parts > 1 else 0):
            model.load_weights(items[part::parts])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def generate_flipping(
    llm: Any,
    prompts: list[list[int]],
    params: dict[str, Any],
    follows: dict[int, int],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`engine_calls.generate_recorded` of a model that never settles.

    Args:
        follows: what a position holds -> the token that it surely should hold.
    """
    from vllm_unmask.decoding.canvas import active_ids

    sampler = engine_calls.model_runner(llm).sampler
    cls = type(sampler)
    original = cls._denoise

    def denoise(self: Any, logits: torch.Tensor, rows: Any) -> Any:
        held = active_ids(self.states.gather(rows.slots)).view(-1)
        wanted = torch.tensor([follows.get(token, 0) for token in held.tolist()])
        logits[: len(held)] = 0
        logits[: len(held)].scatter_(1, wanted.unsqueeze(1), 50.0)
        return original(self, logits, rows)

    cls._denoise = denoise  # type: ignore[method-assign]
    try:
        return engine_calls.generate_recorded(llm, prompts, params)
    finally:
        cls._denoise = original  # type: ignore[method-assign]


def trusts_remote_code(llm: Any) -> bool:
    """Whether the engine was allowed to run a checkpoint's own code."""
    return bool(engine_calls.model_runner(llm).model_config.trust_remote_code)


def diffusion_counters(llm: Any) -> tuple[int, int]:
    """vLLM's counts of denoising steps and of the rows that they forwarded."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return (
        values["vllm:diffusion_num_denoising_steps"],
        values["vllm:diffusion_num_canvas_positions"],
    )
