# SPDX-License-Identifier: Apache-2.0
"""vLLM's seams: model state, sampler, scheduler, attention metadata."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_unmask.engine.model_state import BlockDiffusionModelState


def model_state_cls(
    attention: str = "block_causal",
) -> "type[BlockDiffusionModelState]":
    """The ModelState of the families, for ``get_model_state_cls``.

    Only Model Runner V2 asks for it, in the worker and before the first kernel
    launch. Nothing here may be imported earlier: on CPU, vLLM's worker replaces
    device helpers that the runner's modules import by name.

    Args:
        attention: the family's.
    """
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if current_platform.is_cpu() and not HAS_TRITON:
        from vllm_unmask.engine.cpu_kernels import register_cpu_kernels

        register_cpu_kernels()

    if attention == "full":
        from vllm_unmask.engine.full_model_state import FullAttentionModelState

        return FullAttentionModelState
    if attention == "causal":
        from vllm_unmask.engine.streaming_model_state import StreamingModelState

        return StreamingModelState
    from vllm_unmask.engine.model_state import BlockDiffusionModelState

    return BlockDiffusionModelState
