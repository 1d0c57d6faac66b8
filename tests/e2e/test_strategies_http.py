# SPDX-License-Identifier: Apache-2.0
"""Strategies and their traces over HTTP: OpenAI's client, the CLI, the example."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from e2e.server import Server
from e2e.test_http import DEMO, MASK, MODEL, held_out

from vllm_unmask.trace import Trace, trace_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(
        MODEL,
        *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"),
        *("--kv-cache-memory-bytes", str(64 << 20)),
        # Adaptive, a slow machine may find that no candidate pays, and draft nothing.
        *(
            "--additional-config",
            '{"unmask": {"strategy": "sdar", "adaptive_candidates": false}}',
        ),
        log=tmp_path_factory.mktemp("strategies") / "server.log",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def record() -> dict[str, str]:
    (row,) = held_out("json", 1)
    return row


def chat(server: Server, prompt: str, xargs: dict[str, Any], **params: Any) -> Any:
    return server.client.chat.completions.create(
        model=server.NAME,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=100,
        extra_body={"vllm_xargs": xargs, "return_token_ids": True},
        **params,
    )


def traced(answer: Any) -> Trace:
    trace = trace_of(answer)
    assert trace is not None
    assert [token.token_id for token in trace.tokens] == answer.choices[0].token_ids
    return trace


def test_strategies_of_one_server(server: Server, record: dict[str, str]) -> None:
    names = ["static", "sdar", "credit+local_leap+prophet", "eb_sampler+lookahead"]

    def ask(name: str) -> Any:
        xargs = {"unmask_strategy": name, "unmask_trace": True}
        return chat(server, record["prompt"], xargs)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, names))
    forwards = {}
    for name, answer in zip(names, answers, strict=True):
        assert answer.choices[0].message.content == record["answer"], name
        trace = traced(answer)
        assert trace.strategy == name
        forwards[name] = trace.num_steps
    assert forwards["static"] > 3 * forwards["sdar"]
    # The server's own default, by name and without one.
    default = traced(chat(server, record["prompt"], {"unmask_trace": True}))
    assert (default.strategy, default.num_steps) == ("sdar", forwards["sdar"])
    assert trace_of(chat(server, record["prompt"], {})) is None


def test_trace_ends_with_the_answer(server: Server, record: dict[str, str]) -> None:
    """Also where a stop string ends it, inside a block."""
    whole = traced(chat(server, record["prompt"], {"unmask_trace": True}))
    cut = chat(server, record["prompt"], {"unmask_trace": True}, stop=[":"])
    assert cut.choices[0].finish_reason == "stop"
    trace = trace_of(cut)
    assert trace is not None
    ids = cut.choices[0].token_ids
    assert [token.token_id for token in trace.tokens][: len(ids)] == ids
    assert len(trace.tokens) < len(whole.tokens)


def test_structured_output_is_traced(server: Server, record: dict[str, str]) -> None:
    answer = chat(
        server,
        record["prompt"],
        {"unmask_trace": True, "unmask_strategy": "factor"},
        response_format={"type": "json_object"},
    )
    kinds = {e.kind for token in traced(answer).tokens for e in token.events}
    assert "verified" in kinds


def test_seeds_and_pins(server: Server, record: dict[str, str]) -> None:
    plain = chat(server, record["prompt"], {})
    ids = plain.choices[0].token_ids
    seeds = [MASK] * 8 + ids[8:]
    xargs = {"diffusion_seed_canvas": seeds, "diffusion_pinned": [9], "unmask_doubt": 0}
    answer = chat(server, record["prompt"], xargs | {"unmask_trace": True})
    assert answer.choices[0].message.content == record["answer"]
    trace = traced(answer)
    assert trace.count("seeded") == len(ids) - 8
    # The text is known: a forward a block.
    assert (
        trace.num_steps
        < traced(chat(server, record["prompt"], {"unmask_trace": True})).num_steps + 8
    )


@pytest.mark.parametrize("strategy", ["freedave", "s2d2"])
def test_speculation_streamed_sixteen_at_once(server: Server, strategy: str) -> None:
    """Twice as many as the server runs at a time, with and without a schema."""
    rows = held_out("json", 16)
    schema = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
    structured = {
        "type": "json_schema",
        "json_schema": {"name": "any", "schema": schema},
    }

    def ask(index: int, name: str) -> str:
        chunks = chat(
            server,
            rows[index]["prompt"],
            {"unmask_strategy": name},
            stream=True,
            **({"response_format": structured} if index % 2 else {}),
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda index: ask(index, strategy), range(16)))
    if strategy == "freedave":
        assert texts == [ask(index, "static") for index in range(16)]
    for index, text in enumerate(texts):
        if index % 2:
            jsonschema.validate(json.loads(text), schema)
    right = [text == row["answer"] for text, row in zip(texts, rows, strict=True)]
    assert sum(right[::2]) >= 7
    counted = {"freedave": "drafted", "s2d2": "tokens_verified"}[strategy]
    assert server.metric(f"vllm:unmask_speculation_{counted}_total") > 0
    if strategy == "s2d2":
        drafted, accepted = (
            server.metric(f"vllm:spec_decode_num_{name}_tokens_total")
            for name in ("draft", "accepted")
        )
        assert drafted > accepted > 0


WRONG = {
    "unknown": ({"unmask_strategy": "tresh"}, "did you mean 'threshold'?"),
    "excluded": ({"unmask_strategy": "klass+bacd"}, "names both klass and bacd"),
    "no effect": ({"unmask_radius": 2}, "has no effect with strategy=sdar"),
    "out of range": (
        {"unmask_strategy": "local_leap", "unmask_radius": -1},
        "an integer, at least 0",
    ),
    "number as text": (
        {"unmask_strategy": "factor", "unmask_factor": "1"},
        "got str",
    ),
    "seed not in the vocabulary": ({"diffusion_seed_canvas": [10**6]}, "0 to 511"),
    "seed of text": ({"diffusion_seed_canvas": ["a"]}, "a list of token ids"),
    "pins alone": ({"diffusion_pinned": [1]}, "is given alone"),
    "candidates of nothing": ({"unmask_candidates": 2}, "beside freedave"),
    "too many candidates": (
        {"unmask_strategy": "freedave", "unmask_candidates": 99},
        "the server's max_candidates",
    ),
    "speculation twice": (
        {"unmask_strategy": "freedave+s2d2"},
        "names both freedave and s2d2",
    ),
    "route": (
        {"unmask_strategy": "s2d2", "unmask_route": "sometimes"},
        "score_threshold",
    ),
    "doubt alone": ({"unmask_doubt": 0.5}, "a diffusion_seed_canvas to doubt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(server: Server, record: dict[str, str], case: str) -> None:
    xargs, expected = WRONG[case]
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, record["prompt"], xargs)
    assert expected in str(caught.value)
    assert next(iter(xargs)).split("_")[0] in str(caught.value)
    assert chat(server, record["prompt"], {}).choices[0].message.content


def test_trace_is_not_streamed(server: Server, record: dict[str, str]) -> None:
    with pytest.raises(openai.APIError, match="stream=false"):
        list(chat(server, record["prompt"], {"unmask_trace": True}, stream=True))


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_command_line(server: Server, record: dict[str, str], tmp_path: Path) -> None:
    page = tmp_path / "trace.html"
    asked = ["--url", server.url, "--prompt", record["prompt"], "--chat"]
    text = run("-m", "vllm_unmask", "trace", *asked, "--html", str(page))
    assert "tokens per forward" in text
    assert record["answer"].split(":")[0] in text
    assert "<html" in page.read_text().lower()


def test_example(server: Server, record: dict[str, str], tmp_path: Path) -> None:
    text = run(
        "examples/strategies.py",
        *("--url", server.url, "--prompt", record["prompt"], "--html", str(tmp_path)),
    )
    for name in ("static", "threshold", "factor", "credit+local_leap+prophet"):
        assert name in text
        assert (tmp_path / f"{name}.html").exists()
    assert DEMO.exists()
