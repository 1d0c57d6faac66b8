# SPDX-License-Identifier: Apache-2.0
"""Every strategy through the real engine, in float32: sync and async scheduling."""

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import engine_calls
import pytest
import strategy_calls as calls
import torch
from checkpoints import EOS, MASK, sdar_config, write_checkpoint
from engine_process import EngineProcess

from vllm_unmask.decoding.learned import Filter, save_filter
from vllm_unmask.presets import FILLERS, PRESETS
from vllm_unmask.trace import Trace, canvas_at

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BLOCK = 8
MAX_TOKENS = 37
# Every filler alone, every preset, and compositions that fill many slots at once.
STRATEGIES = [
    *FILLERS,
    *PRESETS,
    "credit+local_leap+prophet",
    "credit+eos_rejection+factor+sub_blocks+sched+lookahead",
    "klass+adablock+edit+lookahead",
    "bacd+remdm+prophet",
    "learned+end_of_text+lookahead",
    "ccd+credit+end_of_text",
]
# Options under which random weights, unsure of all, do more than the schedule asks.
LOOSE: dict[str, Any] = {
    "threshold": 0.02,
    "low_threshold": 0.02,
    "relaxed_threshold": 0.01,
    "entropy_bound": 3.0,
    "kl_threshold": 5.0,
    "gap_high": 2.0,
    "gap_low": 0.5,
    "edit_threshold": 0.03,
    "post_steps": 3,
    "ahead_threshold": 0.02,
    "delimiter_threshold": 0.0,
    "factor": 1.9,
}


def extra(strategy: str, **options: Any) -> dict[str, Any]:
    """A request's ``extra_args``: the strategy, with those loose options it has."""
    from vllm_unmask.presets import compose

    known = compose(strategy).defaults
    loose = {name: value for name, value in LOOSE.items() if name in known}
    given = {"strategy": strategy} | loose | options
    return {f"unmask_{name}": value for name, value in given.items()}


def params(strategy: str, temperature: float = 0.0, **options: Any) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "seed": 5,
        "ignore_eos": True,
        "max_tokens": MAX_TOKENS,
        "extra_args": extra(strategy, **options),
    }


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(EOS) for _ in range(3 + 2 * i % 19)] for i in range(count)]


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    path = tmp_path_factory.mktemp("strategies")
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
    ) as engine:
        engine.run(calls.use_byte_tokenizer)
        yield engine


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_company_and_preemption_change_nothing(
    engine: EngineProcess, temperature: float
) -> None:
    alone = [
        engine.run(engine_calls.generate, [prompt], params(strategy, temperature))[0]
        for strategy, prompt in zip(STRATEGIES, prompts(len(STRATEGIES)), strict=True)
    ]
    together, counts = engine.run(
        engine_calls.generate_counting,
        prompts(len(STRATEGIES)),
        [params(strategy, temperature) for strategy in STRATEGIES],
    )
    assert counts["preemptions"] > 0
    for strategy, one, many in zip(STRATEGIES, alone, together, strict=True):
        assert len(one["tokens"]) == MAX_TOKENS, strategy
        assert MASK not in one["tokens"], strategy
        assert one["tokens"] == many["tokens"], strategy


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trace_replays_to_the_output(engine: EngineProcess, strategy: str) -> None:
    (answer,) = engine.run(
        calls.generate_traced, [prompts(9)[8]], params(strategy, trace=True)
    )
    trace = Trace.from_dict(answer["trace"])
    assert [token.token_id for token in trace.tokens] == answer["tokens"]
    fillers = calls.fillers(strategy)
    assert bool(trace.forwards) != fillers.isdisjoint({"freedave", "s2d2"})
    assert (len(trace.forwards) or trace.num_steps) == answer["forwards"]
    last = canvas_at(trace, trace.num_steps - 1)
    assert [token for token, _ in last] == answer["tokens"]
    kinds = {event.kind for token in trace.tokens for event in token.events}
    assert "committed" in kinds and kinds & {"revealed", "accepted", "resampled"}
    # A forward that drafts for the verifier is one without a step.
    waited = 0 in [forward.steps for forward in trace.forwards]
    assert ("drafted" in kinds) == ("s2d2" in fillers and waited)
    if "edit" in fillers:
        assert "edited" in kinds
    else:
        assert "edited" not in kinds
    if fillers.isdisjoint({"remdm", "rcr"}):
        assert "masked" not in kinds
    for event in itertools.chain(*(token.events for token in trace.tokens)):
        assert event.kind != "revealed" or 0 < (event.confidence or 0) <= 1


def test_masks_again(engine: EngineProcess) -> None:
    """Both ways to mask again do, and the blocks end all the same."""
    for strategy in ("static+remdm", "rcr"):
        (answer,) = engine.run(
            calls.generate_traced, prompts(1), params(strategy, trace=True)
        )
        kinds = [e["event"] for t in answer["trace"]["tokens"] for e in t["events"]]
        assert "masked" in kinds, strategy


@pytest.mark.parametrize(
    ("strategy", "options", "simpler", "simpler_options"),
    [
        ("credit+threshold", {"credit_weight": 0.0}, "threshold", {}),
        ("local_leap", {"radius": 0}, "threshold", {"strict": False}),
        ("local_leap", {"relaxed_threshold": 0.02}, "threshold", {"strict": False}),
        ("klass", {"kl_history": 0}, "threshold", {}),
        ("factor", {"factor": 0.0}, "static", {}),
        ("entropy_bounded", {"entropy_bound": 0.0}, "static", {}),
        ("entropy_threshold", {"entropy_bound": 0.0}, "static", {}),
        ("hierarchy", {"low_threshold": 1.0}, "threshold", {}),
        ("sub_blocks+threshold", {"sub_block_length": 8}, "threshold", {}),
        (
            "sub_blocks+threshold",
            {"sub_block_length": 1},
            "sub_blocks+static",
            {"sub_block_length": 1},
        ),
        (
            "adablock+threshold",
            {"delimiter_threshold": 1.0, "sub_block_length": 8},
            "threshold",
            {},
        ),
        ("prophet+static", {"gap_high": 1e6, "gap_low": 1e6}, "static", {}),
        ("edit+threshold", {"edit_threshold": 1.0, "post_steps": 0}, "threshold", {}),
        ("edit+threshold", {"edit_threshold": 1.0, "post_steps": 2}, "threshold", {}),
        ("static+remdm", {"remask": "cap", "remask_rate": 0.0}, "static", {}),
        ("threshold+lookahead", {"ahead_threshold": 1.0}, "threshold", {}),
        ("eos_rejection+threshold", {"end_floor": 1.0}, "threshold", {}),
        ("static", {"steps": 4, "step_sizes": "linear"}, "static", {"steps": 4}),
        ("learned", {"threshold": 1.0}, "static", {}),
        ("dimple", {"threshold": 1.0, "steps": 8}, "dimple", {"threshold": 1.0}),
    ],
)
def test_degenerate_options_are_the_simpler_strategy(
    engine: EngineProcess,
    strategy: str,
    options: dict[str, Any],
    simpler: str,
    simpler_options: dict[str, Any],
) -> None:
    asked = params(strategy, 0.0, **options)
    plain = params(simpler, 0.0, **simpler_options)
    both = engine.run(engine_calls.generate, prompts(6) * 2, [asked] * 6 + [plain] * 6)
    tokens = [answer["tokens"] for answer in both]
    assert tokens[:6] == tokens[6:]


def test_strategies_differ(engine: EngineProcess) -> None:
    """The comparisons above would hold if every strategy were the same."""
    steps = {}
    for strategy in ("static", "threshold", "factor", "bacd", "credit", "llada_cosine"):
        (answer,) = engine.run(
            calls.generate_traced, prompts(1), params(strategy, trace=True)
        )
        events = [t["events"][0]["step"] for t in answer["trace"]["tokens"]]
        steps[strategy] = tuple(events)
    assert len(set(steps.values())) >= 4, steps


def test_pinned_tokens_stay(engine: EngineProcess) -> None:
    seeds = [MASK, 11, MASK, 12, 13, 14, 15, 16, 17, 18, MASK, 19]
    pinned = [1, 4, 9]
    for strategy in ("threshold", "edit+threshold", "static+remdm", "rcr", "lookahead"):
        asked = params(strategy, trace=True)
        asked["extra_args"] |= {
            "diffusion_seed_canvas": seeds,
            "diffusion_pinned": pinned,
        }
        for prompt in prompts(9):
            (answer,) = engine.run(calls.generate_traced, [prompt], asked)
            assert [answer["tokens"][p] for p in pinned] == [11, 13, 18], strategy
            first = [t["events"][0]["event"] for t in answer["trace"]["tokens"]]
            places = [i for i, kind in enumerate(first) if kind == "seeded"]
            held = [i for i, token in enumerate(seeds) if token != MASK]
            assert places == held, strategy


def test_a_whole_draft_is_kept_or_doubted(engine: EngineProcess) -> None:
    prompt = prompts(1)[0]
    plain = engine.run(engine_calls.generate, [prompt], params("static"))[0]["tokens"]
    draft = {"diffusion_seed_canvas": plain}
    kept = params("static", trace=True)
    kept["extra_args"] |= draft
    (answer,) = engine.run(calls.generate_traced, [prompt], kept)
    assert answer["tokens"] == plain
    # One forward a block: its KV has to be written.
    assert answer["forwards"] == -(-(len(prompt) % BLOCK + MAX_TOKENS) // BLOCK)
    doubted = params("static", trace=True, doubt=1.0)
    doubted["extra_args"] |= draft
    (answer,) = engine.run(calls.generate_traced, [prompt], doubted)
    assert answer["tokens"] == plain
    kinds = [e["event"] for t in answer["trace"]["tokens"] for e in t["events"]]
    assert kinds.count("masked") == MAX_TOKENS


def test_nothing_is_denoised_right_of_a_stop_token(engine: EngineProcess) -> None:
    """With a stop token in its first place a block needs no second forward."""
    asked = params("threshold+end_of_text", trace=True)
    asked |= {"ignore_eos": False, "stop_token_ids": list(range(EOS)), "max_tokens": 9}
    (answer,) = engine.run(calls.generate_traced, [prompts(5)[0]], asked)
    assert answer["finish_reason"] == "stop"
    assert len(answer["trace"]["tokens"]) == len(answer["tokens"])


def test_logprobs_of_seeded_and_edited_tokens(engine: EngineProcess) -> None:
    asked = params("edit+threshold") | {"logprobs": 0}
    asked["extra_args"] |= {"diffusion_seed_canvas": [MASK, 11, 12, 13]}
    (answer,) = engine.run(engine_calls.generate, [prompts(1)[0]], asked)
    assert len(answer["logprobs"]) == MAX_TOKENS
    for token, position in zip(answer["tokens"], answer["logprobs"], strict=True):
        assert token in position


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"unmask_strategy": "klas"}, "did you mean 'klass'?"),
        ({"unmask_strategy": "klass+factor"}, "names both klass and factor"),
        ({"unmask_strategy": "threshold+threshold"}, "names threshold twice"),
        ({"unmask_strategy": "rcr+factor"}, "goes with static only"),
        ({"unmask_strategy": "edit+end_of_text"}, "names end_of_text and edit"),
        ({"unmask_strategy": ""}, "names ''"),
        ({"unmask_strategy": "sub_blocks", "unmask_sub_block_length": 9}, "1 to 8"),
        ({"unmask_radius": 3}, "only beside local_leap"),
        ({"unmask_doubt": 0.5}, "a diffusion_seed_canvas to doubt"),
        ({"diffusion_seed_canvas": [1, -1]}, "a list of token ids from 0"),
        ({"diffusion_seed_canvas": "abc"}, "a list of token ids"),
        ({"diffusion_seed_canvas": [MASK, MASK]}, "a token other than the mask"),
        ({"diffusion_seed_canvas": [1] * 99}, "at most max_tokens=37 ids"),
        ({"diffusion_pinned": [0]}, "is given alone"),
        (
            {"diffusion_seed_canvas": [1, MASK], "diffusion_pinned": [1]},
            "pins position 1, which is a mask",
        ),
        (
            {"diffusion_seed_canvas": [1], "diffusion_pinned": [1]},
            "positions from 0 to 0",
        ),
        ({"diffusion_max_steps": 3}, "diffusion_max_steps is not supported"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_wrong_input(
    engine: EngineProcess, changes: dict[str, Any], expected: str
) -> None:
    asked = params("threshold") | {"extra_args": changes}
    assert expected in engine.run(calls.refusal, asked)


@pytest.mark.parametrize(
    ("strategy", "others", "expected"),
    [
        ("lookahead", {"logit_bias": {3: 1.0}}, "or no logit_bias"),
        ("lookahead", {"min_tokens": 3}, "or no min_tokens"),
        ("lookahead", {"allowed_token_ids": [1, 2]}, "or no allowed_token_ids"),
        ("threshold", {"n": 2, "unmask_trace": True}, "n=1"),
    ],
)
def test_what_does_not_go_together(
    engine: EngineProcess, strategy: str, others: dict[str, Any], expected: str
) -> None:
    asked = params(strategy)
    for name, value in others.items():
        target = asked["extra_args"] if name.startswith("unmask_") else asked
        target[name] = value
    asked["temperature"] = 1.0
    assert expected in engine.run(calls.refusal, asked)
