# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM v2 (Efficient-Large-Model/Fast_dLLM_v2_1.5B and 7B; NVlabs/Fast-dLLM).

Qwen2's network and weight names, biases at queries, keys and values; block-causal
attention on a grid from position 0; row ``i - 1`` scores token ``i``. A block's first
token is known before the rest of the block is read: it is that of the row before.
"""

from typing import Any

from transformers import Qwen2Config
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from vllm_unmask.families.block_causal import BlockCausalLM


class FastDLLMConfig(Qwen2Config):
    """``config.json`` of a Fast-dLLM v2 checkpoint.

    Its key for the block length is ``bd_size``. The mask token is that of the release,
    whose code has it as a constant.
    """

    model_type = "Fast_dLLM_Qwen"
    shifted = True
    first_alone = True

    def __init__(
        self,
        bd_size: int = 32,
        mask_token_id: int | None = 151665,
        eos_token_id: int | list[int] | None = 151645,
        **kwargs: Any,
    ) -> None:
        super().__init__(eos_token_id=eos_token_id, **kwargs)
        self.bd_size = self.block_size = bd_size
        self.mask_token_id = mask_token_id
        # vLLM tells a diffusion model by this attribute.
        self.canvas_length = bd_size


class FastDLLMForCausalLM(BlockCausalLM, Qwen2ForCausalLM):
    """Qwen2 with the canvas of a block-causal diffusion model."""
