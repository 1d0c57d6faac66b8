# SPDX-License-Identifier: Apache-2.0
"""The hierarchical cache of Fast-dLLM v2 on a real engine."""

import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import engine_calls
import family_calls
import pytest
import sub_block_calls
import torch
from cached_reference import Decoded, as_llada, decode_sub_blocks
from checkpoints import (
    EOS,
    MASK,
    Weights,
    fast_dllm_v2_config,
    sdar_config,
    write_checkpoint,
)
from dense_reference import FeedForward
from engine_process import EngineProcess

pytestmark = pytest.mark.e2e

BLOCK = 8
# Not a whole number of blocks.
CONTEXT = 93
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
    block: int = BLOCK
    feed_forward: FeedForward | None = None

    def decode(
        self, prompt: list[int], small_block: int, threshold: float, **options: Any
    ) -> Decoded:
        return decode_sub_blocks(
            *as_llada(self.config, self.weights),
            prompt,
            options.pop("max_tokens", MAX_TOKENS),
            block=self.block,
            small_block=small_block,
            threshold=threshold,
            shifted=self.shifted,
            max_model_len=CONTEXT,
            feed_forward=self.feed_forward,
            **options,
        )

    def generate(self, prompts: list[list[int]], params: Any) -> list[list[int]]:
        outputs = self.engine.run(engine_calls.generate, prompts, params)
        return [output["tokens"] for output in outputs]


CONFIGS = {"fast_dllm_v2": fast_dllm_v2_config, "sdar": sdar_config}


@pytest.fixture(
    scope="module",
    params=["fast_dllm_v2", pytest.param("sdar", marks=pytest.mark.slow)],
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    path = tmp_path_factory.mktemp(request.param)
    config = CONFIGS[request.param](BLOCK)
    weights = write_checkpoint(path, config)
    with EngineProcess(
        model=str(path),
        block_size=32,
        max_model_len=CONTEXT,
        # Less memory than eight requests need.
        num_gpu_blocks_override=14,
        disable_log_stats=False,
    ) as engine:
        yield Served(engine, config, weights, request.param == "fast_dllm_v2")


@pytest.mark.parametrize(
    ("small_block", "threshold"), [(2, 1.0), (3, 0.9), (4, 0.9), (4, 0.3)]
)
def test_tokens_of_the_published_loop(
    served: Served, small_block: int, threshold: float
) -> None:
    """Alone, together, and in one batch with requests that forward whole blocks."""
    kept, whole = (
        [served.decode(p, small_block, threshold, keep=keep).tokens for p in prompts()]
        for keep in (True, False)
    )
    params = greedy(small_block, threshold)
    assert served.generate(prompts()[4:5], params) == kept[4:5]
    outputs, counts = served.engine.run(
        engine_calls.generate_counting, prompts(), params
    )
    assert [output["tokens"] for output in outputs] == kept
    # Few steps leave no two requests with full pages at once.
    assert counts["preemptions"] > 0 or threshold < 0.5
    mixed = [greedy(small_block, threshold, "none"), params] * 4
    expected = [(whole, kept)[i % 2][i] for i in range(8)]
    assert served.generate(prompts(), mixed) == expected
    if threshold > 0.5:
        # An approximation, or the comparison would show nothing.
        assert kept != whole


def test_a_sub_block_that_is_the_block_is_no_approximation(served: Served) -> None:
    plain = greedy(2, 0.6, None, extra={"unmask_strategy": "threshold"})
    del plain["extra_args"]["unmask_sub_block_length"]
    expected = served.generate(prompts(), plain)
    assert served.generate(prompts(), greedy(BLOCK, 0.6)) == expected


@pytest.mark.parametrize("length", [7, 16])
def test_rows_that_a_step_forwards(served: Served, length: int) -> None:
    """Fewer than whole blocks, and no more than the published loop."""
    prompt = prompts()[LENGTHS.index(length)]
    small_block, threshold = 4, 0.9
    first, *blocks = served.decode(prompt, small_block, threshold).rows
    # The step that completes a prompt has its canvas, too.
    aligned = length // BLOCK * BLOCK
    expected = [aligned + BLOCK] * bool(aligned and served.shifted)
    expected += first if expected else [aligned + first[0], *first[1:]]
    for of_block in blocks:
        # Behind a block that becomes final stands the next one, or its first position.
        expected += (
            [BLOCK + 1, *of_block] if served.shifted else [2 * BLOCK, *of_block[1:]]
        )
    before = served.engine.run(family_calls.diffusion_counters)
    _, records = served.engine.run(
        engine_calls.generate_recorded, [prompt], greedy(small_block, threshold)
    )
    after = served.engine.run(family_calls.diffusion_counters)
    assert [record["rows"] for record in records] == expected
    assert after[0] - before[0] == len(records)
    assert after[1] - before[1] == sum(expected) - aligned
    _, records = served.engine.run(
        engine_calls.generate_recorded, [prompt], greedy(small_block, threshold, "none")
    )
    assert sum(record["rows"] for record in records) > sum(expected)


def test_blocks_that_are_final_are_exact(served: Served) -> None:
    """As a prefill of the same tokens leaves them."""
    prompt = prompts()[5]
    (output,), records = served.engine.run(
        engine_calls.generate_recorded, [prompt], greedy(2, 1.0, max_tokens=60)
    )
    tokens = [*prompt, *output["tokens"]][:64]
    pages = records[-1]["pages"][:2]
    decoded = served.engine.run(engine_calls.read_pages, pages)
    served.engine.run(engine_calls.reset_prefix_cache)
    _, fresh = served.engine.run(
        engine_calls.generate_recorded, [tokens], greedy(2, 1.0, max_tokens=1)
    )
    assert fresh[0]["prefix"] == tokens
    prefilled = served.engine.run(engine_calls.read_pages, fresh[0]["pages"][:2])
    torch.testing.assert_close(decoded, prefilled, rtol=0, atol=1e-4)


def test_last_block_that_the_context_cuts(served: Served) -> None:
    prompt = [7] * (CONTEXT - 20)
    (output,) = served.engine.run(
        engine_calls.generate, [prompt], greedy(4, 0.9, max_tokens=None)
    )
    expected = served.decode(prompt, 4, 0.9, max_tokens=100)
    assert (output["tokens"], output["finish_reason"]) == (expected.tokens, "length")


def test_log_probabilities_are_those_of_the_step(served: Served) -> None:
    (output,) = served.engine.run(
        engine_calls.generate, prompts()[1:2], greedy(4, 0.9, logprobs=1)
    )
    expected = served.decode(prompts()[1], 4, 0.9)
    assert output["tokens"] == expected.tokens
    found = [
        of_position[token][0]
        for token, of_position in zip(expected.tokens, output["logprobs"], strict=True)
    ]
    logs = [math.log(sureness) for sureness in expected.sureness]
    assert found == pytest.approx(logs, abs=2e-4)


@pytest.mark.parametrize("at", [0, 4, 5, 8, 12, 15])
def test_seeds_are_seen(served: Served, at: int) -> None:
    """Wherever they lie: a sub-block's first position among them."""
    seeds = tuple([MASK] * at + [17, 18])
    extra = {"diffusion_seed_canvas": list(seeds)}
    prompt = prompts()[2]
    expected = served.decode(prompt, 4, 0.9, seeds=seeds).tokens
    assert served.generate([prompt], greedy(4, 0.9, extra=extra)) == [expected]
    assert expected[at : at + 2] == [17, 18]


@pytest.mark.parametrize(
    "strategy",
    [
        "sub_blocks+static+end_of_text",
        "eos_rejection+sub_blocks+entropy_bounded",
        "sub_blocks+hierarchy",
        "sub_blocks+bacd",
        "sub_blocks+ccd",
        "sub_blocks+dimple",
        "sub_blocks+cad+end_of_text",
    ],
)
def test_positions_without_a_row_are_left_alone(served: Served, strategy: str) -> None:
    """Also those that are known without one, behind a stop token."""
    asked = greedy(4, 0.9, extra={"unmask_strategy": strategy}, max_tokens=40)
    extra = asked["extra_args"]
    del extra["unmask_threshold"]
    if strategy.endswith("end_of_text"):
        # Stop tokens, sooner or later in their sub-blocks.
        extra["unmask_order"] = "random"
        asked |= {"logit_bias": {EOS: 6.0}, "stop_token_ids": [EOS]}
    parts, changes, strange = served.engine.run(
        sub_block_calls.count_parts, prompts(), asked
    )
    assert parts > 10
    assert (changes, strange) == (0, 0)


def test_sampled_tokens_are_those_of_the_request_alone(served: Served) -> None:
    params = [
        greedy(4, 0.5, temperature=1.0, seed=seed, top_p=0.9) for seed in range(8)
    ]
    together = served.generate(prompts(), params)
    for index in (0, 3, 6):
        alone = served.generate(prompts()[index : index + 1], params[index])
        assert alone == together[index : index + 1]
    assert served.generate(prompts(), params[:1] * 8) != together


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"unmask_cache": "prefix"}, "unmask_cache='prefix'.*none or sub_block"),
        ({"unmask_refresh": 2}, "unmask_refresh=2"),
        ({"unmask_strategy": "sub_blocks+lookahead"}, "without lookahead"),
        ({"unmask_strategy": "sub_blocks+threshold+freedave"}, "without freedave"),
        ({"unmask_sub_block_length": BLOCK + 1}, "an integer from 1 to 8"),
    ],
)
def test_refused_requests(served: Served, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        served.generate([[1]], greedy(2, 0.9, extra=extra))
