# SPDX-License-Identifier: Apache-2.0
"""Which models are ours: the question that every patch asks first."""

from collections.abc import Mapping
from typing import Any

# Filled by registration, so that patches need not know the families.
ARCHITECTURES: set[str] = set()


def served_record(model_config: Any) -> Mapping[str, Any] | None:
    """What the families' config hook noted about this model, or None.

    A JSON-safe mapping on the checkpoint's config, which travels with it to every
    process: `server` (see `vllm_unmask.options.server_options_to_dict`),
    `attention` ("block_causal", "full" or "causal"), `synchronous`, `block_length`,
    `mask_token_id` and `vocab_size`.
    """
    return getattr(model_config.hf_config, "unmask_served", None)


def is_ours(model_config: Any) -> bool:
    """Whether a vLLM `ModelConfig` (or None) is of one of our families.

    By architecture as well, because vLLM asks some questions before it has run
    the config hook.
    """
    if model_config is None:
        return False
    return served_record(model_config) is not None or not ARCHITECTURES.isdisjoint(
        model_config.architectures
    )
