# SPDX-License-Identifier: Apache-2.0
"""Random engines of every family, and tensor parallelism, against the reference.

Too long for every run; ``make conformance`` runs it.
"""

import random
from functools import partial
from pathlib import Path
from typing import Any

import engine_calls
import pytest
from checkpoints import EOS, write_checkpoint
from conformance.test_exactness_sweep import choose_scheduled, random_engine
from dense_reference import choose_threshold
from engine_process import EngineProcess
from family_references import REFERENCES

from vllm_unmask.families import FAMILIES, family_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ARCHITECTURES = [family.architecture for family in FAMILIES]
# The sizes of the published blocks, and two that divide no page.
BLOCKS = [1, 4, 5, 8, 24, 32]


def agrees(
    architecture: str, folder: Path, block: int, seed: int, **settings: Any
) -> None:
    """Serve a mixed batch, and compare each output with whole-sequence decoding."""
    rng = random.Random(seed)
    reference = REFERENCES[architecture]
    config = reference.config(block)
    weights = write_checkpoint(folder, config, seed)
    context = settings["max_model_len"]
    requests: list[tuple[list[int], int, dict[str, Any], Any]] = []
    for _ in range(12):
        prompt = [rng.randrange(EOS) for _ in range(rng.randrange(1, context - 1))]
        if rng.random() < 0.5:
            steps = rng.randint(1, block)
            extra: dict[str, Any] = {"unmask_strategy": "static", "unmask_steps": steps}
            choose: Any = partial(choose_scheduled, steps=steps)
        else:
            threshold = rng.choice([0.3, 0.5, 0.8])
            extra = {"unmask_threshold": threshold}
            choose = partial(choose_threshold, threshold=threshold)
        requests.append((prompt, rng.randint(1, 40), extra, choose))
    with EngineProcess(model=str(folder), **settings) as engine:
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
        expected, _ = reference.decode(
            config,
            weights,
            prompt,
            budget,
            block=block,
            choose=reference.order(choose),
            max_model_len=context,
            logits_of=reference.logits,
        )
        assert output["tokens"] == expected, (settings, len(prompt), budget, extra)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_engine_equals_dense_decoding(
    architecture: str, block: int, tmp_path: Path
) -> None:
    seed = BLOCKS.index(block)
    settings = random_engine(random.Random(seed), block)
    attention = family_of(architecture).attention
    if attention == "causal":
        settings["async_scheduling"] = False
        settings["additional_config"] = {}
    if attention == "full":
        settings["async_scheduling"] = False
        settings["additional_config"] = {"unmask": {"window": 0}}
        budget = settings["max_num_batched_tokens"]
        settings["max_num_batched_tokens"] = max(settings["max_model_len"], budget)
    agrees(architecture, tmp_path, block, seed, **settings)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_ranks_equal_dense_decoding(architecture: str, tmp_path: Path) -> None:
    agrees(
        architecture,
        tmp_path,
        4,
        9,
        max_model_len=100,
        block_size=32,
        tensor_parallel_size=2,
        # vLLM wants a NUMA node for each rank unless it is told the cores.
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_model_equals_dense_decoding(
    architecture: str, tmp_path: Path
) -> None:
    agrees(
        architecture,
        tmp_path,
        4,
        10,
        max_model_len=100,
        block_size=32,
        enforce_eager=False,
    )
