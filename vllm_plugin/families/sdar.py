# SPDX-License-Identifier: Apache-2.0
"""SDAR and TraDo, dense (JetAstra/SDAR, Gen-Verse/TraDo).

Qwen3's network and weight names, untied; block-causal attention on a grid from
position 0; row i scores token i.
"""

from typing import Any

from transformers import Qwen3Config
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from vllm_unmask.families.block_causal import BlockCausalLM


class SDARConfig(Qwen3Config):
    """``config.json`` of an SDAR checkpoint.

    Some published copies lack ``block_size`` and ``mask_token_id``; the values
    of the SDAR release stand in for them.
    """

    model_type = "sdar"

    def __init__(
        self,
        block_size: int = 4,
        mask_token_id: int | None = 151669,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        # vLLM tells a diffusion model by this attribute.
        self.canvas_length = block_size


class SDARForCausalLM(BlockCausalLM, Qwen3ForCausalLM):
    """Qwen3 with the canvas of a block-causal diffusion model."""
