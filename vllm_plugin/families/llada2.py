# SPDX-License-Identifier: Apache-2.0
"""LLaDA2.0 and 2.1, mini and flash (inclusionAI/LLaDA2.X).

Ling 2.0's network and weight names, written with vLLM's layers: grouped-query
attention whose queries and keys are normalised, then rotated in their first channels;
one dense layer, then mixtures of experts with a shared one. Block-causal attention on
a grid from position 0; row i scores token i.

vLLM's BailingMoeV2ForCausalLM is the same network, but rounds the router's logits to
the activations' type, where the release keeps float32.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PretrainedConfig
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.qwen3_moe import Qwen3MoeMLP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    extract_layer_index,
    make_layers,
    maybe_prefix,
)

from vllm_unmask.families.block_causal import BlockCausalLM

# Keys of config.json that change the network, and the values of every release.
_RELEASED = {
    "hidden_act": "silu",
    "moe_router_enable_expert_bias": True,
    "norm_head": False,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
}


class LLaDA2MoeConfig(PretrainedConfig):
    """``config.json`` of a LLaDA2 checkpoint.

    Published files lack the block size and the special ids; the release's values
    stand in for them. ``use_qk_norm``, of which copies disagree, is not read: the
    release normalises queries and keys whatever it says.

    Raises:
        ValueError: a network that is not LLaDA2's.

    """

    model_type = "llada2_moe"

    def __init__(
        self,
        block_size: int = 32,
        mask_token_id: int | None = 156895,
        eos_token_id: int | list[int] | None = 156892,
        head_dim: int = 128,
        rope_theta: float = 600000.0,
        partial_rotary_factor: float = 0.5,
        rotary_dim: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        for key, released in _RELEASED.items():
            if kwargs.setdefault(key, released) != released:
                raise ValueError(
                    f"{key}={kwargs[key]!r} in config.json is not LLaDA2's network: "
                    f"expected {released!r}"
                )
        if rotary_dim not in (None, int(head_dim * partial_rotary_factor)):
            raise ValueError(
                f"rotary_dim={rotary_dim} in config.json contradicts "
                f"partial_rotary_factor={partial_rotary_factor} of head_dim={head_dim}"
            )
        if not kwargs.get("rope_parameters"):
            # vLLM puts them, and `rope_scaling`, together in `rope_parameters`.
            self.rope_theta = rope_theta
            self.partial_rotary_factor = partial_rotary_factor
        self.head_dim = head_dim
        super().__init__(
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        # vLLM tells a diffusion model by this attribute.
        self.canvas_length = block_size


class LLaDA2Attention(nn.Module):
    """Q, K and V from one tensor: all queries, all keys, all values."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        self.head_dim = config.head_dim
        self.query_key_value = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.query_key_value",
        )
        num_heads = self.query_key_value.num_heads
        num_kv_heads = self.query_key_value.num_kv_heads
        heads = [num_heads, num_kv_heads, num_kv_heads]
        self.sizes = [n * self.head_dim for n in heads]
        self.query_layernorm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        # Rotates the first `partial_rotary_factor` of the channels.
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        self.attn = Attention(
            num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        self.dense = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.dense",
        )

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.query_key_value(x)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q = self.query_layernorm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        k = self.key_layernorm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.dense(self.attn(q, k, v))
        return output


def _mlp(
    vllm_config: VllmConfig, inner: int, prefix: str, reduce: bool = True
) -> nn.Module:
    """SwiGLU: the first layers' feed-forward network, and the shared experts."""
    config = vllm_config.model_config.hf_config
    return Qwen3MoeMLP(
        config.hidden_size,
        inner,
        config.hidden_act,
        vllm_config.quant_config,
        reduce_results=reduce,
        prefix=prefix,
    )


class LLaDA2MoE(nn.Module):
    """Routed experts and shared ones.

    Scores are sigmoids of float32 logits. The bias takes part in the choice alone:
    first of the groups with the best two biased scores in sum, then of the experts.
    The chosen scores, without the bias, are scaled to ``routed_scaling_factor`` in
    sum. The shared experts are added as they are.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.gate = GateLinear(
            config.hidden_size,
            config.num_experts,
            out_dtype=torch.float32,
            force_fp32_compute=True,
            prefix=f"{prefix}.gate",
        )
        self.gate.expert_bias = nn.Parameter(
            torch.empty(config.num_experts, dtype=torch.float32)
        )
        self.shared_experts = _mlp(
            vllm_config,
            config.num_shared_experts * config.moe_intermediate_size,
            f"{prefix}.shared_experts",
            # The sum with the routed experts is reduced.
            reduce=False,
        )
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=True,
            use_grouped_topk=True,
            num_expert_group=config.n_group,
            topk_group=config.topk_group,
            scoring_func="sigmoid",
            routed_scaling_factor=config.routed_scaling_factor,
            e_score_correction_bias=self.gate.expert_bias,
            router_logits_dtype=torch.float32,
            shared_experts=self.shared_experts,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits, _ = self.gate(x)
        return self.experts(hidden_states=x, router_logits=logits)


class LLaDA2Layer(nn.Module):
    """Pre-norm; the residual stream travels beside the branch, as vLLM fuses them."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.attention = LLaDA2Attention(vllm_config, f"{prefix}.attention")
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)
        self.mlp = (
            LLaDA2MoE(vllm_config, f"{prefix}.mlp")
            if extract_layer_index(prefix) >= config.first_k_dense_replace
            else _mlp(vllm_config, config.intermediate_size, f"{prefix}.mlp")
        )

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.input_layernorm(x, residual)
        x = self.attention(positions, x)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


@support_torch_compile
class LLaDA2Model(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.word_embeddings",
        )
        _, _, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: LLaDA2Layer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        x, _ = self.norm(x, residual)
        return x


class LLaDA2ForCausalLM(nn.Module, SupportsLoRA):
    """The network and its head, without the canvas."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "query_key_value": ["query_key_value"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            f".{module}.{part}": (f".{module}.gate_up_proj", shard)
            for module in ("mlp", "shared_experts")
            for shard, part in enumerate(("gate_proj", "up_proj"))
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.model = LLaDA2Model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model")
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.word_embeddings)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.word_embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loader = AutoWeightsLoader(self)
        return loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)


class LLaDA2MoeModelLM(BlockCausalLM, LLaDA2ForCausalLM):
    """LLaDA2 with the canvas of a block-causal diffusion model."""
