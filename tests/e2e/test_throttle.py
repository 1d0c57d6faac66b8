# SPDX-License-Identifier: Apache-2.0
"""Verification while it pays (`adaptive_verification`), through the real engine."""

import itertools
from collections.abc import Iterator
from typing import Any

import engine_calls
import family_calls
import pytest
import speculation_calls as calls
from checkpoints import sdar_config, write_checkpoint
from e2e.test_strategies import BLOCK, prompts
from e2e.test_verification import ROUTES, params
from engine_process import EngineProcess

pytestmark = pytest.mark.e2e

NUM = 12
OTHERS = {name: options for name, options in ROUTES.items() if name != "always"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("throttle")
    write_checkpoint(path, sdar_config(BLOCK))
    return path


def start(checkpoint: Any, **options: Any) -> EngineProcess:
    return EngineProcess(
        model=str(checkpoint),
        max_model_len=96,
        block_size=32,
        max_num_seqs=NUM,
        # Less than twelve requests need: some are preempted.
        num_gpu_blocks_override=16,
        disable_log_stats=False,
        additional_config={"unmask": {"causal_kv": True} | options},
    )


@pytest.fixture(scope="module")
def steady(checkpoint: Any) -> Iterator[EngineProcess]:
    """Without the option: requests always verify as their routes say."""
    with start(checkpoint) as engine:
        yield engine


@pytest.fixture(scope="module")
def adaptive(checkpoint: Any) -> Iterator[EngineProcess]:
    with start(checkpoint, adaptive_verification=True) as engine:
        yield engine


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


def mixed(rule: str, temperature: float) -> list[dict[str, Any]]:
    """Every route, twice; `always` among them."""
    each = [
        params(f"{rule}+s2d2", temperature, route=route, **options)
        for route, options in ROUTES.items()
    ]
    return each * (NUM // len(each))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["threshold", "credit+hierarchy"])
def test_not_verified_is_the_rule(
    steady: EngineProcess, adaptive: EngineProcess, rule: str, temperature: float
) -> None:
    """Token for token, in as many forwards; `always` verifies all the same."""
    asked = mixed(rule, temperature)
    adaptive.run(calls.throttle, [False])
    found, counts = adaptive.run(engine_calls.generate_counting, prompts(NUM), asked)
    assert counts["preemptions"] > 0
    plain = steady.run(engine_calls.generate, prompts(NUM), params(rule, temperature))
    verified = steady.run(engine_calls.generate, prompts(NUM), asked)
    expected = [
        one if given["extra_args"]["unmask_route"] == "always" else other
        for given, one, other in zip(asked, verified, plain, strict=True)
    ]
    assert tokens(found) == tokens(expected) != tokens(verified)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_verified_is_as_without_the_option(
    steady: EngineProcess, adaptive: EngineProcess, temperature: float
) -> None:
    asked = mixed("threshold", temperature)
    adaptive.run(calls.throttle, [True])
    found = adaptive.run(engine_calls.generate, prompts(NUM), asked)
    expected = steady.run(engine_calls.generate, prompts(NUM), asked)
    assert tokens(found) == tokens(expected)


@pytest.mark.parametrize("pattern", [[True, False], [True] * 2 + [False] * 3])
def test_switched_in_the_middle(
    steady: EngineProcess, adaptive: EngineProcess, pattern: list[bool]
) -> None:
    """No draft is verified late, and who is not concerned does not notice."""
    asked = mixed("threshold", 0.0)
    adaptive.run(calls.throttle, pattern)
    found, counts = adaptive.run(engine_calls.generate_counting, prompts(NUM), asked)
    assert counts["preemptions"] > 0
    expected = steady.run(engine_calls.generate, prompts(NUM), asked)
    for given, one, other in zip(asked, found, expected, strict=True):
        if given["extra_args"]["unmask_route"] in ("always", "never"):
            assert one["tokens"] == other["tokens"]
        assert len(one["tokens"]) == len(other["tokens"])
    if pattern == [True, False]:
        # A draft is never followed by its verification: all decode by the rule.
        plain = steady.run(engine_calls.generate, prompts(NUM), params("threshold"))
        for given, one, other in zip(asked, found, plain, strict=True):
            if given["extra_args"]["unmask_route"] != "always":
                assert one["tokens"] == other["tokens"]


def rows_and_steps(engine: EngineProcess, asked: dict[str, Any]) -> list[int]:
    before = engine.run(family_calls.diffusion_counters)
    engine.run(engine_calls.generate, prompts(4), asked)
    after = engine.run(family_calls.diffusion_counters)
    return [b - a for a, b in zip(before, after, strict=True)]


def test_not_verified_costs_what_the_rule_costs(adaptive: EngineProcess) -> None:
    adaptive.run(calls.throttle, [False])
    plain = rows_and_steps(adaptive, params("threshold"))
    asked = params("threshold+s2d2", route="span_length", min_span=1)
    assert rows_and_steps(adaptive, asked) == plain
    adaptive.run(calls.throttle, [True])
    assert rows_and_steps(adaptive, asked)[1] > plain[1]


def test_what_is_unmasked_is_counted(adaptive: EngineProcess) -> None:
    """Every position once, whether drafts are verified or not."""
    prompt = list(range(BLOCK))
    for pattern in ([False], [True], [True, True, False]):
        adaptive.run(calls.throttle, pattern)
        for rule, options in itertools.product(("static", "factor"), OTHERS.items()):
            asked = params(f"{rule}+s2d2", route=options[0], **options[1])
            asked["max_tokens"] = 4 * BLOCK
            before = adaptive.run(calls.unmasked)
            adaptive.run(engine_calls.generate, [prompt], asked)
            assert adaptive.run(calls.unmasked) - before == 4 * BLOCK
    before = adaptive.run(calls.unmasked)
    adaptive.run(engine_calls.generate, [prompt], params("s2d2", route="always"))
    assert adaptive.run(calls.unmasked) == before


def test_the_clock_decides(adaptive: EngineProcess) -> None:
    """Verified where such steps are fast, and not any more when they are slow."""
    asked = params("static+s2d2", route="span_length", min_span=1)
    shares = [
        adaptive.run(calls.throttle_by_clock, prompts(NUM), asked, seconds, 12)
        for seconds in (0.1, 10.0)
    ]
    assert shares[0][0] < 0.2 and shares[0][-1] > 0.7, shares
    assert shares[1][-1] < 0.1, shares
