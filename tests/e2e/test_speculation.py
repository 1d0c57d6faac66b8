# SPDX-License-Identifier: Apache-2.0
"""Self-speculation changes how many forwards an output takes, and nothing else."""

import json
from collections.abc import Iterator
from typing import Any

import engine_calls
import jsonschema
import pytest
import speculation_calls as calls
import strategy_calls
import structured_calls
import torch
from checkpoints import MASK, sdar_config, write_checkpoint
from e2e.test_strategies import BLOCK, STRATEGIES, extra, prompts
from e2e.test_structured import DEMO, PROMPTS, SCHEMA
from engine_process import EngineProcess

from vllm_unmask.decoding.learned import Filter, save_filter
from vllm_unmask.presets import compose
from vllm_unmask.trace import Trace

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CANDIDATES = 6
NUM_MODELS = 8
# What speculation can be added to, and the rule that each has without naming it.
ALONE = [
    strategy
    for strategy in STRATEGIES
    if compose(strategy).fillers.isdisjoint({"lookahead", "freedave", "s2d2"})
]


def with_rule(strategy: str) -> str:
    """The strategy with its rule spelled out: freedave alone would be static."""
    fillers = compose(strategy).fillers
    implied = "threshold" in fillers and "threshold" not in strategy.split("+")
    preset = strategy in strategy_calls.presets()
    return f"{strategy}+threshold" if implied and not preset else strategy


def params(strategy: str, **options: Any) -> dict[str, Any]:
    return {
        "temperature": 0.0,
        "seed": 5,
        "ignore_eos": True,
        "max_tokens": 37,
        "extra_args": extra(strategy),
    } | options


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    path = tmp_path_factory.mktemp("speculation")
    write_checkpoint(path, sdar_config(BLOCK))
    torch.manual_seed(0)
    shapes = ((12, BLOCK), (12,), (BLOCK, 12), (BLOCK,))
    (path / "unmask").mkdir()
    save_filter(
        path / "unmask" / "filter.safetensors", Filter(*map(torch.randn, shapes))
    )
    with EngineProcess(
        model=str(path),
        max_model_len=96,
        block_size=32,
        max_num_seqs=16,
        # Less than sixteen requests need: some are preempted.
        num_gpu_blocks_override=20,
        async_scheduling=request.param,
        additional_config={
            "unmask": {
                "max_candidates": CANDIDATES,
                "adaptive_candidates": False,
                # Forwards are counted, also of steps that were planned for nothing.
                "layout": "uniform" if request.param else "auto",
            }
        },
    ) as engine:
        engine.run(strategy_calls.use_byte_tokenizer)
        yield engine


def test_random_models_decode_the_same(engine: EngineProcess) -> None:
    """Eight prompts alone or together, on many models; forwards are never more."""
    compared = engine.run(
        calls.compare_random_models,
        NUM_MODELS,
        prompts(8),
        [params("static"), params("threshold")],
    )
    accepted = sum(one["careful"] - one["speculative"] for one in compared)
    for one in compared:
        assert one["same"], one
        assert one["speculative"] <= one["careful"], one
    assert accepted > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_strategy_decodes_the_same(
    engine: EngineProcess, temperature: float
) -> None:
    named = [with_rule(strategy) for strategy in ALONE]
    asked = [params(strategy, temperature=temperature) for strategy in named]
    faster = [
        params(f"{strategy}+freedave", temperature=temperature) for strategy in named
    ]
    texts = prompts(len(named))
    careful = engine.run(engine_calls.generate, texts, asked)
    speculative, counts = engine.run(engine_calls.generate_counting, texts, faster)
    assert counts["preemptions"] > 0
    for strategy, one, other in zip(named, careful, speculative, strict=True):
        assert one["tokens"] == other["tokens"], strategy


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 3},
        {"n": 3, "temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 7, "min_p": 0.01},
        {"bad_words_token_ids": [[3, 5], [7], [4, 4, 4]]},
        {"allowed_token_ids": [3, 4, 5, 6, 7]},
        {"logit_bias": {5: 3.0}, "min_tokens": 5, "ignore_eos": False},
        {"stop_token_ids": [3, 4, 5], "ignore_eos": False, "temperature": 1.0},
        {
            "extra_args": {"diffusion_seed_canvas": [*([MASK] * 5 + [7, 8, 9]) * 4]},
            "temperature": 1.0,
        },
        {"max_tokens": 90},
    ],
    ids=lambda options: next(iter(options)),
)
def test_sampling_parameters(engine: EngineProcess, options: dict[str, Any]) -> None:
    options = dict(options)
    seeds = options.pop("extra_args", {})
    answers = []
    for strategy in ("static", "static+freedave"):
        asked = params(strategy, **options)
        asked["extra_args"] = asked["extra_args"] | seeds
        answers.append(engine.run(calls.generate, prompts(4), asked))
    careful, speculative = answers
    for one, other in zip(careful, speculative, strict=True):
        assert one["all_tokens"] == other["all_tokens"]
        assert one["finish_reason"] == other["finish_reason"]
        assert len(one["logprobs"]) == len(other["logprobs"])
        for position, again in zip(one["logprobs"], other["logprobs"], strict=True):
            assert position.keys() == again.keys()
            for token, (logprob, rank) in position.items():
                assert again[token] == (pytest.approx(logprob, abs=1e-4), rank)


@pytest.mark.parametrize("strategy", ["static", "threshold+edit", "static+remdm"])
def test_trace_is_that_of_careful_decoding(
    engine: EngineProcess, strategy: str
) -> None:
    careful, speculative = (
        engine.run(
            strategy_calls.generate_traced, prompts(3), params(name) | traced(name)
        )
        for name in (strategy, f"{strategy}+freedave")
    )
    for one, other in zip(careful, speculative, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["trace"]["num_steps"] == other["trace"]["num_steps"]
        for token, again in zip(
            one["trace"]["tokens"], other["trace"]["tokens"], strict=True
        ):
            assert [rounded(e) for e in token["events"]] == [
                rounded(e) for e in again["events"]
            ]
        # What speculation did is told beside it.
        told = Trace.from_dict(other["trace"])
        assert len(told.forwards) == other["forwards"]
        for forward in told.forwards:
            assert forward.accepted <= forward.steps <= forward.accepted + 1
    forwards = [sum(one["forwards"] for one in of) for of in (careful, speculative)]
    assert forwards[1] <= forwards[0]
    assert forwards[1] < forwards[0] or strategy != "static"


def traced(strategy: str) -> dict[str, Any]:
    return {"extra_args": extra(strategy, trace=True)}


def rounded(event: dict[str, Any]) -> dict[str, Any]:
    if "confidence" in event:
        return event | {"confidence": round(event["confidence"], 3)}
    return event


def test_one_candidate_is_the_strategy_itself(engine: EngineProcess) -> None:
    none = {"extra_args": extra("static+freedave", candidates=1)}
    for prompt in prompts(3):
        plain, counts = engine.run(
            engine_calls.generate_counting, [prompt], params("static")
        )
        single, same = engine.run(
            engine_calls.generate_counting, [prompt], params("static") | none
        )
        assert plain[0]["tokens"] == single[0]["tokens"]
        assert counts["steps"] == same["steps"]


def test_too_many_candidates_are_refused(engine: EngineProcess) -> None:
    message = engine.run(
        strategy_calls.refusal,
        params("freedave") | {"extra_args": extra("freedave", candidates=7)},
    )
    assert "unmask_candidates=7" in message
    assert f"from 1 to {CANDIDATES}" in message


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def demo(request: pytest.FixtureRequest) -> Iterator[EngineProcess]:
    with EngineProcess(
        model=str(DEMO / "sdar"),
        skip_tokenizer_init=False,
        max_model_len=512,
        async_scheduling=request.param,
        additional_config={"unmask": {"adaptive_candidates": False}},
    ) as engine:
        yield engine


def test_fewer_forwards_on_the_demo_model(demo: EngineProcess) -> None:
    """At least 2.5 times fewer, token for token the same."""
    forwards = {}
    texts = {}
    for strategy in ("static", "freedave"):
        asked = {"temperature": 0.0, "max_tokens": 160}
        asked["extra_args"] = {"unmask_strategy": strategy}
        texts[strategy], forwards[strategy] = demo.run(
            calls.chat_counting_forwards, PROMPTS * 2, asked
        )
    assert texts["static"] == texts["freedave"]
    assert forwards["static"] >= 2.5 * forwards["freedave"], forwards


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_tokens", [80, 200])
@pytest.mark.parametrize("strategy", ["static", "threshold", "threshold+edit"])
def test_with_a_grammar(
    demo: EngineProcess, strategy: str, max_tokens: int, temperature: float
) -> None:
    answers = []
    for name in (strategy, f"{strategy}+freedave"):
        asked = {
            "structured_outputs": {"json": SCHEMA},
            "temperature": temperature,
            "seed": 3,
            "max_tokens": max_tokens,
            "extra_args": {"unmask_strategy": name},
        }
        answers.append(demo.run(structured_calls.chat, PROMPTS, asked))
    for careful, speculative in zip(*answers, strict=True):
        assert careful["tokens"] == speculative["tokens"]
        assert careful["finish_reason"] == speculative["finish_reason"]
        jsonschema.validate(json.loads(speculative["text"]), SCHEMA)
