# SPDX-License-Identifier: Apache-2.0
"""What the cache policies of models with full attention cost, and how they differ.

A LLaDA model of 50 M parameters with seeded random weights, in float32. Every request
is greedy, with the static schedule, so that all policies take the same number of
forwards, and unmasks `--steps` times in each block. The policies take turns in one
engine, with the same prompts.

`rows` are those that the forwards computed, prompt included. `agreement` is the share
of output tokens that are those of cache=none, which is exact; the weights being
random, it says how much the outputs differ, and nothing of what a trained model does.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
# Not a package: the tests import this file by its path.
sys.path[:0] = [str(HERE)]

from machine import load_average, say, surroundings  # noqa: E402

BLOCK = 32
# Head size 64. 50 M parameters, of which a fifth are embedding and head.
CONFIG: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "block_type": "llama",
    "d_model": 640,
    "n_layers": 8,
    "n_heads": 10,
    "n_kv_heads": 10,
    "mlp_hidden_size": 1728,
    "max_sequence_length": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "embedding_size": 8192,
    "vocab_size": 8192,
    "weight_tying": False,
    "mask_token_id": 8191,
    "eos_token_id": 8190,
    "pad_token_id": 8190,
}


class Policy(NamedTuple):
    """What a row of the result is about."""

    cache: str
    refresh: int | None = None
    window: int = 0

    @property
    def label(self) -> str:
        parts = [self.cache]
        if self.refresh is not None:
            parts.append(f"refresh {self.refresh}")
        if self.window:
            parts.append(f"window {self.window}")
        return ", ".join(parts)

    @property
    def extra_args(self) -> dict[str, Any]:
        """Request options of this plugin."""
        options = {"unmask_cache": self.cache, "unmask_window": self.window}
        if self.refresh is not None:
            options["unmask_refresh"] = self.refresh
        return options


EXACT = Policy("none")
POLICIES = (
    EXACT,
    Policy("prefix"),
    Policy("prefix", refresh=4),
    Policy("dual"),
    Policy("dual", refresh=4),
    Policy("none", window=32),
    Policy("dual", window=32),
)


class Sizes(NamedTuple):
    """What is asked of the engine."""

    prompts: int = 4
    prompt_tokens: int = 128
    output_tokens: int = 128


QUICK = Sizes(prompts=2, prompt_tokens=64, output_tokens=64)


class Sample(NamedTuple):
    """One measurement of one policy."""

    policy: Policy
    repeat: int
    seconds: float
    forwards: int
    rows: int
    outputs: list[list[int]]  # token ids of each request

    @property
    def speed(self) -> float:
        """Output tokens per second."""
        return sum(map(len, self.outputs)) / self.seconds


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Published name of every weight -> its shape."""
    hidden, inner = config["d_model"], config["mlp_hidden_size"]
    root, vocab = "model.transformer", config["embedding_size"]
    found: dict[str, tuple[int, ...]] = {
        f"{root}.wte.weight": (vocab, hidden),
        f"{root}.ln_f.weight": (hidden,),
        f"{root}.ff_out.weight": (vocab, hidden),
    }
    for layer in range(config["n_layers"]):
        block = f"{root}.blocks.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            found[f"{block}.{name}.weight"] = (hidden, hidden)
        for name in ("ff_proj", "up_proj"):
            found[f"{block}.{name}.weight"] = (inner, hidden)
        found[f"{block}.ff_out.weight"] = (hidden, inner)
        for name in ("attn_norm", "ff_norm"):
            found[f"{block}.{name}.weight"] = (hidden,)
    return found


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Write configuration and weights that keep activations at size one."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes(config).items():
        weights[name] = torch.ones(shape)
        if len(shape) == 2:
            scale = 1.0 if "wte" in name else shape[1] ** -0.5
            weights[name] = scale * torch.randn(shape, generator=generator)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def agreement(outputs: list[list[int]], exact: list[list[int]]) -> float:
    """Share of tokens that are the same at the same place."""
    pairs = [
        (a, b)
        for ours, theirs in zip(outputs, exact, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def assemble(samples: Iterable[Sample], environment: dict[str, Any]) -> dict[str, Any]:
    """The JSON object: a row for each policy, and where it was measured.

    `over_none` is the median over repeats of the tokens per second over those of
    cache=none in the same repeat.
    """
    groups: dict[Policy, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.policy, []).append(sample)
    exact = {sample.repeat: sample for sample in groups[EXACT]}
    rows = [_row(policy, group, exact) for policy, group in groups.items()]
    return {"rows": rows, "environment": environment}


def _row(
    policy: Policy, samples: Sequence[Sample], exact: dict[int, Sample]
) -> dict[str, Any]:
    first = samples[0]
    speeds = [sample.speed for sample in samples]
    tokens = sum(map(len, first.outputs))
    return {
        **policy._asdict(),
        "tokens_per_second": median(speeds),
        "tokens_per_second_min": min(speeds),
        "tokens_per_second_max": max(speeds),
        "over_none": median(s.speed / exact[s.repeat].speed for s in samples),
        "forwards": first.forwards,
        "rows": first.rows,
        "rows_per_token": first.rows / tokens,
        "agreement": agreement(first.outputs, exact[first.repeat].outputs),
        "repeats": len(samples),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    heads = ("tokens/s", "over none", "forwards", "rows/token", "agreement")
    lines = [f"{'':20}" + "".join(f"{head:>12}" for head in heads)]
    for item in result["rows"]:
        policy = Policy(item["cache"], item["refresh"], item["window"])
        lines.append(
            f"{policy.label:20}{item['tokens_per_second']:12.1f}"
            f"{item['over_none']:12.2f}{item['forwards']:12d}"
            f"{item['rows_per_token']:12.1f}{item['agreement']:12.1%}"
        )
    return "\n".join(lines) + "\n"


class Engine:
    """vLLM in this process."""

    def __init__(self, folder: Path, sizes: Sizes, steps: int) -> None:
        from vllm import LLM

        context = sizes.prompt_tokens + sizes.output_tokens
        self.llm = LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=context,
            max_num_seqs=sizes.prompts,
            max_num_batched_tokens=sizes.prompts * context,
            kv_cache_memory_bytes=256 << 20,
            disable_log_stats=False,
            additional_config={
                "unmask": {
                    "strategy": "static",
                    "steps": steps,
                    "block_length": BLOCK,
                }
            },
        )
        random = torch.Generator().manual_seed(1)
        ids = torch.randint(
            CONFIG["eos_token_id"],
            (sizes.prompts, sizes.prompt_tokens),
            generator=random,
        )
        self.prompts = [{"prompt_token_ids": prompt} for prompt in ids.tolist()]
        self.max_tokens = sizes.output_tokens

    def measure(self, policy: Policy, repeat: int) -> Sample:
        """All prompts at once."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            max_tokens=self.max_tokens,
            extra_args=policy.extra_args,
        )
        before = self._counters()
        start = time.perf_counter()
        outputs = self.llm.generate(self.prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        after = self._counters()
        forwards, rows = (a - b for a, b in zip(after, before, strict=True))
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return Sample(policy, repeat, seconds, forwards, rows, tokens)

    def _counters(self) -> tuple[int, int]:
        """Denoising steps and their rows so far, over all requests."""
        values = {
            metric.name: getattr(metric, "value", 0)
            for metric in self.llm.get_metrics()
        }
        return (
            values.get("vllm:diffusion_num_denoising_steps", 0),
            values.get("vllm:diffusion_num_canvas_positions", 0),
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    sizes = QUICK if args.quick else Sizes()
    repeats = args.repeats or (1 if args.quick else 3)
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_OFFLINE": "1",
    }
    load = load_average()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), CONFIG)
        engine = Engine(Path(folder), sizes, args.steps)
    engine.measure(Policy("dual"), 0)  # warms up
    samples = []
    for repeat in range(repeats):
        for policy in POLICIES:
            say(f"repeat {repeat + 1} of {repeats}: {policy.label}")
            samples.append(engine.measure(policy, repeat))
    environment = surroundings(
        load,
        threads=args.threads,
        parameters=sum(torch.Size(s).numel() for s in shapes(CONFIG).values()),
        block_length=BLOCK,
        steps=args.steps,
        **sizes._asdict(),
    )
    return assemble(samples, environment)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, required=True, help="write the result here"
    )
    parser.add_argument("--quick", action="store_true", help="fewer, shorter requests")
    parser.add_argument("--repeats", type=int, help="default 3, or 1 with --quick")
    parser.add_argument("--steps", type=int, default=8, help="of a block (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP's (default 1)")
    args = parser.parse_args()
    result = run(args)
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
