# SPDX-License-Identifier: Apache-2.0
"""What the models of all families with a streaming window do beside their network."""

from typing import TYPE_CHECKING

from vllm_unmask.engine import model_state_cls
from vllm_unmask.families.block_causal import BlockCausalLM

if TYPE_CHECKING:
    from vllm_unmask.engine.model_state import BlockDiffusionModelState


class StreamingLM(BlockCausalLM):
    """As `BlockCausalLM`, with causal attention and a window that moves on."""

    @staticmethod
    def get_model_state_cls() -> "type[BlockDiffusionModelState]":
        return model_state_cls("causal")
