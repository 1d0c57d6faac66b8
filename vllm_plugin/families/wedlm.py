# SPDX-License-Identifier: Apache-2.0
"""WeDLM (tencent/WeDLM-7B and 8B, Base and Instruct; Tencent/WeDLM).

Qwen2's network with biases (7B) or Qwen3's with norms of queries and keys (8B), by two
switches of the configuration, and their weight names, untied. Causal attention over a
window that is read in an order of its own (`decoding.streaming`); row i scores token i.
"""

from typing import Any

from torch import nn
from transformers import Qwen3Config
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from vllm_unmask.families.streaming import StreamingLM


class WeDLMConfig(Qwen3Config):
    """``config.json`` of a WeDLM checkpoint.

    The window is the release's, which takes it from its command line. As there, a
    file without ``qk_norm`` has it where it has no biases, and the mask token may be
    null.
    """

    model_type = "wedlm"

    def __init__(
        self,
        block_size: int = 16,
        mask_token_id: int | None = 151665,
        attention_bias: bool = False,
        qk_norm: bool | None = None,
        head_dim: int | None = None,
        hidden_size: int = 4096,
        num_attention_heads: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            attention_bias=attention_bias,
            head_dim=head_dim or hidden_size // num_attention_heads,
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            **kwargs,
        )
        self.qk_norm = not attention_bias if qk_norm is None else qk_norm
        self.block_size = block_size
        self.mask_token_id = 151665 if mask_token_id is None else mask_token_id
        # vLLM tells a diffusion model by this attribute.
        self.canvas_length = block_size


class WeDLMForCausalLM(StreamingLM, Qwen3ForCausalLM):
    """Qwen3, without its norms of queries and keys where the configuration says so."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not vllm_config.model_config.hf_config.qk_norm:
            for layer in self.model.layers:
                layer.self_attn.q_norm = nn.Identity()
                layer.self_attn.k_norm = nn.Identity()
