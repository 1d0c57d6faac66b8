# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused when the engine is built, with a remedy."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    VOCAB,
    fast_dllm_v2_config,
    llada_config,
    sdar_config,
    wedlm_config,
)
from e2e.server import VLLM

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# vLLM's import takes most of the time, so one process tries every setting. What
# raises here ends `vllm serve`, as the commands below show.
TRY_ALL = """
import json, sys
from vllm.engine.arg_utils import EngineArgs

results = {}
for name, settings in json.load(open(sys.argv[1])).items():
    try:
        config = EngineArgs(
            **{"max_num_seqs": 8} | settings, skip_tokenizer_init=True, dtype="float32"
        ).create_engine_config()
        results[name] = {
            "block_size": config.cache_config.block_size,
            "context": config.model_config.max_model_len,
            "prefix_caching": config.cache_config.enable_prefix_caching,
        }
    except Exception as error:
        results[name] = {"error": str(error)}
json.dump(results, open(sys.argv[2], "w"))
"""

# A process whose vLLM says that it is of another version.
OTHER_VERSION = """
import sys
import vllm
vllm.__version__ = "0.34.1"
from vllm.entrypoints.cli.main import main
sys.argv = ["vllm", "serve", "--help"]
main()
"""


def ours(**options: Any) -> dict[str, Any]:
    return {"additional_config": {"unmask": options}}


# Engine arguments beside the model, what the message must say. `model` is one of
# the checkpoints below.
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "block length 0": (
        ours(block_length=0),
        ["block_length=0", "an integer, at least 1"],
    ),
    "block length 300": (
        ours(block_length=300) | {"max_model_len": 1024},
        ["block_length=300", "an integer from 1 to 256"],
    ),
    "lookahead in a window": (
        ours(strategy="lookahead") | {"model": "window"},
        ["strategy='lookahead' needs blocks", "a strategy without lookahead"],
    ),
    "speculation in a window": (
        ours(max_candidates=4) | {"model": "window"},
        ["max_candidates=4 is not possible", "expected 1"],
    ),
    "layout of a window": (
        ours(layout="uniform") | {"model": "window"},
        ["layout='uniform' has no use", "auto or exact"],
    ),
    "causal cache of a window": (
        ours(causal_kv=True) | {"model": "window"},
        ["causal_kv=True has no use", "expected false"],
    ),
    "short blocks in a window": (
        ours(answer_block_length=1) | {"model": "window"},
        ["answer_block_length=1 is not possible", "a window that moves on"],
    ),
    "short blocks beside lookahead": (
        ours(answer_block_length=1, strategy="lookahead"),
        ["answer_block_length=1 is not possible", "a strategy without lookahead"],
    ),
    "short blocks beside a causal cache": (
        ours(answer_block_length=1, causal_kv=True),
        ["answer_block_length=1 is not possible", "a server without causal_kv"],
    ),
    "short blocks that fill no block": (
        ours(answer_block_length=3),
        ["answer_block_length=3", "a divisor of 4"],
    ),
    "short blocks without a tokenizer": (
        ours(answer_block_length=1),
        ["answer_block_length=1 needs the tokenizer", "skip_tokenizer_init"],
    ),
    "asynchronous scheduling of a window": (
        {"model": "window", "async_scheduling": True},
        ["--async-scheduling is not supported", "remove it"],
    ),
    "block length as text": (
        ours(block_length="8"),
        ["block_length='8'", "an integer", "got str"],
    ),
    "block length of the checkpoint": (
        {"model": "block 300", "max_model_len": 1024},
        ["block_length=300", "an integer from 1 to 256"],
    ),
    "block length and page": (
        ours(block_length=24) | {"block_size": 32},
        ["--block-size 32", "multiple of the diffusion block length 24"],
    ),
    "block length and token budget": (
        ours(block_length=32) | {"max_num_batched_tokens": 32, "max_num_seqs": 4},
        ["block_length=32", "at most 16", "--max-num-batched-tokens"],
    ),
    "unknown option": (
        ours(blok_length=8),
        ["blok_length=8", "block_length (nearest match)", "mask_token_id"],
    ),
    "prefix where none belongs": (
        ours(unmask_threshold=0.5),
        ["unmask_threshold=0.5", "threshold (nearest match)"],
    ),
    "options that are no object": (
        {"additional_config": {"unmask": "static"}},
        ["unmask='static'", "an object of option names and values"],
    ),
    "default out of range": (
        ours(threshold=1.5),
        ["threshold=1.5", "a number from 0.0 to 1.0"],
    ),
    "more steps than positions": (
        ours(strategy="static", steps=5),
        ["steps=5", "the block length"],
    ),
    "mask id null": (
        {"model": "mask null"},
        ["mask_token_id=None", f"from 0 to {VOCAB - 1}", "--additional-config"],
    ),
    "mask id of the release, smaller vocabulary": (
        {"model": "mask absent"},
        ["mask_token_id=151669", f"from 0 to {VOCAB - 1}", "--additional-config"],
    ),
    "mask id out of range": (
        ours(mask_token_id=VOCAB),
        [f"mask_token_id={VOCAB}", f"from 0 to {VOCAB - 1}"],
    ),
    "speculation": (
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 2,
                "prompt_lookup_max": 3,
            }
        },
        ["--speculative-config", "remove it"],
    ),
    "scheduler": (
        {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
        ["--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler", "remove it"],
    ),
    "canvas length of vLLM": (
        {"diffusion_config": {"canvas_length": 16}},
        ["--diffusion-config canvas_length=16", "block_length"],
    ),
    "processed logprobs": (
        {"logprobs_mode": "processed_logprobs"},
        ["--logprobs-mode", "not supported"],
    ),
    "another grammar backend": (
        {"structured_outputs_config": {"backend": "guidance"}},
        ["--structured-outputs-config.backend guidance", "remove it"],
    ),
    "prefill in one piece": (
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 512},
        ["--no-enable-chunked-prefill", "remove it"],
    ),
    "cache policy without full attention": (
        ours(cache="dual"),
        ["cache='dual' has no effect", "expected none or sub_block"],
    ),
    "cache of sub-blocks with full attention": (
        ours(strategy="fast_dllm_v2", cache="sub_block") | {"model": "full"},
        ["cache='sub_block' has no effect", "expected none or prefix or dual"],
    ),
    "cache of sub-blocks in a window": (
        ours(cache="sub_block") | {"model": "window"},
        ["cache='sub_block' has no effect", "a model with full attention"],
    ),
    "cache of sub-blocks without such": (
        ours(cache="sub_block"),
        ["cache='sub_block'", "it beside a strategy with sub_blocks"],
    ),
    "cache of sub-blocks and whole blocks": (
        ours(strategy="fast_dllm_v2", cache="sub_block", layout="uniform"),
        ["cache='sub_block' is not possible with layout=uniform", "auto or exact"],
    ),
    "verification without room": (
        ours(strategy="s2d2", max_candidates=2),
        ["strategy='s2d2'", "max_candidates of at least 3, not 2"],
    ),
    "candidates and token budget": (
        ours(block_length=32, max_candidates=3)
        | {"max_num_batched_tokens": 96, "max_num_seqs": 2},
        ["max_candidates=3", "at most 2", "--max-num-batched-tokens 96"],
    ),
    "verification and token budget": (
        ours(strategy="s2d2", block_length=32)
        | {"max_num_batched_tokens": 96, "max_num_seqs": 2},
        ["strategy='s2d2'", "max_candidates of at least 3, not 2"],
    ),
    "verification without room, shifted": (
        ours(strategy="s2d2", max_candidates=1) | {"model": "shifted"},
        ["strategy='s2d2'", "max_candidates of at least 2, not 1"],
    ),
    "verification while it pays, without room": (
        ours(adaptive_verification=True, max_candidates=2),
        ["adaptive_verification=True has no use", "max_candidates of at least 3"],
    ),
    "verification while it pays, with full attention": (
        ours(adaptive_verification=True) | {"model": "full"},
        ["adaptive_verification=True has no use", "expected false"],
    ),
    "verification while it pays, in a window": (
        ours(adaptive_verification=True) | {"model": "window"},
        ["adaptive_verification=True has no use", "expected false"],
    ),
    "verification with full attention": (
        ours(strategy="s2d2") | {"model": "full"},
        ["strategy='s2d2'", "every position sees every other one"],
    ),
    "more candidates than the server's with full attention": (
        ours(strategy="freedave", candidates=5, max_candidates=4) | {"model": "full"},
        ["candidates=5", "an integer from 1 to 4, the server's max_candidates"],
    ),
    "layout with full attention": (
        ours(layout="uniform") | {"model": "full"},
        ["layout='uniform' is not possible", "auto or exact"],
    ),
    "causal cache with full attention": (
        ours(causal_kv=True) | {"model": "full"},
        ["causal_kv=True is not possible", "expected false"],
    ),
    "asynchronous scheduling with full attention": (
        {"model": "full", "async_scheduling": True},
        ["--async-scheduling is not supported", "remove it"],
    ),
    "prompts in parts with full attention": (
        {"model": "full", "long_prefill_token_threshold": 64},
        ["--long-prefill-token-threshold 64", "remove it"],
    ),
    "context that one forward does not hold": (
        {"model": "full", "max_model_len": 256, "max_num_batched_tokens": 128},
        ["--max-model-len 256", "--max-num-batched-tokens 128"],
    ),
}
# The same settings with the remedy applied: what refuses is not something else.
ACCEPTED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "block length": ours(block_length=8),
    "window": ours(strategy="wedlm", block_length=24)
    | {"model": "window", "block_size": 32},
    "block length and page": ours(block_length=16) | {"block_size": 32},
    "mask id null": ours(mask_token_id=VOCAB - 1) | {"model": "mask null"},
    "mask id absent": ours(mask_token_id=0) | {"model": "mask absent"},
    "defaults of requests": ours(strategy="static", steps=4, order="margin"),
    "block length 24": ours(block_length=24),
    "cache of sub-blocks": ours(strategy="fast_dllm_v2", cache="sub_block"),
    "verification, shifted": ours(strategy="s2d2", max_candidates=2)
    | {"model": "shifted"},
    "verification while it pays": ours(adaptive_verification=True),
    "full attention": ours(cache="dual", refresh=8, window=0) | {"model": "full"},
    "speculation with full attention": ours(strategy="freedave", max_candidates=4)
    | {"model": "full"},
    "context of full attention": {
        "model": "full",
        "max_model_len": None,
        "max_num_batched_tokens": 128,
    },
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configurations without weights: none of these gets as far as loading them."""
    paths = {}
    for name, config in {
        "good": sdar_config(4),
        "block 300": sdar_config(300),
        "window": wedlm_config(),
        "shifted": fast_dllm_v2_config(4),
        "mask null": sdar_config(4, mask_token_id=None),
        "mask absent": sdar_config(4, mask_token_id=...),
        "full": llada_config(4),
    }.items():
        paths[name] = tmp_path_factory.mktemp("checkpoint")
        (paths[name] / "config.json").write_text(json.dumps(config))
    return paths


@pytest.fixture(scope="module")
def results(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    cases = {f"refused {name}": settings for name, (settings, _) in REFUSED.items()}
    cases |= {f"accepted {name}": settings for name, settings in ACCEPTED.items()}
    for name, settings in cases.items():
        model = checkpoints[settings.get("model", "good")]
        cases[name] = {"max_model_len": 256} | settings | {"model": str(model)}
    folder = tmp_path_factory.mktemp("results")
    (folder / "cases").write_text(json.dumps(cases))
    subprocess.run(
        [sys.executable, "-c", TRY_ALL, folder / "cases", folder / "results"],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        check=True,
    )
    return json.loads((folder / "results").read_text())


@pytest.mark.parametrize("case", REFUSED)
def test_refused(results: dict[str, dict[str, Any]], case: str) -> None:
    result = results[f"refused {case}"]
    for part in REFUSED[case][1]:
        assert part in result["error"]


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(results: dict[str, dict[str, Any]], case: str) -> None:
    result = results[f"accepted {case}"]
    assert "error" not in result
    if case == "block length 24":
        # Nobody asked for a page size: one is chosen that holds whole blocks.
        assert result["block_size"] % 24 == 0
    if case == "context of full attention":
        # Prompt and canvas are forwarded in one step.
        assert result["context"] == 128
    assert result["prefix_caching"] != (case.endswith("full attention"))


@pytest.fixture(scope="module")
def commands(checkpoints: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Commands that must fail, started at the same time."""
    serve = [*VLLM, "serve", str(checkpoints["good"])]
    bad = json.dumps(ours(block_length=0)["additional_config"])
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    started = {
        name: subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | quiet,
        )
        for name, command in (
            ("plugin", [*serve, "--plugin", "unmask,nosuch"]),
            ("option", [*serve, "--additional-config", bad]),
            ("version", [sys.executable, "-c", OTHER_VERSION]),
        )
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def test_serve_with_a_plugin_that_is_not_there(commands: dict[str, Any]) -> None:
    code, output = outcome(commands["plugin"])
    assert code != 0
    last = output.strip().splitlines()[-1]
    assert "plugin 'nosuch' is not loaded; loaded plugins: " in last
    assert "unmask" in last.split("loaded plugins: ")[1]


def test_serve_with_a_wrong_option(commands: dict[str, Any]) -> None:
    code, output = outcome(commands["option"])
    assert code != 0
    # At the end, where a user looks, and not only somewhere in the traceback.
    end = "\n".join(output.strip().splitlines()[-4:])
    assert "block_length=0 is not allowed: expected an integer, at least 1" in end


def test_another_vllm_is_refused(commands: dict[str, Any]) -> None:
    code, output = outcome(commands["version"])
    assert code != 0
    last = output.strip().splitlines()[-1]
    assert "supports vLLM 0.32 and 0.33, found 0.34.1" in last
    assert "UNMASK_DISABLE=1" in last
    assert "UNMASK_ALLOW_UNTESTED_VLLM=1" in last
