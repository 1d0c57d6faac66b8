# SPDX-License-Identifier: Apache-2.0
"""Give our models Model Runner V2 on a CPU that has no Triton.

Opens the gate only. The kernels that the runner launches are registered by the
model's own hook, `get_model_state_cls`, which nothing but that runner calls.
"""

from collections.abc import Callable
from typing import Any

from vllm_unmask.patches import Guard, Patch, Replacement
from vllm_unmask.patches.served import is_ours


def _needs_gate(config: Any) -> bool:
    if not is_ours(config.model_config):
        return False
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return current_platform.is_cpu() and not HAS_TRITON


def _build_use(original: Callable[..., bool]) -> Callable[..., bool]:
    def use_v2_model_runner(self: Any) -> bool:
        if not _needs_gate(self):
            return original(self)
        import vllm
        import vllm.envs as envs

        # Later versions ask for Triton once more, where the worker is made.
        if not vllm.__version__.startswith("0.32."):
            raise ValueError(
                f"On a CPU without Triton, block-diffusion models need vLLM 0.32; "
                f"found {vllm.__version__}. Install that, or triton-cpu."
            )
        if envs.VLLM_USE_V2_MODEL_RUNNER is False:
            raise ValueError(
                "Block-diffusion models need Model Runner V2; remove "
                "VLLM_USE_V2_MODEL_RUNNER=0."
            )
        return True

    return use_v2_model_runner


def _build_validate(original: Callable[..., None]) -> Callable[..., None]:
    def _validate_v2_model_runner(self: Any) -> None:
        if not _needs_gate(self):
            original(self)
            return
        unsupported = self._get_v2_model_runner_unsupported_features()
        if unsupported:
            raise ValueError(
                f"Model Runner V2 does not yet support: {', '.join(unsupported)}"
            )

    return _validate_v2_model_runner


_USE = "vllm.config.vllm:VllmConfig.use_v2_model_runner"
_VALIDATE = "vllm.config.vllm:VllmConfig._validate_v2_model_runner"

PATCH = Patch(
    name="cpu_model_runner",
    what="lets our models use Model Runner V2 on a CPU without Triton",
    why="only Model Runner V2 serves diffusion models, and vLLM keeps it from CPUs "
    "without Triton, where its kernels run through kernel overrides",
    removal="vLLM runs Model Runner V2 on CPU without Triton",
    replacements=(
        Replacement(_USE, _build_use),
        Replacement(_VALIDATE, _build_validate),
    ),
    guards=(
        Guard(
            _USE,
            {
                "0.32": "515385db129cfb7378cffe949c37bdfb"
                "606c208e46e0a2b825ae5deaebd408e3",
                "0.33": "33556f4a169d8566fcabf393660e0b10"
                "abcbe91900111226eb0c5d103332d488",
            },
        ),
        Guard(
            _VALIDATE,
            {
                "0.32": "1264ae02af3433ee6307aae040a1d123"
                "e0ade9a571d16e529e2cfd0486c4176d",
                "0.33": "c56f7985f36e9b31fd935dc3a550046"
                "428ab9d7b7a0f9c303f2af5a0b67e4fb2",
            },
        ),
        Guard(
            "vllm.config.vllm:VllmConfig._get_v2_model_runner_unsupported_features",
            {
                "0.32": "cb1a79994bd3ad5141367028b2024cd8"
                "99d7ed5db3f9d09e0bc2bd73c59a0fd3",
                "0.33": "12959e9a858a849ba3dd497f6971a0c4"
                "8f771b9ed2dfa9f88a86b686de6b6b66",
            },
        ),
    ),
)
