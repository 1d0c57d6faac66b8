# SPDX-License-Identifier: Apache-2.0
"""LLaDA, dense and with mixture-of-experts layers (ML-GSAI/LLaDA, inclusionAI).

Dense: Llama's network under OLMo's names, for the configuration as for the weights.
LLaDA-MoE: Qwen3-MoE's network and weight names, but the experts' weights are their
softmax over all experts, not normalised again. Full attention on a grid from the end
of the prompt; row i scores token i.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from vllm_unmask.families.full_attention import FullAttentionLM

MOE = "LLaDAMoEModelLM"


class _Keys:
    """How one of the two architectures writes its ``config.json``.

    Args:
        renamed: key there -> vLLM's name of it.
        released: values of the release, by vLLM's name, for keys that a file lacks.
        fixed: keys that change the network, and the only values that are served.
    """

    def __init__(
        self,
        renamed: Mapping[str, str],
        released: Mapping[str, Any],
        fixed: Mapping[str, tuple[Any, ...]],
    ) -> None:
        self.renamed, self.released, self.fixed = renamed, released, fixed

    def translate(self, found: dict[str, Any]) -> dict[str, Any]:
        """Keys and values for vLLM's model class.

        Raises:
            ValueError: another network.
        """
        for key, allowed in self.fixed.items():
            if key in found and found[key] not in allowed:
                raise ValueError(
                    f"{key}={found[key]!r} in config.json is not LLaDA's network: "
                    f"expected {' or '.join(map(repr, allowed))}"
                )
        values = {self.renamed.get(key, key): found[key] for key in found}
        given = {key: values[key] for key in values if values[key] is not None}
        return values | dict(self.released) | given


_DENSE = _Keys(
    renamed={
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
        "weight_tying": "tie_word_embeddings",
        "activation_type": "hidden_act",
    },
    released={
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 12288,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": 126464,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
        "pad_token_id": 126081,
    },
    fixed={
        "activation_type": ("silu",),
        "alibi": (False,),
        "attention_layer_norm": (False,),
        "block_type": ("llama",),
        "include_bias": (False,),
        "include_qkv_bias": (False,),
        "input_emb_norm": (False,),
        "layer_norm_type": ("rms",),
        "multi_query_attention": (None, False),
        "rope": (True,),
        "scale_logits": (False,),
    },
)
_MIXTURE = _Keys(
    renamed={
        "expert_intermediate_size": "moe_intermediate_size",
        "dense_intermediate_size": "intermediate_size",
    },
    released={
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "intermediate_size": 8192,
        "moe_intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_layer_freq": 1,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "vocab_size": 157184,
        "mask_token_id": 156895,
        "eos_token_id": 156892,
        "pad_token_id": 156892,
    },
    fixed={
        "attention_bias": (None, False),
        "clip_qkv": (None,),
        "hidden_act": ("silu",),
        "moe_router_enable_expert_bias": (None, False),
        "moe_router_score_function": (None, "softmax"),
        "partial_rotary_factor": (None, -1, 1),
        "qk_layernorm": (True,),
        "shared_expert_intermediate_size": (None, 0),
        "sliding_window": (None,),
    },
)


class LLaDAConfig(PretrainedConfig):
    """``config.json`` of a LLaDA or LLaDA-MoE checkpoint: they share a model type.

    Keys get the names by which vLLM's classes know them. Neither names a block size;
    32 is what Fast-dLLM and LLaDA's own chat use.

    Raises:
        ValueError: a network that is not LLaDA's.

    """

    model_type = "llada"

    def __init__(self, block_size: int = 32, **kwargs: Any) -> None:
        is_moe = MOE in (kwargs.get("architectures") or ())
        values = (_MIXTURE if is_moe else _DENSE).translate(kwargs)
        theta = values.pop("rope_theta")
        if not values.get("rope_parameters"):
            self.rope_theta = theta
        if is_moe:
            layers, frequency = values["num_hidden_layers"], values["moe_layer_freq"]
            if isinstance(frequency, int):
                frequency = [int(i % frequency == 0) for i in range(layers)]
            values["mlp_only_layers"] = [i for i in range(layers) if not frequency[i]]
            # The network has no such step, whatever the file says.
            values |= {"norm_topk_prob": False, "decoder_sparse_step": 1}
            # vLLM's class takes no None.
            values["shared_expert_intermediate_size"] = 0
        else:
            heads = values["num_attention_heads"]
            values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
            values["head_dim"] = values["hidden_size"] // heads
            # Ids from here on have weights, and are no tokens.
            self.num_ids = values["vocab_size"]
            values["vocab_size"] = values.get("embedding_size") or self.num_ids
        super().__init__(**values)
        self.block_size = block_size
        # vLLM tells a diffusion model by this attribute.
        self.canvas_length = block_size


# Module of a block in a checkpoint -> in vLLM's Llama; the same outside of blocks.
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_TO_VLLM = WeightsMapper(
    orig_to_new_regex={
        re.compile(rf"^model\.transformer\.blocks\.(\d+)\.{module}\."): (
            rf"model.layers.\1.{name}."
        )
        for module, name in _IN_BLOCK.items()
    }
    | {
        re.compile(rf"^model\.transformer\.{module}\."): f"{name}."
        for module, name in _OUTSIDE.items()
    }
)


class LLaDAModelLM(FullAttentionLM, LlamaForCausalLM):
    """Llama, loaded from OLMo's names, with the canvas of a full-attention model."""

    hf_to_vllm_mapper = _TO_VLLM | LlamaForCausalLM.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._num_ids: int = vllm_config.model_config.hf_config.num_ids

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = super().compute_logits(hidden_states)
        if logits is not None:
            logits[:, self._num_ids :] = -torch.inf
        return logits

    def checkpoint_name(self, name: str) -> str:
        head, kind = name.rsplit(".", 1)
        if match := re.match(r"model\.layers\.(\d+)\.(.+)", head):
            module = next(m for m, n in _IN_BLOCK.items() if n == match[2])
            return f"model.transformer.blocks.{match[1]}.{module}.{kind}"
        module = next(m for m, n in _OUTSIDE.items() if n == head)
        return f"model.transformer.{module}.{kind}"

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=_TO_VLLM)


class LLaDAMoEModelLM(FullAttentionLM, Qwen3MoeForCausalLM):
    """Qwen3-MoE with the canvas of a full-attention model."""

    # vLLM's class adds to this mapping when it is built: not to its own.
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"]
    }
