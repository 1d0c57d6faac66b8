# SPDX-License-Identifier: Apache-2.0
"""What the families' config hook makes of vLLM's configuration."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_unmask.families import config_hook
from vllm_unmask.options import DecodingOptions, ServerOptions

CACHE = DecodingOptions(strategy="fast_dllm_v2", cache="sub_block")


@pytest.mark.parametrize(
    ("asked", "decoding", "cpu", "after", "synchronous"),
    [
        # On the CPU vLLM itself switches it off, later.
        (None, DecodingOptions(), True, None, True),
        (True, DecodingOptions(), True, True, True),
        (None, DecodingOptions(), False, None, False),
        (False, DecodingOptions(), False, False, True),
        (None, CACHE, False, False, True),
        # Refused then.
        (True, CACHE, False, True, False),
    ],
)
def test_who_schedules_synchronously(
    monkeypatch: pytest.MonkeyPatch,
    asked: bool | None,
    decoding: DecodingOptions,
    cpu: bool,
    after: bool | None,
    synchronous: bool,
) -> None:
    platform = SimpleNamespace(is_cpu=lambda: cpu)
    monkeypatch.setattr(config_hook, "current_platform", platform)
    scheduler = SimpleNamespace(async_scheduling=asked)
    config: Any = SimpleNamespace(scheduler_config=scheduler)
    options = ServerOptions(decoding=decoding)
    assert config_hook._is_synchronous(config, options) is synchronous
    assert scheduler.async_scheduling is after
