# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints with seeded random weights, in the published format."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]

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


def sdar_moe_config(block_size: int = 4, **overrides: Any) -> dict[str, Any]:
    """The published keys of an SDAR-MoE ``config.json``, tiny.

    The first layer is dense. Hidden and expert sizes are multiples of 32, which
    vLLM's experts ask for on a CPU.
    """
    return sdar_config(
        block_size,
        **{
            "architectures": ["SDARMoeForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
                "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
            },
            "model_type": "sdar_moe",
            "num_hidden_layers": 3,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
        | overrides,
    )


def llada2_config(block_size: int = 4, **overrides: Any) -> dict[str, Any]:
    """The published keys of a LLaDA2 ``config.json``, tiny.

    Like the published file it says nothing of ``use_qk_norm``. It does name the
    block size and the special ids, as their published values are out of its
    vocabulary.
    """
    config = {
        "architectures": ["LLaDA2MoeModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
            "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
        },
        "model_type": "llada2_moe",
        "block_size": block_size,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "first_k_dense_replace": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 96,
        "intermediate_size": 128,
        "max_position_embeddings": 1024,
        "max_window_layers": 28,
        "moe_intermediate_size": 32,
        "moe_router_enable_expert_bias": True,
        "n_group": 4,
        "norm_head": False,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_shared_experts": 1,
        "output_dropout": 0.0,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "rotary_dim": 16,
        "routed_scaling_factor": 2.5,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "topk_group": 2,
        "torch_dtype": "float32",
        "use_bias": False,
        "use_cache": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
    }
    config.update(overrides)
    return {key: value for key, value in config.items() if value is not ...}


def fast_dllm_v2_config(bd_size: int = 4, **overrides: Any) -> dict[str, Any]:
    """The keys of a Fast-dLLM v2 ``config.json``, tiny, with a mask token."""
    config = {
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
        },
        "model_type": "Fast_dLLM_Qwen",
        "attention_dropout": 0.0,
        "bd_size": bd_size,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 96,
        "layer_types": ["full_attention"] * 2,
        "max_position_embeddings": 1024,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
    }
    config.update(overrides)
    return {key: value for key, value in config.items() if value is not ...}


def dream_config(block_size: Any = ..., **overrides: Any) -> dict[str, Any]:
    """The keys of a Dream ``config.json``, tiny. The published one has no block size.

    It says that the model is not causal, which must not make an encoder of it.
    """
    dream = {
        "architectures": ["DreamModel"],
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        "model_type": "Dream",
        "bd_size": ...,
        "block_size": block_size,
        "is_causal": False,
        "layer_types": ...,
        "use_cache": False,
    }
    return fast_dllm_v2_config(**(dream | overrides))


def llada_config(block_size: Any = ..., **overrides: Any) -> dict[str, Any]:
    """The published keys of a LLaDA ``config.json``, tiny.

    OLMo's names. The published file has no block size.
    """
    config = {
        "architectures": ["LLaDAModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "model_type": "llada",
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "block_group_size": 1,
        "block_size": block_size,
        "block_type": "llama",
        "d_model": 128,
        "embedding_dropout": 0.0,
        "embedding_size": VOCAB,
        "eos_token_id": EOS,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_device": "meta",
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASK,
        "max_sequence_length": 1024,
        "mlp_hidden_size": 96,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 2,
        "pad_token_id": EOS,
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 10000.0,
        "scale_logits": False,
        "use_cache": False,
        "vocab_size": VOCAB,
        "weight_tying": False,
        "torch_dtype": "float32",
    }
    config.update(overrides)
    if "vocab_size" in overrides:
        config["embedding_size"] = overrides.get("embedding_size", config["vocab_size"])
    return {key: value for key, value in config.items() if value is not ...}


def llada_moe_config(block_size: Any = ..., **overrides: Any) -> dict[str, Any]:
    """The keys of a LLaDA-MoE ``config.json``, tiny.

    It asks for normalised weights of the experts, which the network does not have.
    The first layer is dense.
    """
    config = {
        "architectures": ["LLaDAMoEModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_lladamoe.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
        },
        "model_type": "llada",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": block_size,
        "clip_qkv": None,
        "dense_intermediate_size": 128,
        "eos_token_id": EOS,
        "expert_intermediate_size": 32,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 96,
        "mask_token_id": MASK,
        "max_position_embeddings": 1024,
        "moe_layer_freq": [0, 1, 1],
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "pad_token_id": EOS,
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.5,
        "shared_expert_intermediate_size": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": False,
        "vocab_size": VOCAB,
    }
    config.update(overrides)
    return {key: value for key, value in config.items() if value is not ...}


def wedlm_config(block_size: int = 16, **overrides: Any) -> dict[str, Any]:
    """The keys of a WeDLM ``config.json``, tiny: the 7B model's, which has biases.

    The published file names no block size, and may have a null for the mask token.
    """
    config = {
        "architectures": ["WeDLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_wedlm.WeDLMConfig",
            "AutoModelForCausalLM": "modeling_wedlm.WeDLMForCausalLM",
        },
        "model_type": "wedlm",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "block_size": block_size,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 96,
        "max_position_embeddings": 1024,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "qk_norm": False,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
    }
    config.update(overrides)
    return {key: value for key, value in config.items() if value is not ...}


class _Draw:
    """Seeded random tensors."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def matrix(self, *shape: int) -> torch.Tensor:
        return 0.15 * torch.randn(*shape, generator=self._generator)

    def norm(self, size: int) -> torch.Tensor:
        return 1 + 0.1 * torch.randn(size, generator=self._generator)

    def ends(self, config: dict[str, Any], embedding: str) -> Weights:
        """Embedding, last norm and head."""
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        return {
            # Scaled up: near-uniform confidences would never pass a threshold.
            f"model.{embedding}.weight": 4 * self.matrix(vocab, hidden),
            "model.norm.weight": self.norm(hidden),
            "lm_head.weight": 3 * self.matrix(vocab, hidden),
        }

    def attention(self, config: dict[str, Any], prefix: str) -> Weights:
        """The attention of Qwen3, or that of Qwen2, which has biases."""
        hidden = config["hidden_size"]
        heads = config["num_attention_heads"]
        dim = config.get("head_dim", hidden // heads)
        query, key = heads * dim, config["num_key_value_heads"] * dim
        prefix = f"{prefix}self_attn."
        weights = {
            f"{prefix}q_proj.weight": self.matrix(query, hidden),
            f"{prefix}k_proj.weight": self.matrix(key, hidden),
            f"{prefix}v_proj.weight": self.matrix(key, hidden),
            f"{prefix}o_proj.weight": self.matrix(hidden, query),
        }
        if "head_dim" not in config:
            # As large as what they are added to.
            return weights | {
                f"{prefix}q_proj.bias": 5 * self.matrix(query),
                f"{prefix}k_proj.bias": 5 * self.matrix(key),
                f"{prefix}v_proj.bias": 5 * self.matrix(key),
            }
        return weights | {
            f"{prefix}q_norm.weight": self.norm(dim),
            f"{prefix}k_norm.weight": self.norm(dim),
        }

    def mlp(self, hidden: int, inner: int, prefix: str) -> Weights:
        """A gated MLP: of a dense layer or of one expert."""
        return {
            f"{prefix}.gate_proj.weight": self.matrix(inner, hidden),
            f"{prefix}.up_proj.weight": self.matrix(inner, hidden),
            f"{prefix}.down_proj.weight": self.matrix(hidden, inner),
        }

    def experts(self, config: dict[str, Any], prefix: str) -> Weights:
        """Router and experts, with logits that are far from equal."""
        hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
        weights = {
            f"{prefix}.gate.weight": 2 * self.matrix(config["num_experts"], hidden)
        }
        for expert in range(config["num_experts"]):
            weights |= self.mlp(hidden, inner, f"{prefix}.experts.{expert}")
        return weights

    def layer_norms(self, config: dict[str, Any], prefix: str) -> Weights:
        return {
            f"{prefix}{name}_layernorm.weight": self.norm(config["hidden_size"])
            for name in ("input", "post_attention")
        }


def qwen_weights(config: dict[str, Any], seed: int) -> Weights:
    """Seeded random weights under Qwen2's and Qwen3's names, MoE or dense."""
    draw = _Draw(seed)
    weights = draw.ends(config, "embed_tokens")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= draw.attention(config, prefix)
        if layer in config.get("mlp_only_layers", [layer]):
            sizes = config["hidden_size"], config["intermediate_size"]
            weights |= draw.mlp(*sizes, f"{prefix}mlp")
        else:
            weights |= draw.experts(config, f"{prefix}mlp")
        weights |= draw.layer_norms(config, prefix)
    return weights


def llada2_weights(config: dict[str, Any], seed: int) -> Weights:
    """Seeded random weights under LLaDA2's published names, QKV in one tensor."""
    draw = _Draw(seed)
    hidden, dim = config["hidden_size"], config["head_dim"]
    query, key = (
        config[f"num_{kind}_heads"] * dim for kind in ("attention", "key_value")
    )
    shared = config["num_shared_experts"] * config["moe_intermediate_size"]
    weights = draw.ends(config, "word_embeddings")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            f"{prefix}attention.query_key_value.weight": draw.matrix(
                query + 2 * key, hidden
            ),
            f"{prefix}attention.dense.weight": draw.matrix(hidden, query),
            f"{prefix}attention.query_layernorm.weight": draw.norm(dim),
            f"{prefix}attention.key_layernorm.weight": draw.norm(dim),
        }
        mlp = f"{prefix}mlp"
        if layer < config["first_k_dense_replace"]:
            weights |= draw.mlp(hidden, config["intermediate_size"], mlp)
        else:
            weights |= draw.experts(config, mlp)
            # As large as the scores' own spread, so that it changes choices.
            weights[f"{mlp}.gate.expert_bias"] = 2 * draw.matrix(config["num_experts"])
            weights |= draw.mlp(hidden, shared, f"{mlp}.shared_experts")
        weights |= draw.layer_norms(config, prefix)
    return weights


def llada_weights(config: dict[str, Any], seed: int) -> Weights:
    """Seeded random weights under LLaDA's published names."""
    draw = _Draw(seed)
    hidden, inner = config["d_model"], config["mlp_hidden_size"]
    key = hidden * (config["n_kv_heads"] or config["n_heads"]) // config["n_heads"]
    vocab, root = config["embedding_size"], "model.transformer"
    weights = {
        f"{root}.wte.weight": 4 * draw.matrix(vocab, hidden),
        f"{root}.ln_f.weight": draw.norm(hidden),
        f"{root}.ff_out.weight": 3 * draw.matrix(vocab, hidden),
    }
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "attn_out": (hidden, hidden),
        "ff_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "ff_out": (hidden, inner),
    }
    for layer in range(config["n_layers"]):
        prefix = f"{root}.blocks.{layer}"
        for name, shape in shapes.items():
            weights[f"{prefix}.{name}.weight"] = draw.matrix(*shape)
        for name in ("attn_norm", "ff_norm"):
            weights[f"{prefix}.{name}.weight"] = draw.norm(hidden)
    return weights


def llada_moe_weights(config: dict[str, Any], seed: int) -> Weights:
    """Seeded random weights of LLaDA-MoE, under Qwen3-MoE's names."""
    dense = [i for i, is_moe in enumerate(config["moe_layer_freq"]) if not is_moe]
    renamed = {
        "mlp_only_layers": dense,
        "intermediate_size": config["dense_intermediate_size"],
        "moe_intermediate_size": config["expert_intermediate_size"],
    }
    return qwen_weights(config | renamed, seed)


WEIGHTS = {
    "LLaDA2MoeModelLM": llada2_weights,
    "LLaDAModelLM": llada_weights,
    "LLaDAMoEModelLM": llada_moe_weights,
}


def write_checkpoint(directory: Path, config: dict[str, Any], seed: int = 0) -> Weights:
    """Write ``config.json`` and ``model.safetensors``; returns the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = WEIGHTS.get(config["architectures"][0], qwen_weights)(config, seed)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return weights
