# SPDX-License-Identifier: Apache-2.0
"""The engine against a whole-sequence reference, in float32, random weights."""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import engine_calls
import family_calls
import pytest
import torch
from checkpoints import EOS, MASK, sdar_config, write_checkpoint
from dense_reference import (
    block_causal_mask,
    choose_static,
    choose_threshold,
    decode,
    dense_logits,
)
from engine_process import EngineProcess

pytestmark = pytest.mark.e2e

STATIC = {"unmask_strategy": "static"}
THRESHOLD = {"unmask_strategy": "threshold", "unmask_threshold": 0.5}
CHOOSERS = {
    "static": (STATIC, choose_static),
    "threshold": (THRESHOLD, partial(choose_threshold, threshold=0.5)),
}
MAX_TOKENS = 27


class Served(NamedTuple):
    """An engine, its weights and what is special about it."""

    engine: EngineProcess
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    block: int
    max_model_len: int
    name: str


ENGINES = {
    "block1": {"block": 1},
    "block4": {"block": 4},
    "block8-async": {"block": 8, "async_scheduling": True},
    "block8-async-exact": {
        "block": 8,
        "async_scheduling": True,
        "additional_config": {"unmask": {"layout": "exact"}},
    },
    "block8-uniform": {
        "block": 8,
        "additional_config": {"unmask": {"layout": "uniform"}},
    },
    "block32": {"block": 32},
    # Prompts in several chunks, canvases that wait for their turn, preemption,
    # and a context that ends inside a block.
    "block4-tight": {
        "block": 4,
        "max_num_batched_tokens": 24,
        "num_gpu_blocks_override": 6,
        "max_num_seqs": 8,
        "max_model_len": 70,
    },
    "block8-async-tight": {
        "block": 8,
        "async_scheduling": True,
        "max_num_batched_tokens": 40,
        "num_gpu_blocks_override": 6,
        "max_num_seqs": 8,
        "max_model_len": 70,
    },
}


@pytest.fixture(scope="module", params=ENGINES, ids=ENGINES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    options = dict(ENGINES[request.param])
    block = options.pop("block")
    options = {"max_model_len": 256, "block_size": 32, "max_num_seqs": 4} | options
    options["disable_log_stats"] = False
    path = tmp_path_factory.mktemp(request.param)
    config = sdar_config(block)
    weights = write_checkpoint(path, config)
    with EngineProcess(model=str(path), **options) as engine:
        length = options["max_model_len"]
        yield Served(engine, config, weights, block, length, request.param)


def prompts_for(block: int) -> list[list[int]]:
    """Prompts of 1 token to 3 blocks, off and on the grid, and a few more."""
    rng = random.Random(block)
    lengths = {1, 2, 3, block - 1, block, block + 1, 2 * block, 3 * block - 1, 41}
    return [
        [rng.randrange(EOS) for _ in range(length)]
        for length in sorted(lengths)
        if 0 < length <= 64
    ] + [[rng.randrange(EOS) for _ in range(3 * block if block < 16 else 50)]]


def greedy(extra: dict[str, Any], **params: Any) -> dict[str, Any]:
    return {
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": MAX_TOKENS,
        "extra_args": extra,
    } | params


def reference(served: Served, prompt: list[int], choose: Any) -> tuple[list[int], int]:
    return decode(
        served.config,
        served.weights,
        prompt,
        MAX_TOKENS,
        block=served.block,
        choose=choose,
        max_model_len=served.max_model_len,
    )


@pytest.mark.parametrize("rule", CHOOSERS)
def test_batch_equals_dense_decoding(served: Served, rule: str) -> None:
    extra, choose = CHOOSERS[rule]
    prompts = prompts_for(served.block)
    # Different budgets, so that prefills meet requests that are denoising.
    budgets = [MAX_TOKENS - 2 * index for index in range(len(prompts))]
    outputs, counts = served.engine.run(
        engine_calls.generate_counting,
        prompts,
        [greedy(extra, max_tokens=budget) for budget in budgets],
    )
    for prompt, budget, output in zip(prompts, budgets, outputs, strict=True):
        expected, _ = reference(served, prompt, choose)
        assert output["tokens"] == expected[:budget], len(prompt)
        assert output["finish_reason"] == "length"
    assert counts["mixed_steps"] > 0


def test_preempted_requests_go_on_as_if_nothing_happened(served: Served) -> None:
    if served.max_model_len > 70:
        pytest.skip("this engine has memory for all")
    rng = random.Random(31)
    prompts = [[rng.randrange(EOS) for _ in range(17 + i)] for i in range(8)]
    outputs, counts = served.engine.run(
        engine_calls.generate_counting, prompts, greedy(STATIC, max_tokens=40)
    )
    assert counts["preemptions"] > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        expected, _ = decode(
            served.config,
            served.weights,
            prompt,
            40,
            block=served.block,
            choose=choose_static,
        )
        assert output["tokens"] == expected


def test_every_logit_equals_the_dense_reference(served: Served) -> None:
    prompts = prompts_for(served.block)
    _, records = served.engine.run(
        engine_calls.generate_recorded, prompts, greedy(THRESHOLD)
    )
    assert records
    worst = 0.0
    for record in records:
        ids = record["prefix"] + record["active"]
        assert len(record["prefix"]) % served.block == 0
        expected = dense_logits(
            served.config,
            served.weights,
            ids,
            block_causal_mask(len(ids), served.block),
        )[len(record["prefix"]) :]
        worst = max(worst, float((record["logits"] - expected).abs().max()))
    assert worst < 2e-3, worst


def test_forwards_are_denoising_steps(served: Served) -> None:
    """No forward of its own to commit a block, not even for the last one."""
    prompt = prompts_for(served.block)[4]
    for extra, choose in CHOOSERS.values():
        outputs, records = served.engine.run(
            engine_calls.generate_recorded, [prompt], greedy(extra)
        )
        expected, forwards = reference(served, prompt, choose)
        assert outputs[0]["tokens"] == expected
        # Asynchronous scheduling may have a step in flight when the last block
        # is reported; it is computed for nothing, at most once a request.
        assert forwards <= len(records) <= forwards + 1


def test_rows_of_a_layout(served: Served) -> None:
    """Two blocks in every step, or a second one where the first is complete."""
    block, num_blocks = served.block, 3
    steps = num_blocks * block
    rows = {
        # The first canvas comes behind its prompt, alone.
        "block8-uniform": 2 * block * steps - block,
        "block8-async-exact": block * (steps + num_blocks - 1),
    }
    if served.name not in rows:
        pytest.skip("what is scheduled depends on the load")
    prompts = [prompt[:1] * (2 * block) for prompt in prompts_for(block)[:3]]
    before = served.engine.run(family_calls.diffusion_counters)
    served.engine.run(engine_calls.generate, prompts, greedy(STATIC, max_tokens=steps))
    after = served.engine.run(family_calls.diffusion_counters)
    counted = tuple(b - a for a, b in zip(before, after, strict=True))
    assert counted == (3 * steps, 3 * rows[served.name])


def test_alone_equals_batched(served: Served) -> None:
    """Mixed strategies and temperatures in one batch change nobody's output."""
    prompts = prompts_for(served.block)
    params = [
        greedy(STATIC),
        greedy(THRESHOLD),
        greedy({**STATIC, "unmask_steps": min(2, served.block)}),
        greedy(STATIC, temperature=1.0, seed=7),
        greedy(THRESHOLD, temperature=0.7, seed=8, top_p=0.9, top_k=20),
        greedy({**STATIC, "unmask_order": "margin"}),
        greedy({**THRESHOLD, "unmask_order": "entropy"}, temperature=0.5, seed=3),
        greedy({**STATIC, "unmask_order": "random"}, seed=11),
        greedy({**THRESHOLD, "unmask_confidence_from": "raw"}, temperature=1.0, seed=5),
    ]
    chosen = [params[i % len(params)] for i in range(len(prompts))]
    together = served.engine.run(engine_calls.generate, prompts, chosen)
    for prompt, param, output in zip(prompts, chosen, together, strict=True):
        (alone,) = served.engine.run(engine_calls.generate, [prompt], param)
        assert alone["tokens"] == output["tokens"], param


def test_prefix_cache_hit_equals_cold_run(served: Served) -> None:
    rng = random.Random(17)
    prompt = [rng.randrange(EOS) for _ in range(40)]
    cold, warm = (
        served.engine.run(engine_calls.generate, [prompt], greedy(STATIC))[0]
        for _ in range(2)
    )
    assert cold["num_cached_tokens"] == 0
    assert warm["num_cached_tokens"] == 32
    assert warm["tokens"] == cold["tokens"]
    # What was generated is cached as well, up to the last block that is final.
    longer = prompt + cold["tokens"]
    expected, _ = reference(served, longer[: len(longer) - 1], choose_static)
    (output,) = served.engine.run(engine_calls.generate, [longer[:-1]], greedy(STATIC))
    assert output["tokens"] == expected


def test_committed_kv_equals_a_fresh_prefill(served: Served) -> None:
    if served.max_model_len < 256:
        pytest.skip("pages are recycled while the test still reads them")
    rng = random.Random(23)
    prompt = [rng.randrange(EOS) for _ in range(37)]
    page = 32
    (output,), records = served.engine.run(
        engine_calls.generate_recorded, [prompt], greedy(THRESHOLD, max_tokens=90)
    )
    tokens = prompt + output["tokens"]
    # The last block's KV is provisional: nothing was forwarded after it.
    final = (len(tokens) // served.block - 1) * served.block // page
    assert final >= 2
    decoded = served.engine.run(engine_calls.read_pages, records[-1]["pages"][1:final])
    served.engine.run(engine_calls.reset_prefix_cache)
    _, fresh = served.engine.run(
        engine_calls.generate_recorded,
        [tokens[: final * page]],
        greedy(STATIC, max_tokens=1),
    )
    prefilled = served.engine.run(engine_calls.read_pages, fresh[0]["pages"][1:final])
    torch.testing.assert_close(decoded, prefilled, rtol=0, atol=1e-4)


def test_abort_inside_a_block_leaks_nothing(served: Served) -> None:
    prompts = prompts_for(served.block)[:4]
    expected = [reference(served, prompt, choose_static)[0] for prompt in prompts]
    doomed = prompts_for(served.block)[2:6]
    for steps in (1, 2, 3, 6):
        assert (
            served.engine.run(
                engine_calls.generate_with_aborts,
                prompts,
                greedy(STATIC),
                doomed,
                steps,
            )
            == expected
        )


def test_budgets_that_end_inside_a_block(served: Served) -> None:
    prompt = prompts_for(served.block)[3]
    expected, _ = reference(served, prompt, choose_static)
    budgets = list(range(1, 14))
    outputs = served.engine.run(
        engine_calls.generate,
        [prompt] * len(budgets),
        [greedy(STATIC, max_tokens=budget) for budget in budgets],
    )
    for budget, output in zip(budgets, outputs, strict=True):
        assert output["tokens"] == expected[:budget]
        assert output["finish_reason"] == "length"


def test_context_that_ends_inside_a_block(served: Served) -> None:
    rng = random.Random(29)
    prompts = [
        [rng.randrange(EOS) for _ in range(served.max_model_len - left)]
        for left in (1, 2, 3, served.block, served.block + 3, 13)
        if served.max_model_len - left > 0
    ]
    outputs = served.engine.run(
        engine_calls.generate, prompts, greedy(STATIC, max_tokens=500)
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        expected, _ = decode(
            served.config,
            served.weights,
            prompt,
            500,
            block=served.block,
            choose=choose_static,
            max_model_len=served.max_model_len,
        )
        assert output["tokens"] == expected
        assert len(prompt) + len(expected) == served.max_model_len


def test_mask_tokens_in_the_prompt_stay(served: Served) -> None:
    """In whole blocks and in the tail, where the canvas has masks of its own."""
    prompts = [
        [5, MASK, 7, 9, 11, MASK, MASK],
        [9, MASK],
        [3] * served.block + [MASK] * (served.block - 1),
    ]
    outputs = served.engine.run(engine_calls.generate, prompts, greedy(STATIC))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output["tokens"] == reference(served, prompt, choose_static)[0]


def test_stop_token_ends_a_block_early(served: Served) -> None:
    prompt = prompts_for(served.block)[2]
    free, _ = reference(served, prompt, choose_static)
    stop = free[len(free) // 2]
    (output,) = served.engine.run(
        engine_calls.generate, [prompt], greedy(STATIC, stop_token_ids=[stop])
    )
    assert output["tokens"] == free[: free.index(stop) + 1]
    assert output["finish_reason"] == "stop"
