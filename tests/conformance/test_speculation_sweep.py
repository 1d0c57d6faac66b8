# SPDX-License-Identifier: Apache-2.0
"""Self-speculation on hundreds of random models: the same tokens, no more forwards."""

from pathlib import Path
from typing import Any

import pytest
import speculation_calls as calls
from checkpoints import (
    dream_config,
    fast_dllm_v2_config,
    llada_config,
    llada_moe_config,
    sdar_config,
    write_checkpoint,
)
from e2e.test_speculation import params
from e2e.test_strategies import prompts
from engine_process import EngineProcess

NUM_MODELS = 100


@pytest.mark.parametrize("block", [4, 8, 32])
@pytest.mark.parametrize(
    "config", [sdar_config, fast_dllm_v2_config], ids=["sdar", "fast_dllm_v2"]
)
def test_random_models(config: Any, block: int, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    write_checkpoint(path, config(block))
    asked = [
        params("static"),
        params("static", temperature=1.0),
        params("threshold"),
        params("credit+threshold+edit"),
    ]
    with EngineProcess(
        model=str(path),
        max_model_len=96,
        block_size=32,
        max_num_seqs=8,
        additional_config={"unmask": {"adaptive_candidates": False}},
    ) as engine:
        compared = engine.run(
            calls.compare_random_models, NUM_MODELS, prompts(4), asked
        )
    for one in compared:
        assert one["same"], one
        assert one["speculative"] <= one["careful"], one
    assert any(one["speculative"] < one["careful"] for one in compared)


@pytest.mark.parametrize(("block", "adaptive"), [(1, False), (4, True), (32, False)])
@pytest.mark.parametrize("config", [llada_config, llada_moe_config, dream_config])
def test_random_models_with_full_attention(
    config: Any, block: int, adaptive: bool, tmp_path: Path
) -> None:
    """Every cache policy, refreshed and not, with a canvas that moves and one that is
    whole."""
    write_checkpoint(tmp_path, config(block))
    policies: list[dict[str, Any]] = [
        {},
        {"unmask_window": 2 * block},
        {"unmask_cache": "prefix", "unmask_refresh": 5},
        {"unmask_cache": "dual"},
        {"unmask_cache": "dual", "unmask_refresh": 3},
    ]
    asked = []
    for policy in policies:
        for rule, temperature in (("static", 0.0), ("static", 1.0), ("threshold", 1.0)):
            one = params(rule, temperature=temperature)
            one["extra_args"] = one["extra_args"] | policy
            asked.append(one)
    with EngineProcess(
        model=str(tmp_path),
        max_model_len=256,
        block_size=32,
        max_num_seqs=8,
        additional_config={"unmask": {"adaptive_candidates": adaptive}},
    ) as engine:
        compared = engine.run(
            calls.compare_random_models, NUM_MODELS // 25, prompts(4), asked
        )
    for one in compared:
        assert one["same"], one
        assert one["speculative"] <= one["careful"], one
    # A block that is complete ahead of time still waits for a forward of its own.
    assert block == 1 or any(one["speculative"] < one["careful"] for one in compared)
