# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM v2 against its published loop, and S2D2 against the causal model.

Too long for every run; ``make conformance`` runs it.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import e2e.test_verification as verification
import engine_calls
import pytest
import torch
from checkpoints import MASK, VOCAB, Weights, fast_dllm_v2_config, write_checkpoint
from dense_reference import block_causal_mask, dense_logits
from e2e.test_verification import ROUTES, params
from engine_process import EngineProcess

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BLOCK = 8
MAX_TOKENS = 37
# Prompts of whole blocks, of less than one, and some in between.
LENGTHS = (1, 7, 8, 9, 16, 24, 27, 31, 32, 33, 40, 5)


def prompts() -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(VOCAB - 2) for _ in range(n)] for n in LENGTHS]


def published(
    config: dict[str, Any],
    weights: Weights,
    prompt: list[int],
    small_block: int,
    threshold: float,
) -> list[int]:
    """The release's ``generate``, without caches and sampling.

    The first token of a block is the next one of the whole blocks before it. Sub-blocks
    are filled from left to right: all tokens above the threshold, at least the surest.
    The mask is no token here.
    """

    def rows(ids: list[int]) -> torch.Tensor:
        logits = dense_logits(config, weights, ids, block_causal_mask(len(ids), BLOCK))
        logits[:, MASK] = -torch.inf
        return logits

    ids = list(prompt)
    while len(ids) < len(prompt) + MAX_TOKENS:
        if len(ids) % BLOCK == 0:
            ids.append(int(rows(ids)[-1].argmax()))
        start = (len(ids) - 1) // BLOCK * BLOCK
        ids += [MASK] * (start + BLOCK - len(ids))
        for left in range(start, start + BLOCK, small_block):
            right = min(left + small_block, start + BLOCK)
            while masked := [i for i in range(left, right) if ids[i] == MASK]:
                law = rows(ids).softmax(-1)
                sure, token = (x.tolist() for x in law.max(-1))
                best = max(masked, key=lambda i: sure[i - 1])
                for i in masked:
                    if i == best or sure[i - 1] > threshold:
                        ids[i] = token[i - 1]
    return ids[len(prompt) :][:MAX_TOKENS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Weights]:
    path = tmp_path_factory.mktemp("fast_dllm_v2")
    config = fast_dllm_v2_config(BLOCK)
    return path, config, write_checkpoint(path, config)


SETTINGS = {
    "exact": {"async_scheduling": False, "additional_config": {"layout": "exact"}},
    "uniform": {"async_scheduling": False, "additional_config": {"layout": "uniform"}},
    "async": {"async_scheduling": True, "additional_config": {}},
    "turns": {"async_scheduling": True, "additional_config": {"layout": "exact"}},
}


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=list(SETTINGS))
def engine(request: pytest.FixtureRequest, checkpoint: Any) -> Iterator[EngineProcess]:
    settings = request.param
    with EngineProcess(
        model=str(checkpoint[0]),
        max_model_len=96,
        block_size=32,
        max_num_seqs=12,
        # Chunks of prompts, and less memory than twelve requests need.
        max_num_batched_tokens=128,
        num_gpu_blocks_override=12,
        async_scheduling=settings["async_scheduling"],
        additional_config={
            "unmask": {"causal_kv": False} | settings["additional_config"]
        },
    ) as engine:
        yield engine


@pytest.mark.parametrize("threshold", [0.3, 0.8])
@pytest.mark.parametrize("small_block", [2, 3, BLOCK])
def test_the_published_loop(
    engine: EngineProcess, checkpoint: Any, small_block: int, threshold: float
) -> None:
    _, config, weights = checkpoint
    options = {"threshold": threshold, "sub_block_length": small_block}
    asked = params("fast_dllm_v2", **options)
    answers, counts = engine.run(engine_calls.generate_counting, prompts(), asked)
    assert counts["preemptions"] > 0
    for prompt, answer in zip(prompts(), answers, strict=True):
        expected = published(config, weights, prompt, small_block, threshold)
        assert answer["tokens"] == expected, len(prompt)
    if small_block == BLOCK:
        plain = params("threshold", threshold=threshold)
        again = engine.run(engine_calls.generate, prompts(), plain)
        # How much of a prompt was still in the cache is the only other thing.
        assert [a["tokens"] for a in again] == [a["tokens"] for a in answers]


@pytest.fixture(scope="module")
def greedy(checkpoint: Any) -> list[list[int]]:
    """Token by token, by the causal mask."""
    _, config, weights = checkpoint
    answers = []
    for prompt in prompts():
        ids = list(prompt)
        for _ in range(MAX_TOKENS):
            mask = block_causal_mask(len(ids), 1)
            logits = dense_logits(config, weights, ids, mask)[-1]
            logits[MASK] = -torch.inf
            ids.append(int(logits.argmax()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def causal(request: pytest.FixtureRequest, checkpoint: Any) -> Iterator[EngineProcess]:
    with EngineProcess(
        model=str(checkpoint[0]),
        max_model_len=96,
        block_size=32,
        max_num_seqs=12,
        num_gpu_blocks_override=16,
        async_scheduling=request.param,
        additional_config={"unmask": {"causal_kv": True}},
    ) as engine:
        yield engine


@pytest.mark.parametrize("rule", ["threshold", "static", "credit+factor", "hierarchy"])
def test_always_verified_is_autoregressive_decoding(
    causal: EngineProcess, greedy: list[list[int]], rule: str
) -> None:
    asked = params(f"{rule}+s2d2", route="always")
    answers, counts = causal.run(engine_calls.generate_counting, prompts(), asked)
    assert counts["preemptions"] > 0
    assert [answer["tokens"] for answer in answers] == greedy


def test_plain_decoding_is_not_autoregressive(
    causal: EngineProcess, greedy: list[list[int]]
) -> None:
    """The negative control: what drafted is another model."""
    answers = causal.run(engine_calls.generate, prompts(), params("threshold"))
    assert [answer["tokens"] for answer in answers] != greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_company_and_preemption_change_nothing(
    causal: EngineProcess, temperature: float
) -> None:
    asked = [
        params("s2d2", temperature, route=route, **options)
        for route, options in ROUTES.items()
    ] * 2
    alone = [
        causal.run(engine_calls.generate, [prompt], one)[0]["tokens"]
        for prompt, one in zip(prompts(), asked, strict=True)
    ]
    together, counts = causal.run(engine_calls.generate_counting, prompts(), asked)
    assert counts["preemptions"] > 0
    assert [answer["tokens"] for answer in together] == alone


@pytest.fixture(scope="module")
def one_by_one(checkpoint: Any) -> Iterator[EngineProcess]:
    """The same weights in autoregressive mode: blocks of one position."""
    with EngineProcess(
        model=str(checkpoint[0]),
        max_model_len=96,
        block_size=32,
        max_logprobs=-1,
        additional_config={"unmask": {"block_length": 1}},
    ) as engine:
        yield engine


def test_the_law_of_whole_sequences(
    causal: EngineProcess, one_by_one: EngineProcess
) -> None:
    """The last one: it takes other weights."""
    verification.test_the_law_of_whole_sequences(causal, one_by_one)
