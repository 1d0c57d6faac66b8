# SPDX-License-Identifier: Apache-2.0
"""Families without blocks of their own behind `vllm serve`: Dream and WeDLM.

Full attention with shifted logits, and a streaming window. The answers are held to the
family's reference in plain torch.
"""

import json
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jsonschema
import openai
import pytest
from checkpoints import Weights, write_checkpoint
from dense_reference import choose_static
from e2e.server import Server
from e2e.test_http import (
    MODEL,
    STATIC,
    STEPS,
    complete,
    create_chat,
    create_completion,
    eventually,
    streamed,
    together,
)
from family_references import REFERENCES

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BLOCK = 4
MAX_TOKENS = 18
PROMPT = list(range(100, 111))
# Those of the demo model's tokenizer, behind which the random weights stand.
IDS = {"vocab_size": 512, "mask_token_id": 4, "eos_token_id": 1, "bos_token_id": None}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "colour": {"enum": ["red", "blue"]},
    },
    "required": ["name", "colour"],
    "additionalProperties": False,
}
STRATEGIES = {"DreamModel": "fast_dllm", "WeDLMForCausalLM": "wedlm"}
ACCEPTED = "vllm:unmask_speculation_accepted_total"
# Option -> value, and what the refusal says besides the option's name.
WRONG: dict[str, dict[str, tuple[Any, str]]] = {
    "DreamModel": {
        "unmask_strategy": ("threshold+s2d2", "a strategy without s2d2"),
        "unmask_cache": ("all", "one of none, prefix, dual"),
        "unmask_window": (-1, "an integer, at least 0"),
        "unmask_refresh": (2, "only beside a model with full attention"),
        "unmask_answer_block_length": (1, "every position sees every other one"),
        "unmask_windows": (8, "unmask_window (nearest match)"),
    },
    "WeDLMForCausalLM": {
        "unmask_strategy": ("klass", "a strategy without klass"),
        "unmask_cache": ("dual", "this model's attention is causal"),
        "unmask_distance_penalty": (-0.1, "a number, at least 0.0"),
        "unmask_answer_block_length": (1, "a window that moves on"),
        "diffusion_seed_canvas": ([5, 6], "no seeds"),
    },
}


class Served(NamedTuple):
    architecture: str
    server: Server
    config: dict[str, Any]
    weights: Weights


@pytest.fixture(scope="module", params=STRATEGIES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    path = tmp_path_factory.mktemp(request.param)
    config = REFERENCES[request.param].config(BLOCK, **IDS)
    weights = write_checkpoint(path, config)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MODEL / file, path)
    options: dict[str, Any] = {"strategy": STRATEGIES[request.param]}
    options["adaptive_candidates"] = False
    with Server(
        path,
        *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8"),
        *("--kv-cache-memory-bytes", str(64 << 20)),
        *("--additional-config", json.dumps({"unmask": options})),
        log=path / "server.log",
    ) as server:
        yield Served(request.param, server, config, weights)


def test_completion_and_steps_are_those_of_the_reference(served: Served) -> None:
    reference = REFERENCES[served.architecture]
    expected, forwards = reference.decode(
        served.config,
        served.weights,
        PROMPT,
        MAX_TOKENS,
        block=BLOCK,
        choose=choose_static,
        logits_of=reference.logits,
    )
    server = served.server
    before = server.metric(STEPS)
    choice = complete(server, PROMPT, max_tokens=MAX_TOKENS, vllm_xargs=STATIC)
    assert choice.token_ids == expected
    assert choice.finish_reason == "length"
    eventually(lambda: server.metric(STEPS) - before, forwards)


def test_speculation_takes_fewer_forwards(served: Served) -> None:
    if served.architecture == "WeDLMForCausalLM":
        pytest.skip("refused")
    server = served.server
    accepted = server.metric(ACCEPTED)
    answers = []
    for strategy in ("static", "static+freedave"):
        before = server.metric(STEPS) + server.metric(ACCEPTED)
        asked = {"unmask_strategy": strategy, "unmask_cache": "dual"}
        choice = complete(server, PROMPT, max_tokens=MAX_TOKENS, vllm_xargs=asked)
        answers.append(choice.token_ids)
        # Every step has its forward, or was carried out beside another one.
        eventually(
            lambda before=before: (
                server.metric(STEPS) + server.metric(ACCEPTED) - before
            ),
            -(-MAX_TOKENS // BLOCK) * BLOCK,
        )
    assert answers[0] == answers[1]
    assert server.metric(ACCEPTED) > accepted


def test_default_strategy_takes_fewer_steps(served: Served) -> None:
    before = served.server.metric(STEPS)
    loose = {
        "DreamModel": {"unmask_threshold": 0.2},
        "WeDLMForCausalLM": {"unmask_entropy_bound": 3.0},
    }[served.architecture]
    answer = create_completion(served.server, PROMPT, max_tokens=24, vllm_xargs=loose)
    assert answer.usage.completion_tokens == 24
    eventually(lambda: 0 < served.server.metric(STEPS) - before < 24, True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_is_the_whole_answer(served: Served, temperature: float) -> None:
    server = served.server
    params = {"max_tokens": 30, "temperature": temperature, "seed": 7}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    whole = create_chat(server, "one two three", **params, ignore_eos=True)
    chunks = create_chat(server, "one two three", **params, ignore_eos=True, **stream)
    texts, ids, reason, usage = streamed(chunks)
    (choice,) = whole.choices
    assert "".join(texts) == choice.message.content
    assert sum(ids, []) == choice.token_ids
    assert len(choice.token_ids) == 30
    assert sum(map(bool, ids)) > 1
    assert (reason, usage) == (choice.finish_reason, whole.usage)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answer_fits_its_schema(served: Served, temperature: float) -> None:
    """Random weights know no JSON: valid by the grammar alone."""
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "thing", "schema": SCHEMA},
    }

    def ask(content: str) -> Any:
        return create_chat(
            served.server,
            content,
            response_format=wanted,
            max_tokens=80,
            temperature=temperature,
        )

    for answer in together([lambda c=c: ask(c) for c in ("a", "b", "c")]):
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


def test_wrong_options_are_named(served: Served) -> None:
    for option, (value, said) in WRONG[served.architecture].items():
        with pytest.raises(openai.BadRequestError) as caught:
            complete(served.server, PROMPT, vllm_xargs={option: value})
        assert option in str(caught.value) and said in str(caught.value)
        assert caught.value.status_code == 400
    # Each one is refused, and the server serves on.
    assert len(complete(served.server, PROMPT, max_tokens=5).token_ids) == 5
