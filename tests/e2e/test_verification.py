# SPDX-License-Identifier: Apache-2.0
"""S2D2 through the real engine: what it claims about its outputs, and no more."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import engine_calls
import pytest
import speculation_calls
import strategy_calls
from checkpoints import fast_dllm_v2_config, sdar_config, write_checkpoint
from e2e.test_strategies import BLOCK, extra, prompts
from engine_process import EngineProcess

from vllm_unmask.trace import Trace

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MAX_TOKENS = 37
ROUTES: dict[str, dict[str, Any]] = {
    "always": {},
    "never": {},
    "span_length": {"min_span": 4},
    "score_threshold": {"min_score": 2.0, "acceptance_estimate": "margin_linear"},
    "score_hysteresis": {"score_on": 2.5, "score_off": 2.0, "verify_cost": 1.0},
    "contextual_bandit": {"exploration": 0.3},
}


def params(strategy: str, temperature: float = 0.0, **options: Any) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "seed": 5,
        "ignore_eos": True,
        "max_tokens": MAX_TOKENS,
        "extra_args": extra(strategy, **options),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("verification")
    write_checkpoint(path, sdar_config(BLOCK))
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(request: pytest.FixtureRequest, checkpoint: Any) -> Iterator[EngineProcess]:
    with EngineProcess(
        model=str(checkpoint),
        max_model_len=96,
        block_size=32,
        max_num_seqs=12,
        # Less than twelve requests need: some are preempted.
        num_gpu_blocks_override=16,
        async_scheduling=request.param,
        additional_config={"unmask": {"causal_kv": True}},
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def one_by_one(checkpoint: Any) -> Iterator[EngineProcess]:
    """The same weights in autoregressive mode: blocks of one position."""
    with EngineProcess(
        model=str(checkpoint),
        max_model_len=96,
        block_size=32,
        max_logprobs=-1,
        additional_config={"unmask": {"block_length": 1}},
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def greedy(one_by_one: EngineProcess) -> list[list[int]]:
    answers = one_by_one.run(engine_calls.generate, prompts(12), params("static"))
    return [answer["tokens"] for answer in answers]


def test_always_verified_is_autoregressive_decoding(
    engine: EngineProcess, greedy: list[list[int]]
) -> None:
    """Token for token, whatever drafted: alone, together, preempted."""
    asked = params("s2d2", route="always")
    together, counts = engine.run(engine_calls.generate_counting, prompts(12), asked)
    assert counts["preemptions"] > 0
    assert [answer["tokens"] for answer in together] == greedy
    for rule in ("static", "credit+factor", "hierarchy"):
        answers = engine.run(
            engine_calls.generate, prompts(3), params(f"{rule}+s2d2", route="always")
        )
        assert [answer["tokens"] for answer in answers] == greedy[:3], rule


def test_block_kv_is_not_autoregressive(checkpoint: Any, greedy: Any) -> None:
    """The negative control: with the model's own KV the verifier is another one."""
    with EngineProcess(
        model=str(checkpoint), max_model_len=96, block_size=32
    ) as engine:
        answers = engine.run(
            engine_calls.generate, prompts(12), params("s2d2", route="always")
        )
    assert [answer["tokens"] for answer in answers] != greedy


def test_shifted_logits_need_one_window(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """With shifted logits a draft scores itself: no room for masks is needed."""
    path = tmp_path_factory.mktemp("shifted")
    write_checkpoint(path, fast_dllm_v2_config(BLOCK))
    tokens = []
    for options, asked in (
        ({"causal_kv": True, "max_candidates": 2}, params("s2d2", route="always")),
        ({"block_length": 1}, params("static")),
    ):
        with EngineProcess(
            model=str(path),
            max_model_len=96,
            block_size=32,
            additional_config={"unmask": options},
        ) as one:
            answers = one.run(engine_calls.generate, prompts(6), asked)
            tokens.append([answer["tokens"] for answer in answers])
    assert tokens[0] == tokens[1]


def test_the_trace_says_what_was_verified(
    engine: EngineProcess, greedy: list[list[int]]
) -> None:
    """Every token was drafted before it was accepted, or another one was."""
    asked = params("s2d2", route="always", trace=True)
    (answer,) = engine.run(strategy_calls.generate_traced, prompts(1), asked)
    trace = Trace.from_dict(answer["trace"])
    assert answer["tokens"] == greedy[0]
    assert [forward.steps for forward in trace.forwards] == [0, 1] * trace.num_steps
    for token in trace.tokens:
        *drafted, last, committed = token.events
        assert committed.kind == "committed" and {e.kind for e in drafted} == {
            "drafted"
        }
        accepted = drafted[-1].token_id == token.token_id
        assert last.kind == ("accepted" if accepted else "resampled")
        assert drafted[-1].step == last.step
    for forward in trace.forwards[1::2]:
        # Up to the first that fails, or all.
        assert forward.accepted <= forward.drafted > 0
    assert trace.count("accepted") > 0 and trace.count("resampled") > 0


def rows(engine: EngineProcess, asked: dict[str, Any]) -> list[int]:
    """Rows of each denoising step of one request, behind its prompt."""
    _, records = engine.run(engine_calls.generate_recorded, prompts(1), asked)
    return [record["rows"] for record in records[1:]]


def test_rows_are_forwarded_where_a_draft_waits(
    engine: EngineProcess, request: pytest.FixtureRequest
) -> None:
    """Other steps have those of the plain rule; ahead of time nobody knows."""
    always = rows(engine, params("s2d2", route="always"))
    if request.node.callspec.params["engine"]:
        assert set(always) == {4 * BLOCK}
        return
    # Each draft, behind a block that becomes final or not, and its verification.
    assert set(always[1::2]) == {BLOCK, 2 * BLOCK}
    assert set(always[::2]) == {3 * BLOCK}
    plain = rows(engine, params("threshold"))
    assert rows(engine, params("s2d2", route="never")) == plain


def test_never_verified_is_the_strategy(engine: EngineProcess) -> None:
    for rule, temperature in itertools.product(("threshold", "static"), (0.0, 1.0)):
        plain = engine.run(engine_calls.generate, prompts(6), params(rule, temperature))
        verified = engine.run(
            engine_calls.generate,
            prompts(6),
            params(f"{rule}+s2d2", temperature, route="never"),
        )
        assert plain == verified


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_company_and_preemption_change_nothing(
    engine: EngineProcess, temperature: float
) -> None:
    asked = [
        params("s2d2", temperature, route=route, **options)
        for route, options in ROUTES.items()
    ] * 2
    texts = prompts(len(asked))
    alone = [
        engine.run(engine_calls.generate, [prompt], one)[0]["tokens"]
        for prompt, one in zip(texts, asked, strict=True)
    ]
    together, counts = engine.run(engine_calls.generate_counting, texts, asked)
    assert counts["preemptions"] > 0
    assert [answer["tokens"] for answer in together] == alone
    assert all(len(tokens) == MAX_TOKENS for tokens in alone)


def test_to_the_last_position(engine: EngineProcess) -> None:
    """Where there is no room for the verification, the strategy goes on by itself."""
    asked = params("s2d2", route="always") | {"max_tokens": 93}
    (answer,) = engine.run(engine_calls.generate, prompts(1), asked)
    assert len(answer["tokens"]) == 93


ALLOWED = [3, 8, 21]
LENGTH = 3
NUM_DRAWS = 2500


def sequences(engine: EngineProcess, prompt: list[int], **options: Any) -> Counter[Any]:
    """How often each sequence is drawn, with a seed of its own each time."""
    asked = [
        params("s2d2", 1.0, **options)
        | {"seed": seed, "max_tokens": LENGTH, "allowed_token_ids": ALLOWED}
        for seed in range(NUM_DRAWS)
    ]
    answers = engine.run(engine_calls.generate, [prompt] * NUM_DRAWS, asked)
    return Counter(tuple(answer["tokens"]) for answer in answers)


def law(engine: EngineProcess, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Probability of each sequence under autoregressive decoding."""
    chances = {(): 1.0}
    for _ in range(LENGTH):
        asked = params("static") | {"max_tokens": 1, "logprobs": -1}
        answers = engine.run(
            engine_calls.generate, [[*prompt, *known] for known in chances], asked
        )
        longer = {}
        for (known, chance), answer in zip(chances.items(), answers, strict=True):
            logprobs = [answer["logprobs"][0][token][0] for token in ALLOWED]
            weights = [math.exp(logprob) for logprob in logprobs]
            for token, weight in zip(ALLOWED, weights, strict=True):
                longer[(*known, token)] = chance * weight / sum(weights)
        chances = longer
    return chances


def fits(drawn: Counter[Any], chances: dict[tuple[int, ...], float]) -> bool:
    """Chi-square; sequences that are expected less than five times count as one."""
    rare = {key for key, chance in chances.items() if chance * NUM_DRAWS < 5}
    bins = [
        (drawn[key], chance * NUM_DRAWS)
        for key, chance in chances.items()
        if key not in rare
    ]
    expected = sum(chances[key] for key in rare) * NUM_DRAWS
    bins.append((sum(drawn[key] for key in rare), max(expected, 5.0)))
    total = sum((seen - expected) ** 2 / expected for seen, expected in bins)
    degrees = len(bins) - 1
    assert degrees >= 12
    return total < degrees + 6 * math.sqrt(2 * degrees)


def test_the_law_of_whole_sequences(
    engine: EngineProcess, one_by_one: EngineProcess
) -> None:
    """Sequences of three tokens; plain diffusion, and tempering, fail the same test."""
    # Weights that are unsure of everything; no test below asks for the others.
    for one in (engine, one_by_one):
        one.run(speculation_calls.use_random_weights, 0, sharpness=0.3)
    prompt = prompts(1)[0]
    chances = law(one_by_one, prompt)
    assert fits(sequences(engine, prompt, route="always"), chances)
    assert not fits(sequences(engine, prompt, route="never"), chances)
    assert not fits(sequences(engine, prompt, route="always", tempering=0.1), chances)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"route": "sometimes"}, "unmask_route='sometimes'"),
        ({"min_span": 3}, "it only beside s2d2 and route=span_length"),
        ({"route": "span_length", "min_span": 0}, "unmask_min_span=0"),
        ({"tempering": -1.0}, "unmask_tempering=-1.0"),
    ],
)
def test_refusals(engine: EngineProcess, given: dict[str, Any], named: str) -> None:
    message = engine.run(strategy_calls.refusal, params("s2d2", **given))
    assert named in message
