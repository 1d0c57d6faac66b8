# SPDX-License-Identifier: Apache-2.0
"""Dream, Dream-Coder and DiffuCoder (DreamLM/Dream, apple/ml-diffucoder).

Qwen2's network and weight names, biases at queries, keys and values. Full attention on
a grid from the end of the prompt; row ``i - 1`` scores token ``i``.
"""

from typing import Any

from transformers import Qwen2Config
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from vllm_unmask.families.full_attention import FullAttentionLM


class DreamConfig(Qwen2Config):
    """``config.json`` of a Dream checkpoint.

    It has no block size; 32 is what Fast-dLLM uses.
    """

    model_type = "Dream"
    shifted = True

    def __init__(
        self,
        block_size: int = 32,
        mask_token_id: int | None = 151666,
        eos_token_id: int | list[int] | None = 151643,
        **kwargs: Any,
    ) -> None:
        # vLLM's class would take a model that is not causal for an encoder.
        kwargs.pop("is_causal", None)
        super().__init__(eos_token_id=eos_token_id, **kwargs)
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        # vLLM tells a diffusion model by this attribute.
        self.canvas_length = block_size


class DreamModel(FullAttentionLM, Qwen2ForCausalLM):
    """Qwen2 with the canvas of a full-attention model."""
