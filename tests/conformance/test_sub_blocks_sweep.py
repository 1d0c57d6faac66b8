# SPDX-License-Identifier: Apache-2.0
"""The hierarchical cache of Fast-dLLM v2 in random batches.

Too long for every run; ``make conformance`` runs it.
"""

import random
from collections.abc import Iterator
from typing import Any

import engine_calls
import pytest
from checkpoints import EOS, MASK, write_checkpoint
from e2e.test_sub_blocks import CONFIGS, CONTEXT, Served, greedy
from engine_process import EngineProcess

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    # Chunks of prompts, queries that wait, and preemption.
    "tight": {"max_num_batched_tokens": 72, "num_gpu_blocks_override": 14},
}
CASES = [
    (name, block, settings)
    for name in CONFIGS
    for block in (4, 8, 32)
    for settings in SETTINGS
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    name, block, settings = request.param
    path = tmp_path_factory.mktemp(name)
    config = CONFIGS[name](block)
    weights = write_checkpoint(path, config)
    with EngineProcess(
        model=str(path), block_size=32, max_model_len=CONTEXT, **SETTINGS[settings]
    ) as engine:
        yield Served(engine, config, weights, name == "fast_dllm_v2", block)


@pytest.mark.parametrize("seed", range(6))
def test_random_batches(served: Served, seed: int) -> None:
    """Every request with its own lengths, threshold, seeds, and cache."""
    rng = random.Random(seed)
    prompts, params, expected = [], [], []
    for _ in range(8):
        prompt = [rng.randrange(EOS) for _ in range(rng.randint(1, 60))]
        small_block = rng.randint(1, served.block)
        threshold = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0])
        cache = rng.choice(["sub_block", "sub_block", "none"])
        max_tokens = rng.randint(1, 60)
        seeds: tuple[int, ...] = ()
        if rng.random() < 0.3:
            open_or_not = [MASK, MASK, rng.randrange(EOS)]
            seeds = tuple(rng.choice(open_or_not) for _ in range(max_tokens))
        extra = {"diffusion_seed_canvas": list(seeds)} if seeds else {}
        prompts.append(prompt)
        params.append(
            greedy(small_block, threshold, cache, max_tokens=max_tokens, extra=extra)
        )
        expected.append(
            served.decode(
                prompt,
                small_block,
                threshold,
                keep=cache == "sub_block",
                max_tokens=max_tokens,
                seeds=seeds,
            ).tokens
        )
    outputs, _ = served.engine.run(engine_calls.generate_counting, prompts, params)
    assert [output["tokens"] for output in outputs] == expected
