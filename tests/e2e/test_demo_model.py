# SPDX-License-Identifier: Apache-2.0
"""The demo model on records that training never saw."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_calls
import pytest
from engine_process import EngineProcess

pytestmark = pytest.mark.e2e

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
THRESHOLD = {"unmask_strategy": "threshold", "unmask_threshold": 0.9}


# Model -> output tokens of a request's forward, at least: at threshold 0.9, and one a
# step, where the end of the last block is forwarded but is not output.
MODELS = {"sdar": (5, 0.8), "sdar32": (13, 0.7)}


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(name: str) -> Iterator[EngineProcess]:
    with EngineProcess(
        model=str(DEMO / name),
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=16,
        skip_tokenizer_init=False,
    ) as engine:
        yield engine


def records() -> list[dict[str, str]]:
    lines = (DEMO / "held_out.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["task"] == "json"]


def extract(engine: EngineProcess, extra: dict[str, Any]) -> tuple[float, float]:
    """Exact match, and output tokens per request-forward."""
    wanted = records()
    outputs, denoising_steps = engine.run(
        engine_calls.chat_counting,
        [record["prompt"] for record in wanted],
        {"temperature": 0, "max_tokens": 160, "extra_args": extra},
    )
    right = sum(
        text == record["answer"]
        for record, (text, _) in zip(wanted, outputs, strict=True)
    )
    num_tokens = sum(count for _, count in outputs)
    return right / len(wanted), num_tokens / denoising_steps


def test_threshold_is_as_right_as_one_token_a_step(
    engine: EngineProcess, name: str
) -> None:
    assert len(records()) >= 300
    careful, one = extract(engine, {"unmask_strategy": "static"})
    fast, many = extract(engine, THRESHOLD)
    assert careful >= 0.93
    assert fast >= careful - 0.02
    at_threshold, one_a_step = MODELS[name]
    assert many >= at_threshold
    assert one_a_step < one <= 1
