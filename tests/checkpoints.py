# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints with seeded random weights, in the published format."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCAB = 160
MASK = 159
EOS = 158


def sdar_config(block_size: int = 4, **overrides: Any) -> dict[str, Any]:
    """The published keys of an SDAR ``config.json``, tiny.

    ``head_dim`` is not hidden / heads and ``auto_map`` names remote code that
    does not exist, so a loader that derives the one or asks for the other fails.
    """
    config = {
        "architectures": ["SDARForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "model_type": "sdar",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": block_size,
        "mask_token_id": MASK,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 96,
        "intermediate_size": 128,
        "max_position_embeddings": 1024,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCAB,
        "debug": False,
        "fuse_cross_entropy": True,
    }
    config.update(overrides)
    return {key: value for key, value in config.items() if value is not ...}


def qwen3_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Seeded random weights under Qwen3's (and SDAR's) published names."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dim = config["head_dim"]
    query, key = (
        config[f"num_{kind}_heads"] * dim for kind in ("attention", "key_value")
    )

    def matrix(*shape: int) -> torch.Tensor:
        return 0.15 * torch.randn(*shape, generator=generator)

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.1 * torch.randn(size, generator=generator)

    weights = {
        # Scaled up: near-uniform confidences would never pass a threshold.
        "model.embed_tokens.weight": 4 * matrix(config["vocab_size"], hidden),
        "model.norm.weight": norm(hidden),
        "lm_head.weight": 3 * matrix(config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            f"{prefix}self_attn.q_proj.weight": matrix(query, hidden),
            f"{prefix}self_attn.k_proj.weight": matrix(key, hidden),
            f"{prefix}self_attn.v_proj.weight": matrix(key, hidden),
            f"{prefix}self_attn.o_proj.weight": matrix(hidden, query),
            f"{prefix}self_attn.q_norm.weight": norm(dim),
            f"{prefix}self_attn.k_norm.weight": norm(dim),
            f"{prefix}mlp.gate_proj.weight": matrix(inner, hidden),
            f"{prefix}mlp.up_proj.weight": matrix(inner, hidden),
            f"{prefix}mlp.down_proj.weight": matrix(hidden, inner),
            f"{prefix}input_layernorm.weight": norm(hidden),
            f"{prefix}post_attention_layernorm.weight": norm(hidden),
        }
    return weights


def write_checkpoint(
    directory: Path, config: dict[str, Any], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Write ``config.json`` and ``model.safetensors``; returns the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = qwen3_weights(config, seed)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return weights
