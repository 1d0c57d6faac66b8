# SPDX-License-Identifier: Apache-2.0
"""The networks of the families in plain torch, from the models' own descriptions.

Independent of vLLM, of transformers and of the plugin: one token after the other
through its experts, no fused tensors.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from checkpoints import (
    dream_config,
    fast_dllm_v2_config,
    llada2_config,
    llada_config,
    llada_moe_config,
    sdar_config,
    sdar_moe_config,
    wedlm_config,
)
from dense_reference import (
    Choose,
    Weights,
    attend,
    decode,
    decode_full,
    decode_streaming,
    dense_logits,
    first_alone,
    gated_mlp,
    rms_norm,
    rotate,
)

Config = dict[str, Any]


def _mixture(
    weights: Weights,
    name: str,
    x: torch.Tensor,
    route: Callable[[torch.Tensor], dict[int, float]],
) -> torch.Tensor:
    """The weighted sum of the experts that ``route`` chooses for each row of ``x``."""
    logits = x.float() @ weights[f"{name}.gate.weight"].float().T
    rows = []
    for row, scores in zip(x, logits, strict=True):
        chosen = route(scores)
        rows.append(
            sum(
                weight * gated_mlp(weights, f"{name}.experts.{expert}", row)
                for expert, weight in chosen.items()
            )
        )
    return torch.stack(rows)


def _softmax_route(config: Config, logits: torch.Tensor) -> dict[int, float]:
    """Qwen3-MoE and SDAR-MoE: the likeliest few, renormalised."""
    probability = logits.softmax(-1).tolist()
    best = sorted(range(len(probability)), key=lambda e: -probability[e])
    best = best[: config["num_experts_per_tok"]]
    total = sum(probability[e] for e in best)
    return {e: probability[e] / total for e in best}


def _grouped_route(
    config: Config, bias: list[float], logits: torch.Tensor
) -> dict[int, float]:
    """LLaDA2: the best groups, of them the best experts, scaled scores without bias."""
    score = logits.sigmoid().tolist()
    biased = [s + b for s, b in zip(score, bias, strict=True)]
    size = len(score) // config["n_group"]
    groups = [range(size * g, size * (g + 1)) for g in range(config["n_group"])]
    groups.sort(key=lambda g: -sum(sorted(biased[e] for e in g)[-2:]))
    open_experts = [e for group in groups[: config["topk_group"]] for e in group]
    open_experts.sort(key=lambda e: -biased[e])
    best = open_experts[: config["num_experts_per_tok"]]
    total = sum(score[e] for e in best) + 1e-20
    return {e: score[e] / total * config["routed_scaling_factor"] for e in best}


def sdar_moe_feed_forward(
    config: Config, weights: Weights, name: str, x: torch.Tensor
) -> torch.Tensor:
    if int(name.split(".")[2]) in config["mlp_only_layers"]:
        return gated_mlp(weights, name, x)
    return _mixture(weights, name, x, partial(_softmax_route, config))


def llada2_feed_forward(
    config: Config, weights: Weights, name: str, x: torch.Tensor
) -> torch.Tensor:
    """Experts beside the shared one, but in the first layers."""
    if int(name.split(".")[2]) < config["first_k_dense_replace"]:
        return gated_mlp(weights, name, x)
    bias = weights[f"{name}.gate.expert_bias"].tolist()
    mixed = _mixture(weights, name, x, partial(_grouped_route, config, bias))
    return mixed + gated_mlp(weights, f"{name}.shared_experts", x)


def llada2_logits(
    config: Config, weights: Weights, ids: list[int], mask: torch.Tensor
) -> torch.Tensor:
    """Logits [sequence, vocab] of LLaDA2 under an explicit mask."""
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, rotated = config["head_dim"], config["rotary_dim"]
    x = weights["model.word_embeddings.weight"][torch.tensor(ids)]

    def rotate_first(t: torch.Tensor) -> torch.Tensor:
        return torch.cat((rotate(t[..., :rotated], theta), t[..., rotated:]), -1)

    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"

        def get(part: str, name: str = name) -> torch.Tensor:
            return weights[f"{name}.{part}.weight"]

        h = rms_norm(x, get("input_layernorm"), eps)
        qkv = (h @ get("attention.query_key_value").T).view(len(ids), -1, dim)
        q, k, v = qkv.transpose(0, 1).split([heads, kv_heads, kv_heads])
        q = rotate_first(rms_norm(q, get("attention.query_layernorm"), eps))
        k = rotate_first(rms_norm(k, get("attention.key_layernorm"), eps))
        x = x + attend(q, k, v, mask) @ get("attention.dense").T
        h = rms_norm(x, get("post_attention_layernorm"), eps)
        x = x + llada2_feed_forward(config, weights, f"{name}.mlp", h)
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def llada_logits(
    config: Config, weights: Weights, ids: list[int], mask: torch.Tensor
) -> torch.Tensor:
    """Logits [sequence, ids] of LLaDA under an explicit mask."""
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    heads = config["n_heads"]
    x = weights["model.transformer.wte.weight"][torch.tensor(ids)]

    def split(t: torch.Tensor) -> torch.Tensor:
        return t.view(len(ids), heads, -1).transpose(0, 1)

    for layer in range(config["n_layers"]):

        def get(part: str, layer: int = layer) -> torch.Tensor:
            return weights[f"model.transformer.blocks.{layer}.{part}.weight"]

        h = rms_norm(x, get("attn_norm"), eps)
        q, k = (rotate(split(h @ get(f"{n}_proj").T), theta) for n in "qk")
        v = split(h @ get("v_proj").T)
        x = x + attend(q, k, v, mask) @ get("attn_out").T
        h = rms_norm(x, get("ff_norm"), eps)
        gate = torch.nn.functional.silu(h @ get("ff_proj").T)
        x = x + (gate * (h @ get("up_proj").T)) @ get("ff_out").T
    x = rms_norm(x, weights["model.transformer.ln_f.weight"], eps)
    return (x @ weights["model.transformer.ff_out.weight"].T)[:, : config["vocab_size"]]


def _llada_moe_feed_forward(
    config: Config, weights: Weights, name: str, x: torch.Tensor
) -> torch.Tensor:
    """The likeliest few experts, each by its share of all."""
    if not config["moe_layer_freq"][int(name.split(".")[2])]:
        return gated_mlp(weights, name, x)

    def route(logits: torch.Tensor) -> dict[int, float]:
        probability = logits.softmax(-1).tolist()
        best = sorted(range(len(probability)), key=lambda e: -probability[e])
        return {e: probability[e] for e in best[: config["num_experts_per_tok"]]}

    return _mixture(weights, name, x, route)


def shifted_logits(*args: Any) -> torch.Tensor:
    """Logits [sequence, vocab] where row i - 1 of a Qwen2 network scores token i."""
    logits = dense_logits(*args)
    return torch.cat((logits[:1], logits[:-1]))


def _as_it_is(choose: Choose) -> Choose:
    return choose


class Reference(NamedTuple):
    """What a test needs to know of a family."""

    config: Callable[..., Config]  # (block size, **overrides) -> config.json
    # (config, weights, ids, mask) -> row i of position i
    logits: Callable[..., torch.Tensor]
    order: Callable[[Choose], Choose] = _as_it_is  # what it does with every rule
    shifted: bool = False
    # (config, weights, prompt, max_tokens, **options) -> output tokens, forwards
    decode: Callable[..., tuple[list[int], int]] = decode


REFERENCES = {
    "SDARForCausalLM": Reference(sdar_config, dense_logits),
    "SDARMoeForCausalLM": Reference(
        sdar_moe_config, partial(dense_logits, feed_forward=sdar_moe_feed_forward)
    ),
    "LLaDA2MoeModelLM": Reference(llada2_config, llada2_logits),
    "Fast_dLLM_QwenForCausalLM": Reference(
        fast_dllm_v2_config, shifted_logits, first_alone, shifted=True
    ),
    "LLaDAModelLM": Reference(llada_config, llada_logits, decode=decode_full),
    "LLaDAMoEModelLM": Reference(
        llada_moe_config,
        partial(dense_logits, feed_forward=_llada_moe_feed_forward),
        decode=decode_full,
    ),
    "DreamModel": Reference(
        dream_config, shifted_logits, shifted=True, decode=decode_full
    ),
    "WeDLMForCausalLM": Reference(wedlm_config, dense_logits, decode=decode_streaming),
}
