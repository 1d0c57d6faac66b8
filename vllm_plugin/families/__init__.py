# SPDX-License-Identifier: Apache-2.0
"""The model families: one file each, listed here without importing them."""

from collections.abc import Callable
from typing import NamedTuple


class Family(NamedTuple):
    """What a family is called, and where vLLM finds its classes."""

    architecture: str  # of config.json, as is model_type
    model_type: str
    config_cls: str  # module:Class
    model_cls: str
    checkpoints: str  # the published ones
    presets: tuple[str, ...]  # strategies of the model cards, the first recommended
    exact: str  # what equals the published computation
    approximate: str  # what does not, or is not known to
    # What a position sees: "block_causal", its block and what lies before it, on a
    # grid from position 0; "full", everything, on a grid from the prompt's end; or
    # "causal", what was decided before it, in a window that moves on.
    attention: str = "block_causal"


FAMILIES: tuple[Family, ...] = (
    Family(
        "SDARForCausalLM",
        "sdar",
        "vllm_unmask.families.sdar:SDARConfig",
        "vllm_unmask.families.sdar:SDARForCausalLM",
        checkpoints="SDAR 1.7B, 4B, 8B (Chat, -b4 to -b64); TraDo 4B, 8B; TDAR 8B",
        presets=("sdar", "sdar_entropy", "tdar"),
        exact="logits, KV and prefix cache, as of the whole sequence in one forward",
        approximate="cache=sub_block; TraDo's and TDAR's config.json was not seen",
    ),
    Family(
        "SDARMoeForCausalLM",
        "sdar_moe",
        "vllm_unmask.families.sdar_moe:SDARMoeConfig",
        "vllm_unmask.families.sdar_moe:SDARMoeForCausalLM",
        checkpoints="SDAR-30B-A3B (Chat, Chat-b32, Sci)",
        presets=("sdar", "sdar_entropy"),
        exact="logits, KV and prefix cache, as of the whole sequence in one forward",
        approximate="cache=sub_block; the release's config.json was not seen",
    ),
    Family(
        "LLaDA2MoeModelLM",
        "llada2_moe",
        "vllm_unmask.families.llada2:LLaDA2MoeConfig",
        "vllm_unmask.families.llada2:LLaDA2MoeModelLM",
        checkpoints="LLaDA2.0 and 2.1, mini and flash",
        presets=("llada2", "llada21_quality", "llada21_speed"),
        exact="logits (router in float32), KV and prefix cache, as of the whole "
        "sequence in one forward",
        approximate="cache=sub_block; LLaDA2.1's config.json was not seen; LLaDA2.2's "
        "insertions and deletions are not served",
    ),
    Family(
        "Fast_dLLM_QwenForCausalLM",
        "Fast_dLLM_Qwen",
        "vllm_unmask.families.fast_dllm_v2:FastDLLMConfig",
        "vllm_unmask.families.fast_dllm_v2:FastDLLMForCausalLM",
        checkpoints="Fast_dLLM_v2 1.5B, 7B",
        presets=("fast_dllm_v2", "s2d2_fast_dllm_v2", "s2d2_fast_dllm_v2_32"),
        exact="logits, KV and prefix cache, as of the whole sequence in one forward; a "
        "block's first token comes alone, as published, but by the request's "
        "temperature",
        approximate="cache=sub_block, the release's sub-block cache; the release's "
        "config.json was not seen",
    ),
    Family(
        "LLaDAModelLM",
        "llada",
        "vllm_unmask.families.llada:LLaDAConfig",
        "vllm_unmask.families.llada:LLaDAModelLM",
        checkpoints="LLaDA 8B (Base, Instruct), LLaDA 1.5",
        presets=("fast_dllm", "llada", "klass_llada"),
        exact="logits, as of prompt and canvas in one forward, with cache=none",
        approximate="cache=prefix and cache=dual, as in Fast-dLLM; what lies beyond "
        "`window`; the config.json of Base and 1.5 was not seen",
        attention="full",
    ),
    Family(
        "LLaDAMoEModelLM",
        "llada",
        "vllm_unmask.families.llada:LLaDAConfig",
        "vllm_unmask.families.llada:LLaDAMoEModelLM",
        checkpoints="LLaDA-MoE-7B-A1B (Base, Instruct)",
        presets=("fast_dllm", "llada"),
        exact="logits, as of prompt and canvas in one forward, with cache=none",
        approximate="cache=prefix and cache=dual, as in Fast-dLLM; what lies beyond "
        "`window`; the release's config.json was not seen",
        attention="full",
    ),
    Family(
        "DreamModel",
        "Dream",
        "vllm_unmask.families.dream:DreamConfig",
        "vllm_unmask.families.dream:DreamModel",
        checkpoints="Dream-v0 7B (Base, Instruct), Dream-Coder 7B, DiffuCoder 7B",
        presets=("fast_dllm", "dream_entropy", "dream_margin", "klass_dream"),
        exact="logits, as of prompt and canvas in one forward, with cache=none",
        approximate="cache=prefix and cache=dual, as in Fast-dLLM; what lies beyond "
        "`window`; steps are counted in blocks, not over the whole canvas; the "
        "release's config.json was not seen",
        attention="full",
    ),
    Family(
        "WeDLMForCausalLM",
        "wedlm",
        "vllm_unmask.families.wedlm:WeDLMConfig",
        "vllm_unmask.families.wedlm:WeDLMForCausalLM",
        checkpoints="WeDLM 7B, 8B (Base, Instruct)",
        presets=("wedlm",),
        exact="logits, KV and prefix cache, as of the whole sequence in one forward",
        approximate="nothing; the release's config.json was not seen",
        attention="causal",
    ),
)


def family_of(architecture: str) -> Family:
    """The family of an architecture that is one of ours."""
    return next(f for f in FAMILIES if f.architecture == architecture)


CONFIG_HOOK = "vllm_unmask.families.config_hook:BlockDiffusionConfigHook"

# Called when one of our models is configured: in the front end, and before anything
# of vLLM's that serves it exists. Registration puts the patches here.
ON_SERVED: list[Callable[[], None]] = []
