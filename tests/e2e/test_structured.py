# SPDX-License-Identifier: Apache-2.0
"""Structured output through the real engine."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import structured_calls as calls
from engine_process import EngineProcess

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "count": {"type": "integer"},
        "tags": {
            "type": "array",
            "items": {"enum": ["red", "green", "light blue"]},
            "minItems": 2,
            "maxItems": 4,
        },
        "nested": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "count", "tags", "nested"],
    "additionalProperties": False,
}
PROMPTS = [
    json.loads(line)["prompt"]
    for line in (DEMO / "held_out.jsonl").read_text().splitlines()[:6]
]
PLAIN: dict[str, Any] = {}
JSON = {"structured_outputs": {"json": SCHEMA}}
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<n>", "schema": {"type": "integer"}, "end": "</n>"}],
    "triggers": ["<n>"],
}
# Kind -> the constraint, and what its outputs must match.
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "json": ({"json": SCHEMA}, lambda text: valid(text, SCHEMA)),
    "json text": ({"json": json.dumps(SCHEMA)}, lambda text: valid(text, SCHEMA)),
    "json_object": (
        {"json_object": True},
        lambda text: valid(text, {"type": "object"}),
    ),
    "regex": ({"regex": r"\d{4}-\d\d(a|bc){1,9}"}, r"\d{4}-\d\d(a|bc){1,9}"),
    "choice": ({"choice": ["yes", "no", "yes or no"]}, "yes|no|yes or no"),
    "ebnf": ({"grammar": 'root ::= "[" root "]" | "x"'}, r"\[*x\]*"),
    "lark": ({"grammar": 'start: "a" start | "b"\n'}, "a*b"),
    "structural_tag": ({"structural_tag": json.dumps(TAG)}, r"(?s).*"),
}


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(request: pytest.FixtureRequest) -> Iterator[EngineProcess]:
    with EngineProcess(
        model=str(DEMO / "sdar"),
        skip_tokenizer_init=False,
        max_model_len=512,
        disable_log_stats=False,
        async_scheduling=request.param,
    ) as engine:
        yield engine


def valid(text: str, schema: Any) -> bool:
    jsonschema.validate(json.loads(text), schema)
    return True


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(engine: EngineProcess, kind: str, temperature: float) -> None:
    grammar, expected = KINDS[kind]
    params = {"temperature": temperature, "seed": 1, "structured_outputs": grammar}
    answers = engine.run(calls.chat, PROMPTS, params)
    for answer in answers:
        text = answer["text"]
        assert answer["finish_reason"] in ("stop", "length")
        if callable(expected):
            assert expected(text)
        else:
            assert re.fullmatch(expected, text), text
    # Without the grammar these prompts are answered otherwise.
    if kind not in ("json_object", "structural_tag"):
        plain = engine.run(calls.chat, PROMPTS, {"temperature": temperature})
        assert any(a["text"] != p["text"] for a, p in zip(answers, plain, strict=True))


@pytest.mark.parametrize("temperature", [0, 1])
def test_any_budget_that_holds_the_shortest_output(
    engine: EngineProcess, temperature: float
) -> None:
    message = engine.run(calls.refusal, JSON | {"max_tokens": 3})
    match = re.search(r"shortest output .* has (\d+)", message)
    assert match and "max_tokens=3" in message
    shortest = int(match[1])
    for max_tokens in (shortest, shortest + 1, shortest + 5, 2 * shortest):
        params = JSON | {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": max_tokens,
        }
        for answer in engine.run(calls.chat, PROMPTS, params):
            assert valid(answer["text"], SCHEMA)
            assert len(answer["tokens"]) <= max_tokens
    too_small = engine.run(calls.refusal, JSON | {"max_tokens": shortest - 1})
    assert f"at least {shortest}" in too_small


def test_guard_closures_are_counted(engine: EngineProcess) -> None:
    before = engine.run(calls.metrics)
    answers = engine.run(calls.chat, PROMPTS, JSON | {"max_tokens": 50})
    after = engine.run(calls.metrics)
    closed = sum(answer["finish_reason"] == "length" for answer in answers)
    assert closed > 0
    grown = {name: after[name] - before[name] for name in after}
    # One that the model ends with its last token is cut off by nobody.
    assert 0 < grown["grammar_guard_closures"] <= closed
    assert grown["grammar_tokens_forced"] > 0
    assert grown["grammar_step_microseconds"] > len(PROMPTS)
    assert grown["grammar_failures"] == 0


def test_plain_requests_do_not_notice(engine: EngineProcess) -> None:
    """Same tokens with constrained neighbours, greedy and sampled."""
    each = [{"temperature": i % 2, "seed": i, "logprobs": 1} for i in range(6)]
    alone = engine.run(calls.chat, PROMPTS, each)
    mixed = engine.run(
        calls.chat,
        [p for prompt in PROMPTS for p in (prompt, prompt)],
        [p for own in each for p in (own, JSON)],
    )
    for one, other in zip(alone, mixed[::2], strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["finish_reason"] == other["finish_reason"]
    for answer in mixed[1::2]:
        assert valid(answer["text"], SCHEMA)


def test_a_request_gets_what_it_gets_alone(engine: EngineProcess) -> None:
    params = JSON | {"temperature": 1, "seed": 5}
    together = engine.run(calls.chat, PROMPTS, params)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        (alone,) = engine.run(calls.chat, [prompt], params)
        assert alone["tokens"] == answer["tokens"]
    # And again, from the prefix cache.
    again = engine.run(calls.chat, PROMPTS, params)
    assert [a["tokens"] for a in again] == [a["tokens"] for a in together]


def test_logits_of_known_positions_are_left_out(engine: EngineProcess) -> None:
    """Nothing but their number changes; who wants them, gets them."""
    sampled = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    entropy = {"extra_args": {"unmask_strategy": "static", "unmask_order": "entropy"}}
    params = [PLAIN, JSON, JSON | sampled, sampled, entropy, entropy | JSON]
    some, few, _ = engine.run(calls.chat_counting_logits, PROMPTS, params, False)
    every, many, _ = engine.run(calls.chat_counting_logits, PROMPTS, params, True)
    assert some == every
    assert few < 0.8 * many
    for one in ({"logprobs": 1}, {"bad_words": ["x"]}, {"logit_bias": {9: -1.0}}):
        some, _, asked = engine.run(
            calls.chat_counting_logits, PROMPTS, [one] * 6, False
        )
        # Rows are no measure here: with a step in flight the clock has a say in how
        # many steps there are.
        assert asked == 0
        every, *_ = engine.run(calls.chat_counting_logits, PROMPTS, [one] * 6, True)
        assert some == every


def test_preemption_in_the_middle_of_a_block(engine: EngineProcess) -> None:
    # Greedy: a block that is opened again is a block from its first step on.
    calm = engine.run(calls.chat, PROMPTS, JSON | {"max_tokens": 55})
    answers, preempted = engine.run(
        calls.chat_preempted, PROMPTS, JSON | {"max_tokens": 55}, 3
    )
    assert preempted >= 5
    assert [a["tokens"] for a in answers] == [a["tokens"] for a in calm]


@pytest.mark.parametrize(
    "params",
    [
        {"n": 3, "temperature": 0.8},
        {"top_p": 0.5, "temperature": 1},
        {"top_k": 3, "temperature": 1},
        {"min_p": 0.2, "temperature": 1},
        {"min_tokens": 60},
        {"ignore_eos": True},
        {"logit_bias": {100: 5.0, 30: -5.0}},
        {"bad_words": ["red"]},
        {"extra_args": {"unmask_strategy": "static"}},
        {"extra_args": {"unmask_strategy": "static", "unmask_steps": 2}},
        {"extra_args": {"unmask_order": "random"}, "seed": 3},
        {"extra_args": {"unmask_threshold": 0.3}},
    ],
    ids=lambda params: next(iter(params.get("extra_args", params))),
)
def test_with_other_parameters(engine: EngineProcess, params: dict[str, Any]) -> None:
    for answer in engine.run(calls.chat, PROMPTS, JSON | params):
        for text in answer["texts"]:
            assert valid(text, SCHEMA)


def test_logprobs_are_of_the_tokens(engine: EngineProcess) -> None:
    params = JSON | {"logprobs": 2, "max_tokens": 50}
    for answer in engine.run(calls.chat, PROMPTS, params):
        assert len(answer["logprobs"]) == len(answer["tokens"])
        for token, entry in zip(answer["tokens"], answer["logprobs"], strict=True):
            assert entry[token].logprob <= 0


def test_stop_string_ends_the_output(engine: EngineProcess) -> None:
    whole = engine.run(calls.chat, PROMPTS, JSON)
    cut = engine.run(calls.chat, PROMPTS, JSON | {"stop": ["count"]})
    for one, other in zip(whole, cut, strict=True):
        assert other["text"] == one["text"][: one["text"].index("count")]
        assert other["finish_reason"] == "stop"


def test_a_fault_ends_its_request_alone(engine: EngineProcess) -> None:
    params = [JSON | {"max_tokens": 100 + i} for i in range(4)]
    good = engine.run(calls.chat, PROMPTS[:4], params)
    answers = engine.run(calls.chat_with_fault, PROMPTS[:4], params, 2)
    assert answers[2]["finish_reason"] == "error"
    assert answers[2]["text"] == good[2]["text"][: len(answers[2]["text"])]
    for i in (0, 1, 3):
        assert answers[i]["tokens"] == good[i]["tokens"]


def test_nobody_waits_for_a_slow_compilation(engine: EngineProcess) -> None:
    unseen = {"json": {"type": "object", "properties": {"slow": {"type": "null"}}}}
    params = [{"structured_outputs": unseen}, PLAIN, JSON]
    answers, ends = engine.run(calls.chat_with_slow_compiler, PROMPTS[:3], params, 3.0)
    assert valid(answers[0]["text"], unseen["json"])
    assert ends[0] > 3
    # Neither a plain request nor one with another grammar.
    assert max(ends[1:]) < 2.5


def test_nothing_is_left_of_a_request(engine: EngineProcess) -> None:
    engine.run(calls.chat, PROMPTS, JSON)
    # Whatever has ended is removed at the beginning of the next step.
    engine.run(calls.chat, PROMPTS[:1], PLAIN)
    assert engine.run(calls.num_grammars) == 0


@pytest.mark.parametrize(
    ("grammar", "says"),
    {
        "bad regex": ({"regex": "("}, ["structured_outputs.regex", "parenthesis"]),
        "bad json": ({"json": "{"}, ["structured_outputs.json", "is no JSON"]),
        "keyword": (
            {"json": {"type": "array", "uniqueItems": True}},
            ["structured_outputs.json", "uniqueItems"],
        ),
        "unsatisfiable": (
            {"grammar": "root ::= root"},
            ["structured_outputs.grammar", "cannot be closed"],
        ),
        "empty choice": ({"choice": []}, ["structured_outputs.choice"]),
        "deep": (
            {"json": json.loads('{"items":' * 70 + "{}" + "}" * 70)},
            ["structured_outputs.json", "levels", "at most 64"],
        ),
        "whitespace_pattern": (
            {"json": SCHEMA, "whitespace_pattern": " "},
            ["structured_outputs.whitespace_pattern", "not supported"],
        ),
    }.values(),
)
def test_refusals(
    engine: EngineProcess, grammar: dict[str, Any], says: list[str]
) -> None:
    message = engine.run(calls.refusal, {"structured_outputs": grammar})
    for part in says:
        assert part in message


def test_block_length_one_is_left_to_right_decoding() -> None:
    """Against plain one-token requests that allow what a fresh matcher does."""
    with EngineProcess(
        model=str(DEMO / "sdar"),
        skip_tokenizer_init=False,
        max_model_len=512,
        additional_config={"unmask": {"block_length": 1}},
    ) as engine:
        for prompt in PROMPTS[:3]:
            ours, reference = engine.run(
                calls.left_to_right, prompt, json.dumps(SCHEMA), 200
            )
            assert ours == reference


def test_the_kernels_of_a_gpu_decode_the_same() -> None:
    """Greedy, sampled, biased, ordered and constrained requests in one batch."""
    regex = {"structured_outputs": {"regex": "[a-z ]{8,}x"}}
    params = [
        regex,
        regex | {"temperature": 0.8, "seed": 3},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 4},
        {"extra_args": {"unmask_strategy": "static", "unmask_order": "entropy"}},
        {"logit_bias": {7: 2.0}},
    ]
    params = [one | {"max_tokens": 12} for one in params]
    with EngineProcess(
        env={"TRITON_INTERPRET": "1"},
        model=str(DEMO / "sdar"),
        skip_tokenizer_init=False,
        max_model_len=512,
    ) as engine:
        expected = engine.run(calls.chat, PROMPTS[:5], params)
        found, num_calls = engine.run(calls.chat_with_triton, PROMPTS[:5], params)
    assert num_calls > 5
    assert [one["tokens"] for one in found] == [one["tokens"] for one in expected]
