# SPDX-License-Identifier: Apache-2.0
"""The hierarchical cache of Fast-dLLM v2 in random batches.

Too long for every run; ``make conformance`` runs it.
"""

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import engine_calls
import pytest
from checkpoints import (
    EOS,
    MASK,
    llada2_config,
    sdar_moe_config,
    write_checkpoint,
)
from e2e.test_sub_blocks import CONFIGS as DENSE
from e2e.test_sub_blocks import CONTEXT, Served, greedy
from engine_process import EngineProcess
from family_references import llada2_feed_forward, sdar_moe_feed_forward

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    # Chunks of prompts, queries that wait, and preemption.
    "tight": {"max_num_batched_tokens": 72, "num_gpu_blocks_override": 14},
    # vLLM wants a NUMA node for each rank unless it is told the cores.
    "two_ranks": {
        "tensor_parallel_size": 2,
        "env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    },
}
FEED_FORWARDS = {"sdar_moe": sdar_moe_feed_forward, "llada2": llada2_feed_forward}
CONFIGS = DENSE | {"sdar_moe": sdar_moe_config, "llada2": llada2_config}
CASES = [
    *product(DENSE, (4, 8, 32), ("plain", "tight")),
    *product(FEED_FORWARDS, (8,), ("tight",)),
    *product(CONFIGS, (8,), ("two_ranks",)),
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
        shifted, feed_forward = name == "fast_dllm_v2", FEED_FORWARDS.get(name)
        yield Served(engine, config, weights, shifted, block, feed_forward)


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
