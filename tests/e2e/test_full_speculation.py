# SPDX-License-Identifier: Apache-2.0
"""Full attention: self-speculation changes the number of forwards, and nothing else."""

import random
import shutil
from collections.abc import Iterator
from typing import Any

import engine_calls
import pytest
import speculation_calls as calls
import strategy_calls
import structured_calls
from checkpoints import write_checkpoint
from e2e.test_families import DEMO, IDS, SCHEMA
from engine_process import EngineProcess
from family_references import REFERENCES

pytestmark = pytest.mark.e2e

BLOCK = 4  # what `speculation_calls.generate_planned` counts with
CONTEXT = 256
CANDIDATES = 6
POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "moving": {"unmask_window": 5},
    "prefix": {"unmask_cache": "prefix"},
    "prefix, refresh": {"unmask_cache": "prefix", "unmask_refresh": 3},
    "dual": {"unmask_cache": "dual"},
    "dual, refresh": {"unmask_cache": "dual", "unmask_refresh": 3, "unmask_window": 9},
    "dual, always": {"unmask_cache": "dual", "unmask_refresh": 1},
}
RULES: dict[str, dict[str, Any]] = {
    "static": {},
    "threshold": {"unmask_threshold": 0.1},
}


@pytest.fixture(scope="module", params=["LLaDAModelLM", "DreamModel"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    path = tmp_path_factory.mktemp(request.param)
    write_checkpoint(path, REFERENCES[request.param].config(BLOCK, **IDS))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / file, path)
    with EngineProcess(
        model=str(path),
        skip_tokenizer_init=False,
        block_size=32,
        max_model_len=CONTEXT,
        # Less than the requests of a batch and their windows need.
        max_num_batched_tokens=2 * CONTEXT,
        additional_config={
            "unmask": {"max_candidates": CANDIDATES, "adaptive_candidates": False}
        },
    ) as engine:
        yield engine


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(5)
    lengths = [3, 31, 1, 9, 60, 4, 17]
    return [
        [rng.randrange(5, IDS["vocab_size"]) for _ in range(lengths[i % len(lengths)])]
        for i in range(count)
    ]


def params(
    rule: str, policy: str, faster: bool, seed: int | None = None, **more: Any
) -> dict[str, Any]:
    """Greedy without a seed."""
    extra = {"unmask_strategy": rule + "+freedave" * faster, **RULES[rule]}
    return {
        "temperature": 0.0 if seed is None else 1.0,
        "seed": seed,
        "ignore_eos": True,
        # Ends inside a block.
        "max_tokens": 22,
        "extra_args": extra | POLICIES[policy] | more.pop("extra_args", {}),
    } | more


def test_alone(engine: EngineProcess) -> None:
    """Every rule with every policy: the same tokens, in no more forwards."""
    saved = dict.fromkeys(POLICIES, 0)
    for policy in POLICIES:
        for rule, prompt, seed in zip(
            ("static", "static", "threshold"), prompts(3), (None, 3, 4), strict=True
        ):
            careful, speculative = (
                engine.run(
                    engine_calls.generate_counting,
                    [prompt],
                    params(rule, policy, faster, seed),
                )
                for faster in (False, True)
            )
            assert careful[0][0]["tokens"] == speculative[0][0]["tokens"], (
                policy,
                rule,
            )
            assert careful[1]["steps"] >= speculative[1]["steps"], (policy, rule)
            saved[policy] += careful[1]["steps"] - speculative[1]["steps"]
    assert all(saved.values()), saved


@pytest.mark.parametrize("every", [0, 5])
def test_all_in_one_batch(engine: EngineProcess, every: int) -> None:
    """Policies, rules and temperatures mixed; preempted or not."""
    asked = [
        (rule, policy, seed)
        for policy in POLICIES
        for rule in RULES
        for seed in (None, 6)
    ]
    careful, speculative = (
        engine.run(
            calls.generate_preempted,
            prompts(len(asked)),
            [params(rule, policy, faster, seed) for rule, policy, seed in asked],
            every * faster,
        )
        for faster in (False, True)
    )
    for one, *same in zip(asked, careful[0], speculative[0], strict=True):
        assert same[0] == same[1], one
    assert bool(speculative[1]) == bool(every)


def test_windows_cost_nobody_anything(engine: EngineProcess) -> None:
    """Neither pages nor a place in the step, and no rows that are not there."""
    policies = ["none", "dual", "prefix", "moving"] * 2
    careful, speculative = (
        engine.run(
            calls.generate_planned,
            prompts(8),
            [params("static", policy, faster, ignore_eos=True) for policy in policies],
        )
        for faster in (False, True)
    )
    assert careful[0] == speculative[0]
    assert len(careful[1]) > len(speculative[1])
    assert not any(step["windows"] for step in careful[1])
    assert any(step["windows"] > 1 for step in speculative[1])
    assert max(step["spare"] for step in speculative[1]) == 0
    assert max(step["rows"] for step in speculative[1]) <= 2 * CONTEXT


def test_context_leaves_no_room_for_windows(engine: EngineProcess) -> None:
    """Up to its last position; a shorter last block is decoded as well."""
    rng = random.Random(8)
    for length, policy in ((CONTEXT - 30, "none"), (CONTEXT - 10, "dual")):
        prompt = [rng.randrange(5, IDS["vocab_size"]) for _ in range(length)]
        careful, speculative = (
            engine.run(
                calls.generate_planned,
                [prompt],
                [params("static", policy, faster, max_tokens=None)],
            )
            for faster in (False, True)
        )
        assert careful[0] == speculative[0]
        assert len(careful[0][0]) == CONTEXT - length
        widest = max(step["windows"] for step in speculative[1])
        assert widest == 0 or policy != "none"


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 2},
        {"n": 2, "seed": 7},
        {"seed": 7, "top_p": 0.9, "top_k": 7, "logit_bias": {9: 3.0}},
        {"stop_token_ids": list(range(20, 90)), "ignore_eos": False, "seed": 8},
        {"bad_words_token_ids": [[30, 31], [7], [40, 40]]},
        {"extra_args": {"diffusion_seed_canvas": [4, 4, 9, 10, *[4] * 6, 50, 51]}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_sampling_parameters(engine: EngineProcess, options: dict[str, Any]) -> None:
    for policy in ("none", "dual"):
        careful, speculative = (
            engine.run(
                calls.generate,
                prompts(2),
                params("static", policy, faster, **dict(options)),
            )
            for faster in (False, True)
        )
        for one, other in zip(careful, speculative, strict=True):
            assert one["all_tokens"] == other["all_tokens"]
            assert one["finish_reason"] == other["finish_reason"]
            for position, again in zip(one["logprobs"], other["logprobs"], strict=True):
                for token, (logprob, rank) in position.items():
                    assert again[token] == (pytest.approx(logprob, abs=1e-4), rank)


def test_trace_is_that_of_careful_decoding(engine: EngineProcess) -> None:
    traced = {"extra_args": {"unmask_trace": True}}
    for policy in ("none", "dual, refresh"):
        (careful,), (speculative,) = (
            engine.run(
                strategy_calls.generate_traced,
                prompts(1),
                params("static", policy, faster, **dict(traced)),
            )
            for faster in (False, True)
        )
        assert careful["tokens"] == speculative["tokens"]
        steps = [
            [
                [event["step"] for event in token["events"]]
                for token in of["trace"]["tokens"]
            ]
            for of in (careful, speculative)
        ]
        assert steps[0] == steps[1]
        assert careful["trace"]["num_steps"] == speculative["trace"]["num_steps"]
        assert len(speculative["trace"]["forwards"]) == speculative["forwards"]


def test_one_candidate_is_the_strategy_itself(engine: EngineProcess) -> None:
    single = {"extra_args": {"unmask_candidates": 1}}
    careful = engine.run(
        calls.generate_planned, prompts(1), [params("static", "none", False)]
    )
    speculative = engine.run(
        calls.generate_planned, prompts(1), [params("static", "none", True, **single)]
    )
    assert careful == speculative


@pytest.mark.parametrize("seed", [None, 2])
def test_with_a_grammar(engine: EngineProcess, seed: int | None) -> None:
    texts = ["one", "two", "three"]
    policies = ("none", "prefix", "dual")
    careful, speculative = (
        engine.run(
            structured_calls.chat,
            texts,
            [
                params("static", policy, faster, seed, max_tokens=60)
                | {"structured_outputs": {"json": SCHEMA}, "ignore_eos": False}
                for policy in policies
            ],
        )
        for faster in (False, True)
    )
    for one, other in zip(careful, speculative, strict=True):
        assert one["tokens"] == other["tokens"]
