# SPDX-License-Identifier: Apache-2.0
"""Random engines of every family, and tensor parallelism, against the reference.

Too long for every run; ``make conformance`` runs it.
"""

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import engine_calls
import jsonschema
import pytest
import structured_calls
from cached_reference import as_llada, decode_cached
from checkpoints import EOS, write_checkpoint
from conformance.test_exactness_sweep import choose_scheduled, random_engine
from dense_reference import choose_threshold
from e2e.test_families import DEMO, IDS, SCHEMA
from engine_process import EngineProcess
from family_references import REFERENCES

from vllm_unmask.families import FAMILIES, family_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ARCHITECTURES = [family.architecture for family in FAMILIES]
# The sizes of the published blocks, and two that divide no page.
BLOCKS = [1, 4, 5, 8, 24, 32]


def agrees(
    architecture: str, folder: Path, block: int, seed: int, **settings: Any
) -> None:
    """Serve a mixed batch, and compare each output with whole-sequence decoding."""
    rng = random.Random(seed)
    reference = REFERENCES[architecture]
    config = reference.config(block)
    weights = write_checkpoint(folder, config, seed)
    context = settings["max_model_len"]
    requests: list[tuple[list[int], int, dict[str, Any], Any]] = []
    for _ in range(12):
        prompt = [rng.randrange(EOS) for _ in range(rng.randrange(1, context - 1))]
        if rng.random() < 0.5:
            steps = rng.randint(1, block)
            extra: dict[str, Any] = {"unmask_strategy": "static", "unmask_steps": steps}
            choose: Any = partial(choose_scheduled, steps=steps)
        else:
            threshold = rng.choice([0.3, 0.5, 0.8])
            extra = {"unmask_threshold": threshold}
            choose = partial(choose_threshold, threshold=threshold)
        requests.append((prompt, rng.randint(1, 40), extra, choose))
    with EngineProcess(model=str(folder), **settings) as engine:
        outputs = engine.run(
            engine_calls.generate,
            [prompt for prompt, *_ in requests],
            [
                {
                    "temperature": 0,
                    "ignore_eos": True,
                    "max_tokens": budget,
                    "extra_args": extra,
                }
                for _, budget, extra, _ in requests
            ],
        )
    for (prompt, budget, extra, choose), output in zip(requests, outputs, strict=True):
        expected, _ = reference.decode(
            config,
            weights,
            prompt,
            budget,
            block=block,
            choose=reference.order(choose),
            max_model_len=context,
            logits_of=reference.logits,
        )
        assert output["tokens"] == expected, (settings, len(prompt), budget, extra)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_engine_equals_dense_decoding(
    architecture: str, block: int, tmp_path: Path
) -> None:
    seed = BLOCKS.index(block)
    settings = random_engine(random.Random(seed), block)
    attention = family_of(architecture).attention
    if attention == "causal":
        settings["async_scheduling"] = False
        settings["additional_config"] = {}
    if attention == "full":
        settings["async_scheduling"] = False
        settings["additional_config"] = {"unmask": {"window": 0}}
        budget = settings["max_num_batched_tokens"]
        settings["max_num_batched_tokens"] = max(settings["max_model_len"], budget)
    agrees(architecture, tmp_path, block, seed, **settings)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_ranks_equal_dense_decoding(architecture: str, tmp_path: Path) -> None:
    agrees(
        architecture,
        tmp_path,
        4,
        9,
        max_model_len=100,
        block_size=32,
        tensor_parallel_size=2,
        # vLLM wants a NUMA node for each rank unless it is told the cores.
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_model_equals_dense_decoding(
    architecture: str, tmp_path: Path
) -> None:
    agrees(
        architecture,
        tmp_path,
        4,
        10,
        max_model_len=100,
        block_size=32,
        enforce_eager=False,
    )


@pytest.mark.parametrize("block", [1, 5, 32])
@pytest.mark.parametrize("architecture", ["LLaDAModelLM", "DreamModel"])
def test_caches_equal_those_in_plain_torch(
    architecture: str, block: int, tmp_path: Path
) -> None:
    """Every policy, refreshed or not, and the carried row of shifted logits."""
    rng = random.Random(block)
    reference = REFERENCES[architecture]
    config = reference.config(block)
    weights = write_checkpoint(tmp_path, config, block)
    plain, renamed = config, weights
    if reference.shifted:
        plain, renamed = as_llada(config, weights)
    params, prompts, expected = [], [], []
    for cache in ("prefix", "dual"):
        for refresh in (None, 2, 3, 7):
            threshold, budget = rng.choice([0.3, 0.5]), rng.randint(20, 80)
            prompts.append([rng.randrange(EOS) for _ in range(rng.randrange(1, 60))])
            asked = {"unmask_cache": cache, "unmask_window": 0}
            asked |= {"unmask_threshold": threshold, "unmask_refresh": refresh}
            params.append(
                {
                    "temperature": 0,
                    "ignore_eos": True,
                    "max_tokens": budget,
                    "extra_args": asked,
                }
            )
            output, _ = decode_cached(
                plain,
                renamed,
                prompts[-1],
                budget,
                block=block,
                choose=partial(choose_threshold, threshold=threshold),
                dual=cache == "dual",
                refresh=refresh or block,
                shifted=reference.shifted,
            )
            expected.append(output)
    with EngineProcess(model=str(tmp_path), block_size=32) as engine:
        outputs = engine.run(engine_calls.generate, prompts, params)
    assert [output["tokens"] for output in outputs] == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_structured_output_is_valid(architecture: str, tmp_path: Path) -> None:
    """With random weights, by every recommended strategy and with speculation."""
    write_checkpoint(tmp_path, REFERENCES[architecture].config(8, **IDS))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, tmp_path)
    family = next(f for f in FAMILIES if f.architecture == architecture)
    careful = ("static", "threshold")
    # What needs a final cache, or remembers a block.
    others = ("s2d2", "credit+sub_blocks") if family.attention == "block_causal" else ()
    speculates = family.attention != "causal"
    asked = [
        {
            "structured_outputs": {"json": SCHEMA},
            "temperature": temperature,
            "seed": seed,
            "max_tokens": max_tokens,
            "extra_args": {"unmask_strategy": strategy},
        }
        for strategy in (*careful, *family.presets, *others)
        for temperature, seed in ((0.0, 1), (0.7, 1), (1.0, 2))
        for max_tokens in (48, 120)
    ]
    with EngineProcess(
        model=str(tmp_path),
        skip_tokenizer_init=False,
        block_size=32,
        additional_config={"unmask": {"adaptive_candidates": False}},
    ) as engine:
        texts = [f"number {i}" for i in range(len(asked))]
        answers = engine.run(structured_calls.chat, texts, asked)
        plain = [
            i for i, p in enumerate(asked) if speculates and _strategy(p) in careful
        ]
        faster = [
            asked[i]
            | {"extra_args": {"unmask_strategy": f"{_strategy(asked[i])}+freedave"}}
            for i in plain
        ]
        again = engine.run(structured_calls.chat, [texts[i] for i in plain], faster)
    for param, answer in zip(asked, answers, strict=True):
        assert _is_valid(answer["text"]), (param, answer["text"])
    for i, answer in zip(plain, again, strict=True):
        assert answer["tokens"] == answers[i]["tokens"], asked[i]


def _strategy(params: dict[str, Any]) -> str:
    return str(params["extra_args"]["unmask_strategy"])


def _is_valid(text: str) -> bool:
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True
