# SPDX-License-Identifier: Apache-2.0
"""SDAR with mixture-of-experts layers (JetAstra/SDAR, SDAR-30B-A3B).

Qwen3-MoE's network and weight names, one tensor for each projection of an expert,
untied: softmax over all experts in float32, the best few, weights that sum to 1.
Attention, grid and alignment are those of the dense models.
"""

from typing import Any, ClassVar

from transformers import Qwen3MoeConfig
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from vllm_unmask.families.block_causal import BlockCausalLM


class SDARMoeConfig(Qwen3MoeConfig):
    """``config.json`` of an SDAR-MoE checkpoint.

    The values of the release stand in for keys that a copy lacks; two of them are
    not Qwen3-MoE's defaults: weights are normalised, and ``head_dim`` is not the
    hidden size over the number of heads.
    """

    model_type = "sdar_moe"

    def __init__(
        self,
        block_size: int = 4,
        mask_token_id: int | None = 151669,
        norm_topk_prob: bool = True,
        head_dim: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(norm_topk_prob=norm_topk_prob, head_dim=head_dim, **kwargs)
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        # vLLM tells a diffusion model by this attribute.
        self.canvas_length = block_size


class SDARMoeForCausalLM(BlockCausalLM, Qwen3MoeForCausalLM):
    """Qwen3-MoE with the canvas of a block-causal diffusion model."""

    # vLLM's class adds to this mapping when it is built: not to its own.
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"]
    }
