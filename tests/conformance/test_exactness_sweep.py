# SPDX-License-Identifier: Apache-2.0
"""Random engines and random requests against the whole-sequence reference.

Too long for every run; ``make conformance`` runs it.
"""

import random
from functools import partial
from pathlib import Path
from typing import Any

import engine_calls
import pytest
from checkpoints import EOS, sdar_config, write_checkpoint
from dense_reference import choose_static, choose_threshold, decode
from engine_process import EngineProcess

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BLOCKS = [1, 2, 3, 4, 5, 8, 16, 32, 64]


def random_engine(rng: random.Random, block: int) -> dict[str, Any]:
    """Engine settings: scheduling, layout, token budget, memory, context."""
    page = block * rng.choice([1, 2, 4])
    page += -page % 32 if page % 32 else 0
    while page % block:
        page += 32
    asynchronous = rng.random() < 0.5
    layout = rng.choice(["auto", "exact", "uniform"])
    context = rng.choice([2 * page + 7, 3 * page, 200])
    return {
        "async_scheduling": asynchronous,
        "additional_config": {"unmask": {"layout": layout}},
        "block_size": page,
        "max_model_len": context,
        "max_num_seqs": rng.choice([1, 3, 8]),
        "max_num_batched_tokens": max(2 * block, rng.choice([16, 40, 256])),
        "num_gpu_blocks_override": -(-context // page) + rng.choice([2, 4, 40]),
        "enable_prefix_caching": rng.random() < 0.7,
    }


@pytest.mark.parametrize("seed", range(12))
def test_random_engine_equals_dense_decoding(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    block = BLOCKS[seed % len(BLOCKS)]
    settings = random_engine(rng, block)
    config = sdar_config(block)
    weights = write_checkpoint(tmp_path, config, seed)
    context = settings["max_model_len"]
    shared = [rng.randrange(EOS) for _ in range(context)]
    requests = []
    for _ in range(24):
        length = rng.randrange(1, min(context - 1, 120))
        keep = rng.randrange(length + 1)
        prompt = shared[:keep] + [rng.randrange(EOS) for _ in range(length - keep)]
        if rng.random() < 0.5:
            steps = rng.randint(1, block)
            extra: dict[str, Any] = {"unmask_strategy": "static", "unmask_steps": steps}
            choose: Any = partial(choose_scheduled, steps=steps)
        else:
            threshold = rng.choice([0.3, 0.5, 0.8])
            extra = {"unmask_threshold": threshold}
            choose = partial(choose_threshold, threshold=threshold)
        requests.append((prompt, rng.randint(1, 60), extra, choose))
    with EngineProcess(model=str(tmp_path), **settings) as engine:
        outputs = engine.run(
            engine_calls.generate,
            [prompt for prompt, *_ in requests],
            [
                {
                    "temperature": 0,
                    "ignore_eos": True,
                    "max_tokens": budget,
                    "extra_args": extra,
                }
                for _, budget, extra, _ in requests
            ],
        )
    for (prompt, budget, extra, choose), output in zip(requests, outputs, strict=True):
        expected, _ = decode(
            config,
            weights,
            prompt,
            budget,
            block=block,
            choose=choose,
            max_model_len=context,
        )
        assert output["tokens"] == expected, (settings, len(prompt), budget, extra)


def choose_scheduled(
    masked: list[int],
    confidence: Any,
    candidates: list[int],
    step: int,
    opened: int,
    steps: int,
) -> list[int]:
    """``choose_static`` with a number of steps."""
    return choose_static(masked, confidence, candidates, step, opened, steps=steps)
