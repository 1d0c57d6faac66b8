# SPDX-License-Identifier: Apache-2.0
"""What the models of all families with full attention do beside their network."""

from typing import TYPE_CHECKING

from vllm_unmask.engine import model_state_cls
from vllm_unmask.families.block_causal import BlockCausalLM

if TYPE_CHECKING:
    from vllm_unmask.engine.model_state import BlockDiffusionModelState


class FullAttentionLM(BlockCausalLM):
    """As `BlockCausalLM`, with a canvas that every position sees the whole of."""

    @staticmethod
    def get_model_state_cls() -> "type[BlockDiffusionModelState]":
        return model_state_cls("full")
