# SPDX-License-Identifier: Apache-2.0
"""Structured output and tool calls over HTTP, with OpenAI's client."""

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import requests
from e2e.server import Server
from pydantic import BaseModel

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
RECORDS = [
    record
    for record in map(json.loads, (DEMO / "held_out.jsonl").read_text().splitlines())
    if record["task"] == "json"
][:16]


class Order(BaseModel):
    customer: str
    item: str
    quantity: int


SCHEMA = Order.model_json_schema()
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            # Of a tool that is not strict, vLLM leaves the arguments open.
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"value": {"type": kind}, "unit": {"enum": ["a", "b"]}},
                "required": ["value", "unit"],
            },
        },
    }
    for name, kind in (("count", "integer"), ("label", "string"))
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(
        DEMO / "sdar",
        *("--dtype", "float32", "--max-model-len", "512"),
        *("--max-num-seqs", "16", "--kv-cache-memory-bytes", str(64 << 20)),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        log=tmp_path_factory.mktemp("structured") / "server.log",
    ) as running:
        yield running


def ask(server: Server, prompt: str, **params: Any) -> Any:
    return server.client.chat.completions.create(
        model=server.NAME,
        messages=[{"role": "user", "content": prompt}],
        **{"temperature": 0, "max_tokens": 120, **params},
    )


def text_of(server: Server, prompt: str, stream: bool, **params: Any) -> str:
    answer = ask(server, prompt, stream=stream, **params)
    if not stream:
        return answer.choices[0].message.content
    deltas = [chunk.choices[0].delta for chunk in answer if chunk.choices]
    return "".join(delta.content or "" for delta in deltas)


def response_format(schema: Any) -> dict[str, Any]:
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }


def structured(**constraint: Any) -> dict[str, Any]:
    return {"extra_body": {"structured_outputs": constraint}}


TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "{", "schema": SCHEMA, "end": "."}],
    "triggers": ["{"],
}
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "json_schema": ({"response_format": response_format(SCHEMA)}, SCHEMA),
    "json_object": ({"response_format": {"type": "json_object"}}, {"type": "object"}),
    "json": (structured(json=SCHEMA), SCHEMA),
    "regex": (structured(regex=r"[a-f]{2,5}-\d+\."), r"[a-f]{2,5}-\d+\."),
    "choice": (structured(choice=["left", "right"]), "left|right"),
    "grammar": (structured(grammar='root ::= "<" root ">" | "="'), "<*=>*"),
    "structural_tag": ({"response_format": TAG}, r"(?s).*"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(server: Server, kind: str, stream: bool) -> None:
    params, expected = KINDS[kind]
    text = text_of(server, RECORDS[0]["prompt"], stream, **params)
    if isinstance(expected, str):
        assert re.fullmatch(expected, text), text
    else:
        jsonschema.validate(json.loads(text), expected)


def test_the_clients_own_parser(server: Server) -> None:
    answer = server.client.chat.completions.parse(
        model=server.NAME,
        messages=[{"role": "user", "content": RECORDS[0]["prompt"]}],
        response_format=Order,
        temperature=0,
        max_tokens=120,
    )
    assert isinstance(answer.choices[0].message.parsed, Order)


def test_a_stream_is_the_whole_answer(server: Server) -> None:
    params = {"response_format": response_format(SCHEMA), "seed": 3, "temperature": 1}
    whole = text_of(server, RECORDS[1]["prompt"], False, **params)
    assert text_of(server, RECORDS[1]["prompt"], True, **params) == whole


def test_records_are_no_worse_with_their_schema(server: Server) -> None:
    """The answers' own keys and types, in the order that the model writes them."""

    def schema(answer: str) -> dict[str, Any]:
        kinds = {str: "string", int: "integer", float: "number", bool: "boolean"}
        values = json.loads(answer)
        properties = {key: {"type": kinds[type(v)]} for key, v in values.items()}
        return {
            "type": "object",
            "properties": properties,
            "required": list(values),
            "additionalProperties": False,
        }

    def right(record: dict[str, str], constrained: bool) -> bool:
        params: dict[str, Any] = {}
        if constrained:
            params["response_format"] = response_format(schema(record["answer"]))
        text = text_of(server, record["prompt"], False, **params)
        return json.loads(text) == json.loads(record["answer"])

    with ThreadPoolExecutor(16) as pool:
        free = list(pool.map(lambda record: right(record, False), RECORDS))
        bound = list(pool.map(lambda record: right(record, True), RECORDS))
    assert sum(bound) >= sum(free) >= 14


def test_sixteen_at_once_mixed_with_plain_requests(server: Server) -> None:
    kinds = list(KINDS.values())[:6]
    plain = [text_of(server, r["prompt"], False) for r in RECORDS[:8]]

    def one(index: int) -> str:
        prompt, stream = RECORDS[index // 2]["prompt"], index % 4 < 2
        params = {} if index % 2 else kinds[index // 2 % 6][0]
        return text_of(server, prompt, stream, **params)

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(one, range(16)))
    assert texts[1::2] == plain
    for index, text in enumerate(texts[::2]):
        expected = kinds[index % 6][1]
        if isinstance(expected, str):
            assert re.fullmatch(expected, text), text
        else:
            jsonschema.validate(json.loads(text), expected)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "label"}}], ids=str
)
def test_tool_calls(server: Server, choice: Any, stream: bool) -> None:
    answer = ask(
        server, RECORDS[0]["prompt"], tools=TOOLS, tool_choice=choice, stream=stream
    )
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    if stream:
        deltas = [chunk.choices[0].delta for chunk in answer if chunk.choices]
        calls = [call for delta in deltas for call in delta.tool_calls or ()]
        for call in calls:
            names[call.index] = names.get(call.index, "") + (call.function.name or "")
            more = call.function.arguments or ""
            arguments[call.index] = arguments.get(call.index, "") + more
    else:
        for index, call in enumerate(answer.choices[0].message.tool_calls):
            names[index] = call.function.name
            arguments[index] = call.function.arguments
    assert names
    for index, name in names.items():
        (tool,) = [t["function"] for t in TOOLS if t["function"]["name"] == name]
        jsonschema.validate(json.loads(arguments[index]), tool["parameters"])
        assert choice == "required" or name == "label"


REFUSALS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "regex": (structured(regex="("), ["structured_outputs.regex", "parenthesis"]),
    "keyword": (
        {"response_format": response_format({"type": "array", "uniqueItems": True})},
        ["structured_outputs.json", "uniqueItems"],
    ),
    "budget": (
        {"response_format": response_format(SCHEMA), "max_tokens": 2},
        ["max_tokens=2", "shortest output", "at least"],
    ),
    "own key": (
        {"extra_body": {"vllm_xargs": {"unmask grammar": "{}"}}},
        ["unmask grammar", "no known option"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_400(server: Server, case: str) -> None:
    params, says = REFUSALS[case]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, "a", **params)
    for part in says:
        assert part in caught.value.message
    assert text_of(server, RECORDS[0]["prompt"], False)


def test_a_hostile_grammar_stalls_nobody(server: Server) -> None:
    """It compiles until it is killed; plain and structured requests go on."""
    # Each definition holds the one before it twice.
    half = [{"$ref": f"#/$defs/a{i}"} for i in range(25)]
    doubling: dict[str, Any] = {
        f"a{i + 1}": {
            "type": "object",
            "properties": {"l": ref, "r": ref},
            "required": ["l", "r"],
        }
        for i, ref in enumerate(half)
    }
    hostile = {"$defs": {"a0": {"type": "null"}, **doubling}, "$ref": "#/$defs/a25"}
    refused: list[str] = []
    gone = threading.Event()

    def attack() -> None:
        try:
            ask(server, "a", response_format=response_format(hostile), timeout=120)
        except openai.BadRequestError as error:
            refused.append(error.message)
        gone.set()

    attacker = threading.Thread(target=attack)
    attacker.start()
    latencies = []
    while not gone.is_set() and len(latencies) < 200:
        started = time.monotonic()
        text_of(server, RECORDS[0]["prompt"], False)
        structured_text = text_of(server, "a", False, **structured(regex="[ab]{3}"))
        assert re.fullmatch("[ab]{3}", structured_text)
        latencies.append(time.monotonic() - started)
    attacker.join()
    assert len(latencies) >= 3
    # A stalled step would last as long as the compilation, ten seconds.
    assert max(latencies) < 5
    assert refused and "takes more than 10.0 seconds to compile" in refused[0]


def test_metrics(server: Server) -> None:
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    for name in (
        "grammar_tokens_remasked_total",
        "grammar_guard_closures_total",
        "grammar_step_microseconds_bucket",
        "grammar_compile_seconds_bucket",
    ):
        assert f"vllm:unmask_{name}" in text
    (count,) = re.findall(r"unmask_grammar_step_microseconds_count (\S+)", text)
    assert float(count) > 0
