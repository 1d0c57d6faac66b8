# SPDX-License-Identifier: Apache-2.0
"""Full attention on a real engine: cache policies, windows, and what is refused."""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import engine_calls
import family_calls
import pytest
import torch
from cached_reference import decode_cached
from checkpoints import EOS, MASK, Weights, llada_config, write_checkpoint
from dense_reference import choose_static, choose_threshold, decode_full
from engine_process import EngineProcess
from family_references import llada_logits

pytestmark = pytest.mark.e2e

BLOCK = 4
CONTEXT = 128
MAX_TOKENS = 22
STATIC = {"unmask_strategy": "static"}
THRESHOLD = {"unmask_strategy": "threshold", "unmask_threshold": 0.4}
RULES = {
    "static": (STATIC, choose_static),
    "threshold": (THRESHOLD, partial(choose_threshold, threshold=0.4)),
}


class Served(NamedTuple):
    engine: EngineProcess
    config: dict[str, Any]
    weights: Weights

    def decode(self, prompt: list[int], choose: Any, **options: Any) -> list[int]:
        options = {"max_tokens": MAX_TOKENS} | options
        return decode_full(
            self.config,
            self.weights,
            prompt,
            block=BLOCK,
            choose=choose,
            max_model_len=CONTEXT,
            logits_of=llada_logits,
            **options,
        )[0]

    def generate(self, prompts: list[list[int]], params: Any) -> list[list[int]]:
        outputs = self.engine.run(engine_calls.generate, prompts, params)
        return [output["tokens"] for output in outputs]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("llada")
    # Rows of the embedding that belong to no token.
    config = llada_config(BLOCK, embedding_size=192)
    weights = write_checkpoint(path, config)
    with EngineProcess(
        model=str(path),
        block_size=32,
        max_model_len=CONTEXT,
        # Two long canvases do not fit a step.
        max_num_batched_tokens=CONTEXT,
        disable_log_stats=False,
        additional_config={"unmask": {"strategy": "static", "window": 0}},
    ) as engine:
        yield Served(engine, config, weights)


def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(EOS) for _ in range(n)] for n in (1, 3, 4, 9, 31, 60)]


def greedy(extra: dict[str, Any], **params: Any) -> dict[str, Any]:
    return {
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": MAX_TOKENS,
        "extra_args": extra,
    } | params


@pytest.mark.parametrize("rule", RULES)
def test_caches_equal_those_in_plain_torch(served: Served, rule: str) -> None:
    """All policies in one batch, each token for token, refreshed now and then."""
    extra, choose = RULES[rule]
    policies = [
        ("prefix", None),
        ("dual", None),
        ("dual", 2),
        ("prefix", 3),
        ("dual", 1),
        ("prefix", 1),
    ]
    params, expected = [], []
    for prompt, (cache, refresh) in zip(prompts(), policies, strict=True):
        asked = {"unmask_cache": cache, "unmask_refresh": refresh}
        params.append(greedy(extra | {k: v for k, v in asked.items() if v}))
        tokens, _ = decode_cached(
            served.config,
            served.weights,
            prompt,
            MAX_TOKENS,
            block=BLOCK,
            choose=choose,
            dual=cache == "dual",
            refresh=refresh or BLOCK,
        )
        expected.append(tokens)
        exact = served.decode(prompt, choose)
        # An approximation, or the comparison would show nothing.
        assert (tokens == exact) == (refresh == 1), (cache, refresh)
    assert served.generate(prompts(), params) == expected


def test_rows_that_a_step_forwards(served: Served) -> None:
    prompt = prompts()[3]
    end = len(prompt) + 24
    for cache, rest in (("none", end), ("dual", BLOCK), ("prefix", None)):
        before = served.engine.run(family_calls.diffusion_counters)
        _, records = served.engine.run(
            engine_calls.generate_recorded,
            [prompt],
            greedy(STATIC | {"unmask_cache": cache}),
        )
        after = served.engine.run(family_calls.diffusion_counters)
        assert after[0] - before[0] == len(records)
        assert after[1] - before[1] == sum(record["rows"] for record in records)
        for step, record in enumerate(records):
            behind = end - len(record["prefix"]) if rest is None else rest
            assert record["rows"] == (behind if step % BLOCK else end)
        assert len(records) == 24


def test_window(served: Served) -> None:
    """In whole blocks, from the open block on."""
    windows = (1, 5, 8, 23)
    params = [greedy(STATIC | {"unmask_window": window}) for window in windows]
    expected = [
        served.decode(prompts()[4], choose_static, window=-(-window // 4) * 4)
        for window in windows
    ]
    assert served.generate([prompts()[4]] * len(windows), params) == expected
    assert len(set(map(tuple, expected))) > 1


def test_canvas_that_the_context_cuts(served: Served) -> None:
    rng = random.Random(8)
    prompt = [rng.randrange(EOS) for _ in range(CONTEXT - 10)]
    for cache in ("none", "dual"):
        (output,) = served.engine.run(
            engine_calls.generate,
            [prompt],
            greedy(STATIC | {"unmask_cache": cache}, max_tokens=None),
        )
        assert (len(output["tokens"]), output["finish_reason"]) == (10, "length")
        if cache == "none":
            expected = served.decode(prompt, choose_static, max_tokens=12)
            assert output["tokens"] == expected


def test_canvases_that_do_not_fit_a_step_wait(served: Served) -> None:
    several = [prompts()[5], prompts()[4], prompts()[5][:50], prompts()[1]]
    outputs, counts = served.engine.run(
        engine_calls.generate_counting, several, greedy(STATIC)
    )
    assert counts["widest_step"] <= CONTEXT
    assert counts["steps"] > 2 * 24
    expected = [served.decode(prompt, choose_static) for prompt in several]
    assert [output["tokens"] for output in outputs] == expected


def test_seeds_of_later_blocks_are_seen_from_the_start(served: Served) -> None:
    """A text with a gap: what follows the gap is part of every forward."""
    prompt = prompts()[2]
    later = [17, 18, 19, 20]
    pinned = {
        "diffusion_seed_canvas": [MASK] * 8 + later,
        "diffusion_pinned": [8, 9, 10, 11],
    }
    (output,) = served.generate([prompt], greedy(STATIC | pinned, max_tokens=12))
    assert output[8:] == later
    # The same text as the end of a canvas that the reference starts with.
    ids = prompt + [MASK] * 8 + later
    _, records = served.engine.run(
        engine_calls.generate_recorded, [prompt], greedy(STATIC | pinned, max_tokens=12)
    )
    everything = torch.ones((len(ids), len(ids)), dtype=torch.bool)
    logits = llada_logits(served.config, served.weights, ids, everything)
    logits = logits[len(prompt) : len(prompt) + BLOCK]
    found = records[0]["logits"]
    assert (found[:, : logits.shape[1]] - logits).abs().max() < 2e-4
    assert bool((found[:, logits.shape[1] :] == -torch.inf).all())


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"unmask_strategy": "lookahead"}, "every position sees every other one"),
        ({"unmask_strategy": "freedave", "unmask_candidates": 33}, "an integer from 1"),
        ({"unmask_strategy": "threshold+s2d2"}, "expected a strategy without s2d2"),
        ({"unmask_refresh": 2}, "expected it only beside a model with full attention"),
        ({"unmask_cache": "all"}, "expected one of none, prefix, dual"),
        ({"unmask_window": -1}, "an integer, at least 0"),
        ({"unmask_answer_block_length": 1}, "every position sees every other one"),
    ],
)
def test_refused_requests(served: Served, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        served.generate([[1]], greedy(extra))


def test_prompt_without_room_is_refused(served: Served) -> None:
    for length in (CONTEXT, CONTEXT + 1):
        with pytest.raises(RuntimeError, match=f"maximum.*{CONTEXT}"):
            served.generate([[1] * length], greedy(STATIC))


def test_what_a_batch_of_features_gives_alone(served: Served) -> None:
    """Several samples, a trace, log-probabilities; nobody changes anybody's output."""
    prompt = prompts()[3]
    hot = greedy(STATIC | {"unmask_cache": "dual"}, temperature=1.0, seed=4)
    params = [hot | {"n": 2}, greedy(STATIC, logprobs=1), greedy(THRESHOLD)]
    together = served.engine.run(engine_calls.generate, [prompt] * 3, params)
    first, other = together[0]["all_tokens"]
    assert first != other
    alone = served.engine.run(engine_calls.generate, [prompt], params[0])
    assert alone[0]["all_tokens"] == [first, other]
    assert together[1]["tokens"] == served.decode(prompt, choose_static)
    assert len(together[1]["logprobs"]) == MAX_TOKENS
    traced = greedy(STATIC | {"unmask_cache": "prefix", "unmask_trace": 1})
    plain = greedy(STATIC | {"unmask_cache": "prefix"})
    assert served.generate([prompt], traced) == served.generate([prompt], plain)
