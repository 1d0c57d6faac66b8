# SPDX-License-Identifier: Apache-2.0
"""Models that are not ours are served as if the plugin were not there."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any, NamedTuple

import engine_calls
import pytest
import torch
from checkpoints import EOS, sdar_config, write_checkpoint
from engine_process import EngineProcess

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CORE = "llm_engine.engine_core.engine_core"


class Pair(NamedTuple):
    """The same autoregressive model with the plugin switched on and off."""

    on: EngineProcess
    off: EngineProcess

    def both(self, function: Any, *args: Any) -> list[Any]:
        return [engine.run(function, *args) for engine in self]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = tmp_path_factory.mktemp("qwen3")
    # SDAR's network is Qwen3's, under the same weight names.
    ours = {"auto_map": ..., "block_size": ..., "mask_token_id": ...}
    config = sdar_config(**ours, architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    write_checkpoint(path, config)
    with ThreadPoolExecutor(2) as pool:
        starting = [
            pool.submit(EngineProcess, model=str(path), env={"UNMASK_DISABLE": switch})
            for switch in ("0", "1")
        ]
    engines = [future.result() for future in starting if not future.exception()]
    try:
        yield Pair(*[future.result() for future in starting])
    finally:
        for engine in engines:
            engine.close()


PROMPTS = [
    [random.Random(length).randrange(EOS) for _ in range(length)]
    for length in (1, 2, 5, 16, 33, 70)
]


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"temperature": 0}, id="greedy"),
        pytest.param({"temperature": 1, "seed": 11}, id="seeded"),
        pytest.param(
            {
                "temperature": 0.8,
                "seed": 12,
                "top_p": 0.9,
                "top_k": 40,
                "repetition_penalty": 1.2,
                "presence_penalty": 0.5,
                "logit_bias": {3: 2.0},
                "min_tokens": 5,
            },
            id="everything",
        ),
    ],
)
def test_same_tokens_and_logprobs(pair: Pair, params: dict[str, Any]) -> None:
    params = {"max_tokens": 24, "logprobs": 5} | params
    on, off = pair.both(engine_calls.generate, PROMPTS, params)
    assert on == off
    # Neither cut short nor always the same token.
    assert len(on) == len(PROMPTS)
    assert all(len(output["logprobs"]) == len(output["tokens"]) for output in on)
    assert len({token for output in on for token in output["tokens"]}) > 10


def test_same_runner_and_scheduler(pair: Pair) -> None:
    on, off = pair.both(
        attrgetter(
            f"{CORE}.model_executor.driver_worker.worker.model_runner.__class__.__name__",
            f"{CORE}.scheduler.__class__.__name__",
            f"{CORE}.vllm_config.model_config.is_diffusion",
            f"{CORE}.vllm_config.diffusion_config",
            f"{CORE}.vllm_config.cache_config.block_size",
        )
    )
    assert on == off
    assert on[2] is False
    if not torch.cuda.is_available():
        # The gate to Model Runner V2 is open for our models only.
        assert on[0] == "CPUModelRunner"


def test_our_options_are_refused(pair: Pair) -> None:
    params = {"max_tokens": 2, "extra_args": {"unmask_threshold": 0.5}}
    with pytest.raises(RuntimeError, match="VLLMValidationError: unmask_threshold has"):
        pair.on.run(engine_calls.generate, PROMPTS[:1], params)
    # As without us; and other people's options are none of our business.
    pair.off.run(engine_calls.generate, PROMPTS[:1], params)
    params["extra_args"] = {"somebody_elses": 1}
    on, off = pair.both(engine_calls.generate, PROMPTS[:1], params | {"seed": 1})
    assert on == off
