# SPDX-License-Identifier: Apache-2.0
"""Every strategy under a grammar: always valid, whatever decides the unmasking."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import structured_calls as calls
import torch
from e2e.test_strategies import STRATEGIES, extra
from e2e.test_structured import DEMO, PROMPTS, SCHEMA
from engine_process import EngineProcess

from vllm_unmask.decoding.learned import Filter, save_filter

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# The shortest output of the schema needs more than half of it.
TIGHT = 80


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    path: Path = tmp_path_factory.mktemp("filter") / "random.safetensors"
    torch.manual_seed(0)
    save_filter(path, Filter(*map(torch.randn, ((12, 8), (12,), (8, 12), (8,)))))
    with EngineProcess(
        model=str(DEMO / "sdar"),
        skip_tokenizer_init=False,
        max_model_len=512,
        async_scheduling=request.param,
        additional_config={"unmask": {"filter": str(path)}},
    ) as engine:
        yield engine


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_tokens", [TIGHT, 200])
def test_every_output_is_valid(
    engine: EngineProcess, temperature: float, max_tokens: int
) -> None:
    asked = [
        {
            "structured_outputs": {"json": SCHEMA},
            "temperature": temperature,
            "seed": index,
            "max_tokens": max_tokens,
            "extra_args": extra(strategy),
        }
        for index, strategy in enumerate(STRATEGIES)
    ]
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(asked))]
    for strategy, answer in zip(
        STRATEGIES, engine.run(calls.chat, prompts, asked), strict=True
    ):
        assert answer["finish_reason"] in ("stop", "length"), strategy
        jsonschema.validate(json.loads(answer["text"]), SCHEMA)


def test_sub_blocks_that_are_forwarded_alone(engine: EngineProcess) -> None:
    """No less valid, in the budgets in which the guard has to close as well."""
    asked = [
        {
            "structured_outputs": {"json": SCHEMA},
            "temperature": temperature,
            "seed": 3,
            "max_tokens": max_tokens,
            "extra_args": {
                "unmask_strategy": "fast_dllm_v2",
                "unmask_sub_block_length": length,
                "unmask_cache": cache,
            },
        }
        for temperature in (0.0, 1.0)
        for max_tokens in (TIGHT, 200)
        for length in (2, 4)
        for cache in ("sub_block", "none")
    ]
    answers = engine.run(calls.chat, PROMPTS[:1] * len(asked), asked)
    for answer in answers:
        assert answer["finish_reason"] in ("stop", "length")
        jsonschema.validate(json.loads(answer["text"]), SCHEMA)
    alone = [engine.run(calls.chat, PROMPTS[:1], one)[0]["text"] for one in asked[:4]]
    assert alone == [answer["text"] for answer in answers[:4]]
    message = engine.run(calls.refusal, asked[0] | {"logprobs": 1})
    assert "logprobs=1 is not possible with a structured output" in message


def test_a_draft_that_is_right_is_kept(engine: EngineProcess) -> None:
    """Seeds are tentative: what the grammar allows of them stays."""
    asked: dict[str, Any] = {
        "structured_outputs": {"json": SCHEMA},
        "max_tokens": 200,
    }
    (first,) = engine.run(calls.chat, PROMPTS[:1], asked)
    wrong = [
        token + 7 if i % 5 == 3 else token for i, token in enumerate(first["tokens"])
    ]
    for draft in (first["tokens"], wrong):
        seeded = asked | {"extra_args": {"diffusion_seed_canvas": draft}}
        (answer,) = engine.run(calls.chat, PROMPTS[:1], seeded)
        jsonschema.validate(json.loads(answer["text"]), SCHEMA)
        if draft is not wrong:
            assert answer["text"] == first["text"]


def test_pinned_tokens_are_refused(engine: EngineProcess) -> None:
    message = engine.run(
        calls.refusal,
        {
            "structured_outputs": {"json": SCHEMA},
            "extra_args": {"diffusion_seed_canvas": [5], "diffusion_pinned": [0]},
        },
    )
    assert "seeds that are not pinned" in message
