# SPDX-License-Identifier: Apache-2.0
"""Where the time of an engine step goes, and what the plugin's share of it is.

Eight requests (`--requests`) denoise together; only steps in which all of them do are
counted. The parts, each without those it calls:

    forward             the model's layers
    logits              the LM head
    sampler             from logits to canvases                    (plugin)
    grammar             masks and verification of all requests     (plugin)
    canvas              inputs, attention metadata, request state  (plugin)
    scheduler, plugin   what the scheduler subclass adds           (plugin)
    scheduler, vLLM     the methods that it extends
    rest                vLLM's own: batch preparation, outputs, front end

`plugin_share` adds up the parts of the plugin, over the whole step. Some of it an
autoregressive model would pay as well: sampling, inputs, attention metadata.

Models: the demo model, and an SDAR model of 100 million parameters with seeded weights,
a vocabulary of 150,000 tokens and blocks of 32. Modes: greedy, greedy with a grammar,
sampled (top-p) with a grammar; strategy `threshold`. Everything runs in one process a
model, modes in turns. With one thread the times are processor time of that thread,
which leaves out what other programs take.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo_model"
# Not a package: the tests import this file by its path.
sys.path[:0] = [str(HERE)]

from closed_loop import ENVIRONMENT  # noqa: E402
from machine import load_average, say, surroundings  # noqa: E402

TARGET = 0.08  # of a step, for the model of 100 million parameters
PLUGIN = ("sampler", "grammar", "canvas", "scheduler, plugin")
PARTS = ("forward", "logits", *PLUGIN, "scheduler, vLLM", "rest")
SIZES = {
    "100M": {
        "hidden_size": 448,
        "intermediate_size": 1408,
        "num_hidden_layers": 13,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "block_size": 32,
    },
    # Of `--quick`: the same vocabulary, next to no layers.
    "tiny": {"block_size": 32},
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "city": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "city", "age", "tags"],
    "additionalProperties": False,
}
MODES = {
    "greedy": {},
    "greedy, grammar": {"grammar": True},
    "sampled, grammar": {"grammar": True, "temperature": 1.0, "top_p": 0.9},
}


class Parts:
    """Seconds of each part, without the parts that are called from it."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open = ["rest"]
        self._since = now()

    def _switch(self) -> None:
        now = self.now()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds since the last call."""
        self._switch()
        seconds, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return seconds

    def time(self, owner: Any, part: str, *names: str) -> None:
        """Count what these methods of a class take; all its own without names."""
        for name in names or [n for n, x in vars(owner).items() if callable(x)]:
            setattr(owner, name, self._timed(getattr(owner, name), part))

    def _timed(self, method: Any, part: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return method(*args, **kwargs)

        return call


def instrument(parts: Parts) -> None:
    """Time the methods of vLLM and of the plugin that make up a step."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_unmask.engine.grammar import Grammars
    from vllm_unmask.engine.grammar_step import GrammarStep
    from vllm_unmask.engine.model_state import BlockDiffusionModelState
    from vllm_unmask.engine.sampler import BlockDiffusionSampler
    from vllm_unmask.engine.scheduler import BlockDiffusionScheduler
    from vllm_unmask.families.sdar import SDARForCausalLM

    parts.time(SDARForCausalLM, "forward", "forward")
    parts.time(SDARForCausalLM, "logits", "compute_logits")
    parts.time(BlockDiffusionSampler, "sampler", "__call__")
    state = ("add_request", "remove_request", "apply_staged_writes")
    parts.time(
        BlockDiffusionModelState, "canvas", "prepare_inputs", "prepare_attn", *state
    )
    step = ("constrain", "constraints", "constrain_draft", "verify", "first_live")
    parts.time(GrammarStep, "grammar", *step)
    parts.time(Grammars, "grammar", "add_request", "members", "silence")
    # Those of the subclass that extend one of vLLM's call it in the middle.
    extended = [
        name
        for name, method in vars(BlockDiffusionScheduler).items()
        if callable(method) and name in vars(Scheduler) and name != "__init__"
    ]
    parts.time(Scheduler, "scheduler, vLLM", *extended)
    own = [n for n, x in vars(BlockDiffusionScheduler).items() if callable(x)]
    own.remove("__init__")
    parts.time(BlockDiffusionScheduler, "scheduler, plugin", *own)


class Worker:
    """Inside the process of one model."""

    def __init__(self, model: Path, threads: int, requests: int) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(model),
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=requests,
            kv_cache_memory_bytes=256 << 20,
            enable_prefix_caching=False,
        )
        self.requests = requests
        self.num_added = 0
        self.parts = Parts(time.thread_time if threads == 1 else time.perf_counter)
        instrument(self.parts)

    def measure(self, mode: str, max_tokens: int) -> tuple[int, dict[str, float]]:
        """Steps in which all requests denoised, and seconds of each part in them."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        options = dict(MODES[mode])
        structured = None
        if options.pop("grammar", False):
            structured = StructuredOutputsParams(json=SCHEMA)
        engine = self.llm.llm_engine
        prompt = self.llm.get_tokenizer().encode("Describe somebody. " * 8)[:40]
        for index in range(self.requests):
            params = SamplingParams(
                temperature=options.get("temperature", 0.0),
                top_p=options.get("top_p", 1.0),
                seed=index,
                max_tokens=max_tokens,
                ignore_eos=structured is None,
                extra_args={"unmask_strategy": "threshold"},
                structured_outputs=structured,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self.num_added += 1
            ids = [token + index for token in prompt]
            engine.add_request(str(self.num_added), tokens_input(ids), params)
        total, steps = dict.fromkeys(PARTS, 0.0), 0
        self.parts.take()
        first, finished = True, 0
        while engine.has_unfinished_requests():
            done = [output for output in engine.step() if output.finished]
            seconds = self.parts.take()
            finished += len(done)
            # The first step has the prompts, the last one of a request its output.
            if not first and finished == 0:
                steps += 1
                total = {part: total[part] + seconds[part] for part in PARTS}
            first = False
        return steps, total


def work(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each part a step, by mode."""
    import torch

    torch.set_num_threads(args.threads)
    worker = Worker(model, args.threads, args.requests)
    sums = {mode: dict.fromkeys(PARTS, 0.0) for mode in MODES}
    counts = dict.fromkeys(MODES, 0)
    # The first round is a warm-up.
    for repeat in range(args.repeats + 1):
        for mode in MODES:
            steps, seconds = worker.measure(mode, args.max_tokens)
            if repeat:
                counts[mode] += steps
                for part, value in seconds.items():
                    sums[mode][part] += value
    return {
        mode: {
            "steps": count,
            "ms": {part: 1e3 * sums[mode][part] / count for part in PARTS},
        }
        for mode, count in counts.items()
    }


def rows_of(model: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a mode."""
    rows = []
    for mode, found in result.items():
        step = sum(found["ms"].values())
        plugin = sum(found["ms"][part] for part in PLUGIN)
        rows.append(
            {
                "model": model,
                "mode": mode,
                "steps": found["steps"],
                "step_ms": step,
                **{f"{part} ms": value for part, value in found["ms"].items()},
                "plugin_ms": plugin,
                "plugin_share": plugin / step,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The result as text."""
    heads = ("step ms", *PARTS, "plugin")
    lines = [f"{'':26}" + "".join(f"{head:>18}" for head in heads)]
    for row in rows:
        values = [f"{row['step_ms']:.2f}"]
        for part in PARTS:
            value = row[f"{part} ms"]
            values.append(f"{value:.2f} ({value / row['step_ms']:.1%})")
        values.append(f"{row['plugin_ms']:.2f} ({row['plugin_share']:.1%})")
        name = f"{row['model']}, {row['mode']}"
        lines.append(f"{name:26}" + "".join(f"{value:>18}" for value in values))
    return "\n".join(lines) + "\n"


def run(model: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure one model in a process of its own."""
    result, log = folder / "result.json", folder / "engine.log"
    command = [sys.executable, str(HERE / "step_profile.py"), "--worker", str(model)]
    command += ["--json", str(result), "--threads", str(args.threads)]
    for name in ("repeats", "requests", "max_tokens"):
        value = getattr(args, name)
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = ENVIRONMENT | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(args.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with log.open("wb") as stream:
        done = subprocess.run(
            command, env=os.environ | environment, stdout=stream, stderr=stream
        )
    if done.returncode:
        tail = log.read_text(errors="replace").splitlines()[-40:]
        raise RuntimeError("\n".join([*tail, f"step_profile: {model.name} failed"]))
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model for the large one",
    )
    parser.add_argument("--repeats", type=int, help="default 2, or 1 with --quick")
    parser.add_argument("--max-tokens", type=int, help="default 64, or 48 with --quick")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument(
        "--models", choices=("demo", "large"), nargs="+", default=["demo", "large"]
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 2)
    args.max_tokens = args.max_tokens or (48 if args.quick else 64)
    if args.worker:
        found = work(args.worker, args)
        args.json.write_text(json.dumps(found), encoding="utf-8")
        return 0
    from large_vocabulary import write_model

    load = load_average()
    large = "tiny" if args.quick else "100M"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / large, DEMO / "sdar", SIZES[large])
        folders = {"demo": DEMO / "sdar", "large": folder / large}
        for kind in args.models:
            model, label = folders[kind], large if kind == "large" else kind
            say(f"{label}, {args.requests} requests")
            try:
                rows += rows_of(label, run(model, args, folder))
            except RuntimeError as error:
                sys.stderr.write(f"{error}\n")
                return 1
    environment = surroundings(
        load,
        versions={"vllm": version("vllm")},
        threads=args.threads,
        repeats=args.repeats,
        requests=args.requests,
        sizes=SIZES[large],
    )
    if args.json:
        result = {"rows": rows, "target": TARGET, "environment": environment}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
