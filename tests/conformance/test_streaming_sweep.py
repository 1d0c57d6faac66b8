# SPDX-License-Identifier: Apache-2.0
"""WeDLM's rule on random engines, windows and networks, against its published loop.

Too long for every run; ``make conformance`` runs it.
"""

import random
from functools import partial
from pathlib import Path
from typing import Any

import engine_calls
import pytest
from checkpoints import EOS, wedlm_config, write_checkpoint
from dense_reference import choose_near, decode_streaming, entropy_of
from engine_process import EngineProcess

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

WINDOWS = [1, 2, 4, 16, 40]
# The 7B model has biases, the 8B model norms.
NETWORKS = {
    "7b": {},
    "8b": {"attention_bias": False, "qk_norm": True, "head_dim": 32, "hidden_size": 96},
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("network", NETWORKS)
def test_random_engine_equals_the_published_loop(
    network: str, window: int, tmp_path: Path
) -> None:
    rng = random.Random(window)
    config = wedlm_config(window, **NETWORKS[network])
    weights = write_checkpoint(tmp_path, config, seed=window)
    context = rng.choice([100, 150, 200])
    shared = [rng.randrange(EOS) for _ in range(context)]
    prompts, params, expected = [], [], []
    for _ in range(16):
        keep = rng.randrange(context - 2)
        prompt = shared[:keep] + [rng.randrange(EOS)]
        rule = {"bound": rng.choice([0.0, 0.4, 1.5]), "penalty": rng.choice([0, 0.02])}
        names = {"bound": "unmask_entropy_bound", "penalty": "unmask_distance_penalty"}
        extra: dict[str, Any] = {names[name]: value for name, value in rule.items()}
        budget = rng.randint(1, 60)
        prompts.append(prompt)
        params.append(
            {
                "temperature": 0,
                "ignore_eos": True,
                "max_tokens": budget,
                "extra_args": {"unmask_strategy": "wedlm", **extra},
            }
        )
        tokens, _ = decode_streaming(
            config,
            weights,
            prompt,
            budget,
            block=window,
            choose=partial(choose_near, **rule),
            max_model_len=context,
            sureness=entropy_of,
        )
        expected.append(tokens)
    with EngineProcess(
        model=str(tmp_path),
        block_size=32,
        max_model_len=context,
        max_num_seqs=rng.choice([3, 8]),
        max_num_batched_tokens=max(2 * window, rng.choice([16, 40, 256])),
        num_gpu_blocks_override=-(-context // 32) + rng.choice([3, 40]),
        enable_prefix_caching=rng.random() < 0.7,
    ) as engine:
        outputs = engine.run(engine_calls.generate, prompts, params)
    assert [output["tokens"] for output in outputs] == expected
