# SPDX-License-Identifier: Apache-2.0
"""The hierarchical cache of Fast-dLLM v2 on a real engine."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import engine_calls
import family_calls
import pytest
from cached_reference import as_llada, decode_sub_blocks
from checkpoints import (
    EOS,
    Weights,
    fast_dllm_v2_config,
    sdar_config,
    write_checkpoint,
)
from engine_process import EngineProcess

pytestmark = pytest.mark.e2e

BLOCK = 8
MAX_TOKENS = 29
# Prompts of whole blocks, of less than one, and some in between.
LENGTHS = (1, 7, 8, 9, 16, 27, 31, 40)


def prompts() -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(EOS) for _ in range(n)] for n in LENGTHS]


def greedy(
    small_block: int, threshold: float, cache: str | None = "sub_block", **params: Any
) -> dict[str, Any]:
    extra = {
        "unmask_strategy": "fast_dllm_v2",
        "unmask_threshold": threshold,
        "unmask_sub_block_length": small_block,
    }
    if cache:
        extra["unmask_cache"] = cache
    extra |= params.pop("extra", {})
    return {
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": MAX_TOKENS,
        "extra_args": extra,
    } | params


class Served(NamedTuple):
    engine: EngineProcess
    config: dict[str, Any]
    weights: Weights
    shifted: bool

    def decode(
        self, prompt: list[int], small_block: int, threshold: float, keep: bool = True
    ) -> tuple[list[int], list[int], Any]:
        return decode_sub_blocks(
            *as_llada(self.config, self.weights),
            prompt,
            MAX_TOKENS,
            block=BLOCK,
            small_block=small_block,
            threshold=threshold,
            shifted=self.shifted,
            keep=keep,
        )

    def generate(self, prompts: list[list[int]], params: Any) -> list[list[int]]:
        outputs = self.engine.run(engine_calls.generate, prompts, params)
        return [output["tokens"] for output in outputs]


CONFIGS = {"fast_dllm_v2": fast_dllm_v2_config, "sdar": sdar_config}


@pytest.fixture(scope="module", params=CONFIGS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    path = tmp_path_factory.mktemp(request.param)
    config = CONFIGS[request.param](BLOCK)
    weights = write_checkpoint(path, config)
    with EngineProcess(
        model=str(path), block_size=32, max_model_len=96, disable_log_stats=False
    ) as engine:
        yield Served(engine, config, weights, request.param == "fast_dllm_v2")


@pytest.mark.parametrize("threshold", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("small_block", [2, 3, 4, BLOCK])
def test_tokens_of_the_published_loop(
    served: Served, small_block: int, threshold: float
) -> None:
    """Together, and in one batch with requests that forward whole blocks."""
    kept, whole = (
        [served.decode(p, small_block, threshold, keep)[0] for p in prompts()]
        for keep in (True, False)
    )
    params = greedy(small_block, threshold)
    assert served.generate(prompts(), params) == kept
    mixed = [greedy(small_block, threshold, "none"), params] * 4
    expected = [(whole, kept)[i % 2][i] for i in range(8)]
    assert served.generate(prompts(), mixed) == expected
