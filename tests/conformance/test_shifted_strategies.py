# SPDX-License-Identifier: Apache-2.0
"""Every strategy on a family with shifted logits, with and without speculation.

Too long for every run; ``make conformance`` runs it.
"""

from collections.abc import Iterator
from typing import Any

import e2e.test_speculation as speculation
import e2e.test_strategies as strategies
import engine_calls
import pytest
import strategy_calls
import torch
from checkpoints import MASK, Weights, fast_dllm_v2_config, write_checkpoint
from dense_reference import block_causal_mask
from engine_process import EngineProcess
from family_references import shifted_logits

from vllm_unmask.decoding.learned import Filter, save_filter

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BLOCK = strategies.BLOCK
CONFIG = fast_dllm_v2_config(BLOCK)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Weights]:
    path = tmp_path_factory.mktemp("shifted")
    weights = write_checkpoint(path, CONFIG)
    torch.manual_seed(0)
    shapes = ((12, BLOCK), (12,), (BLOCK, 12), (BLOCK,))
    (path / "unmask").mkdir()
    save_filter(
        path / "unmask" / "filter.safetensors", Filter(*map(torch.randn, shapes))
    )
    return path, weights


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(request: pytest.FixtureRequest, checkpoint: Any) -> Iterator[EngineProcess]:
    with EngineProcess(
        model=str(checkpoint[0]),
        max_model_len=96,
        block_size=32,
        max_num_seqs=16,
        # Less than sixteen requests need: some are preempted.
        num_gpu_blocks_override=20,
        async_scheduling=request.param,
        additional_config={
            "unmask": {
                "max_candidates": speculation.CANDIDATES,
                "adaptive_candidates": False,
            }
        },
    ) as engine:
        engine.run(strategy_calls.use_byte_tokenizer)
        yield engine


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_company_and_preemption_change_nothing(
    engine: EngineProcess, temperature: float
) -> None:
    strategies.test_company_and_preemption_change_nothing(engine, temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_changes_nothing(engine: EngineProcess, temperature: float) -> None:
    speculation.test_every_strategy_decodes_the_same(engine, temperature)


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 3},
        {"n": 3, "temperature": 1.0},
        {"bad_words_token_ids": [[3, 5], [7], [4, 4, 4]]},
        {"logit_bias": {5: 3.0}, "min_tokens": 5, "ignore_eos": False},
        {"extra_args": {"diffusion_seed_canvas": list(range(9, 40))}},
        {"max_tokens": 90},
    ],
    ids=lambda options: next(iter(options)),
)
def test_sampling_parameters(engine: EngineProcess, options: dict[str, Any]) -> None:
    speculation.test_sampling_parameters(engine, options)


@pytest.mark.parametrize("strategy", ["static", "threshold+edit", "static+remdm"])
def test_trace_is_that_of_careful_decoding(
    engine: EngineProcess, strategy: str
) -> None:
    speculation.test_trace_is_that_of_careful_decoding(engine, strategy)


def ahead_recorded(llm: Any, prompt: list[int], params: dict[str, Any]) -> Any:
    """Of each step of a request: known ids, the two blocks, the next block's logits."""
    runner = engine_calls.model_runner(llm)
    stepper = runner.sampler.stepper
    original, records = stepper.step, []

    def step(inputs: Any, rows: Any, *args: Any) -> Any:
        if rows.ahead is not None and int(rows.ahead.width[0]) == BLOCK:
            (slot,), start = rows.slots_np.tolist(), int(rows.start[0])
            known = runner.req_states.all_token_ids.gpu[slot, :start].tolist()
            canvas = stepper.canvas.ids[slot]
            pending = bool(stepper.canvas.pending[slot])
            blocks = canvas[BLOCK:] if pending else canvas
            records.append((known, blocks.tolist(), inputs.ahead.clone()))
        return original(inputs, rows, *args)

    stepper.step = step
    try:
        engine_calls.generate(llm, [prompt], params)
    finally:
        del stepper.step
    return records


def test_next_blocks_logits(engine: EngineProcess, checkpoint: Any) -> None:
    """Of requests that look ahead, as of the whole sequence."""
    (prompt,) = strategies.prompts(1)
    asked = strategies.params("static+lookahead")
    records = engine.run(ahead_recorded, prompt, asked)
    assert len(records) > 10
    unmasked = 0
    for known, blocks, logits in records:
        ids = (known + blocks + [MASK] * BLOCK)[: len(known) + 2 * BLOCK]
        unmasked += sum(token != MASK for token in ids[-BLOCK:])
        mask = block_causal_mask(len(ids), BLOCK)
        expected = shifted_logits(CONFIG, checkpoint[1], ids, mask)[-BLOCK:]
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
    assert unmasked
