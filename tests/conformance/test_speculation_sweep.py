# SPDX-License-Identifier: Apache-2.0
"""Self-speculation on hundreds of random models: the same tokens, no more forwards."""

from pathlib import Path
from typing import Any

import pytest
import speculation_calls as calls
from checkpoints import fast_dllm_v2_config, sdar_config, write_checkpoint
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
