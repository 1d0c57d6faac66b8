# SPDX-License-Identifier: Apache-2.0
"""The model families: one file each, listed here without importing them."""

from collections.abc import Callable
from typing import NamedTuple


class Family(NamedTuple):
    """Where vLLM finds a family's classes, as ``module:Class``."""

    architecture: str
    model_type: str
    config_cls: str
    model_cls: str


FAMILIES: tuple[Family, ...] = (
    Family(
        "SDARForCausalLM",
        "sdar",
        "vllm_unmask.families.sdar:SDARConfig",
        "vllm_unmask.families.sdar:SDARForCausalLM",
    ),
)

CONFIG_HOOK = "vllm_unmask.families.config_hook:BlockDiffusionConfigHook"

# Called when one of our models is configured: in the front end, and before anything
# of vLLM's that serves it exists. Registration puts the patches here.
ON_SERVED: list[Callable[[], None]] = []
