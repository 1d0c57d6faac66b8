# SPDX-License-Identifier: Apache-2.0
"""Throughput of the demo model through this plugin and of its twin on stock vLLM.

Both are the same network of the same size, trained on the same data: the demo model
unmasks blocks, its twin is autoregressive and runs with the plugin switched off. A
plain torch loop decodes the demo model as SDAR's authors do, one prompt at a time.
Each engine lives in a process of its own and the measurements take turns, so that
whatever else the machine does hits both. Every request is greedy and ends at the
stop token; prompts are from the held-out JSON task.

tokens_per_forward counts output tokens (stop token included) by the forward passes
of a request that yield output, rows_per_token the rows computed in them. Prompt
processing is in tokens_per_second and ms_per_forward, but not in these two.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo_model"
# Not a package: the engines' processes and the tests import this file by its path.
sys.path[:0] = [str(HERE), str(DEMO)]

from closed_loop import (  # noqa: E402
    MAX_CONCURRENCY,
    MAX_TOKENS,
    SETTLE_SECONDS,
    Engine,
    Loop,
    settings,
)
from machine import load_average, say, surroundings  # noqa: E402
from tasks import check  # noqa: E402
from throughput_plot import plot  # noqa: E402
from throughput_variants import (  # noqa: E402
    AR,
    RULE,
    THRESHOLD,
    TORCH,
    UNMASK,
    Variant,
    variants,
)
from torch_loop import TorchLoop  # noqa: E402

CONCURRENCIES = (1, 4, 16)
# Requests that run together to outputs of so many tokens, one token a step.
GROWING, LONG_OUTPUT = 8, 384


class Sample(NamedTuple):
    """One measurement of one variant."""

    variant: Variant
    concurrency: int
    repeat: int
    seconds: float
    engine_steps: int
    forwards: int
    rows: int
    tokens: int
    requests: int
    right: int

    @property
    def speed(self) -> float:
        """Output tokens per second."""
        return self.tokens / self.seconds


def num_prompts(concurrency: int, quick: bool) -> int:
    """Prompts in one measurement: eight for each request in flight, and some at least.

    With few, what is measured is how an engine wakes up and how its last requests end.
    """
    return max(48, 8 * concurrency) * (1 if quick else 2)


def row(samples: Sequence[Sample]) -> dict[str, Any]:
    """One row: the samples of one variant at one concurrency."""
    first = samples[0]
    speeds = [sample.speed for sample in samples]
    tokens = sum(sample.tokens for sample in samples)
    requests = sum(sample.requests for sample in samples)
    return {
        "system": first.variant.system,
        "strategy": first.variant.strategy,
        "threshold": first.variant.threshold,
        "concurrency": first.concurrency,
        "tokens_per_second": median(speeds),
        "tokens_per_second_min": min(speeds),
        "tokens_per_second_max": max(speeds),
        "tokens_per_forward": tokens / sum(sample.forwards for sample in samples),
        "rows_per_token": sum(sample.rows for sample in samples) / tokens,
        "ms_per_forward": median(1e3 * s.seconds / s.engine_steps for s in samples),
        "exact_match": sum(sample.right for sample in samples) / requests,
        "requests": requests,
        "repeats": len(samples),
    }


def growth(steps: Sequence[Sequence[float]]) -> dict[str, float]:
    """Milliseconds of a step in each quarter of outputs that grow, and last by first.

    Args:
        steps: seconds of the steps, of each repeat. Prompts are in the first tenth.
    """
    quarters: list[list[float]] = [[] for _ in range(4)]
    for seconds in steps:
        alone = seconds[len(seconds) // 10 :]
        for index, quarter in enumerate(quarters):
            begin, end = (len(alone) * n // 4 for n in (index, index + 1))
            quarter.append(median(alone[begin:end]))
    ms = {f"ms_quarter_{n}": 1e3 * median(q) for n, q in enumerate(quarters, 1)}
    ratios = [
        last / first for first, last in zip(quarters[0], quarters[3], strict=True)
    ]
    return ms | {"last_over_first": median(ratios)}


def assemble(samples: Iterable[Sample], environment: dict[str, Any]) -> dict[str, Any]:
    """The JSON object: rows, ratios and where they were measured.

    A ratio is the median over repeats of the tokens per second at threshold 0.9
    over those of the autoregressive twin, or of the torch loop, in the same repeat.
    """
    groups: dict[tuple[Variant, int], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.variant, sample.concurrency), []).append(sample)
    result: dict[str, Any] = {"rows": [row(group) for group in groups.values()]}
    for key, base in (("", Variant(AR)), ("torch_", Variant(TORCH, *RULE))):
        ratios, ranges = _ratios(groups, base)
        result |= {f"{key}ratios": ratios, f"{key}ratio_ranges": ranges}
    return result | {"environment": environment}


def _ratios(
    groups: dict[tuple[Variant, int], list[Sample]], base: Variant
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Concurrency -> median, and smallest and largest, of what is over ``base``.

    The torch loop has no concurrency: its only measurement stands for all.
    """
    ratios, ranges = {}, {}
    alone = [key for key in groups if key[0] == base]
    for (variant, concurrency), group in groups.items():
        known = groups.get((base, concurrency))
        if known is None and base.system == TORCH and alone:
            known = groups[alone[0]]
        if variant != Variant(UNMASK, *RULE) or known is None:
            continue
        speed_of = {sample.repeat: sample.speed for sample in known}
        paired = [s.speed / speed_of[s.repeat] for s in group if s.repeat in speed_of]
        ratios[str(concurrency)] = median(paired)
        ranges[str(concurrency)] = [min(paired), max(paired)]
    return ratios, ranges


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    head = ("", "requests", "tokens/s", "min-max", "tokens/", "rows/", "ms/", "exact")
    units = ("", "in flight", "", "", "forward", "token", "forward", "match")
    lines = [head, units]
    for item in result["rows"]:
        variant = Variant(item["system"], item["strategy"], item["threshold"])
        span = (
            f"{item['tokens_per_second_min']:.0f}-{item['tokens_per_second_max']:.0f}"
        )
        lines.append(
            (
                variant.label,
                str(item["concurrency"]),
                f"{item['tokens_per_second']:.0f}",
                span,
                f"{item['tokens_per_forward']:.2f}",
                f"{item['rows_per_token']:.2f}",
                f"{item['ms_per_forward']:.2f}",
                f"{item['exact_match']:.3f}",
            )
        )
    width = max(len(line[0]) for line in lines)
    text = [
        f"{line[0]:{width}}" + "".join(f"{x:>12}" for x in line[1:]) for line in lines
    ]
    for key, base in (("", AR), ("torch_", TORCH)):
        for concurrency, ratio in result[f"{key}ratios"].items():
            low, high = result[f"{key}ratio_ranges"][concurrency]
            text.append(
                f"{UNMASK} at threshold {THRESHOLD:g} over {base}, {concurrency} in "
                f"flight: {ratio:.2f} times the tokens per second "
                f"({low:.2f}-{high:.2f})"
            )
    for system, found in result.get("growth", {}).items():
        text.append(
            f"{system}, {GROWING} in flight, outputs of {LONG_OUTPUT} tokens: a step "
            f"takes {found['ms_quarter_1']:.2f} ms in the first quarter, "
            f"{found['ms_quarter_4']:.2f} ms in the last"
        )
    return "\n".join(text) + "\n"


def measure(
    engine: Engine,
    variant: Variant,
    concurrency: int,
    repeat: int,
    examples: Sequence[dict[str, str]],
) -> Sample:
    """One measurement, its outputs checked."""
    prompts = [example["prompt"] for example in examples]
    result = engine.call("measure", prompts, concurrency, variant.extra_args)
    right = sum(
        check(example["task"], example["prompt"], example["answer"], output.text)
        for example, output in zip(examples, result.outputs, strict=True)
    )
    return Sample(
        variant=variant,
        concurrency=concurrency,
        repeat=repeat,
        seconds=result.seconds,
        engine_steps=result.engine_steps,
        forwards=result.forwards,
        rows=result.rows,
        tokens=sum(output.tokens for output in result.outputs),
        requests=len(examples),
        right=right,
    )


class Mode(NamedTuple):
    """A way to run an engine."""

    forward: str  # "eager" or "compiled"
    threads: int | None  # of OpenMP; None: vLLM's default

    @property
    def label(self) -> str:
        if self.threads is None:
            return self.forward
        return f"{self.forward}, {self.threads} threads"

    @property
    def environment(self) -> dict[str, str]:
        if self.threads is None:
            return {}
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }


def start_fastest(
    variant: Variant,
    model: Path,
    modes: Sequence[Mode],
    environment: dict[str, str],
    examples: Sequence[dict[str, str]],
    concurrencies: Sequence[int],
    log: Path,
) -> tuple[Engine, dict[str, Any]]:
    """Start a system's engine in each mode and keep the fastest."""
    best: Engine | None = None
    facts: dict[str, Any] = {}
    trial: dict[str, Any] = {}
    for mode in modes:
        say(f"starting {variant.system}, {mode.label}")
        try:
            most = max(*concurrencies, MAX_CONCURRENCY)
            engine = Engine(
                settings(model, mode.forward == "eager", most),
                environment=environment | mode.environment,
                log=log,
                loop_type=TorchLoop if variant.system == TORCH else Loop,
            )
            # Unmeasured: the engine prepares some things at first use only.
            for concurrency in concurrencies:
                measure(engine, variant, concurrency, 0, examples[:16])
        except RuntimeError as error:
            # Compiling needs a C++ compiler, which not every machine has.
            trial[mode.label] = str(error).strip().splitlines()[-1]
            if mode == modes[-1] and best is None:
                raise
            continue
        speed = median(
            measure(engine, variant, 4, 0, examples[:16]).speed for _ in range(3)
        )
        trial[mode.label] = speed
        if best is not None and speed <= trial[facts["mode"]]:
            engine.close()
            continue
        if best is not None:
            best.close()
        best, facts = engine, {"mode": mode.label}
    assert best is not None
    return best, best.facts | facts | {"trial_tokens_per_second": trial}


def run(args: argparse.Namespace, log: Path) -> dict[str, Any]:
    with (DEMO / "held_out.jsonl").open(encoding="utf-8") as file:
        examples = [json.loads(line) for line in file]
    examples = [example for example in examples if example["task"] == "json"]
    counts = {c: num_prompts(c, args.quick) for c in sorted(args.concurrencies)}
    repeats = args.repeats or (3 if args.quick else 5)
    forwards = ("eager", "compiled") if args.mode == "auto" else (args.mode,)
    modes = [Mode(*mode) for mode in product(forwards, args.threads)]
    alone = [Mode("eager", threads) for threads in args.threads]
    layout = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if args.one_process else "1"}
    load = load_average()
    engines: dict[str, Engine] = {}
    facts: dict[str, dict[str, Any]] = {}
    try:
        for variant, folder, environment in (
            (Variant(AR), "ar", {"UNMASK_DISABLE": "1"}),
            (Variant(UNMASK, *RULE), args.diffusion, {"UNMASK_DISABLE": ""}),
            (Variant(TORCH, *RULE), args.diffusion, {"UNMASK_DISABLE": "1"}),
        ):
            system = variant.system
            engines[system], facts[system] = start_fastest(
                variant,
                (args.models / folder).resolve(),
                alone if system == TORCH else modes,
                layout | environment,
                examples,
                tuple(counts),
                log,
            )
        samples: list[Sample] = []
        prompts = [example["prompt"] for example in examples[:GROWING]]
        grown: dict[str, list[list[float]]] = {AR: [], UNMASK: []}
        for repeat in range(repeats):
            say(f"repeat {repeat + 1} of {repeats}")
            for concurrency, count in counts.items():
                # Other prompts in every repeat, the same for every variant.
                first = repeat * count % len(examples)
                chosen = (examples[first:] + examples[:first])[:count]
                measured = variants(args.quick)
                if concurrency == min(counts):
                    measured.insert(0, Variant(TORCH, *RULE))
                for variant in measured:
                    engine = engines[variant.system]
                    if not samples or samples[-1].variant.system != variant.system:
                        time.sleep(SETTLE_SECONDS)
                    samples.append(
                        measure(engine, variant, concurrency, repeat, chosen)
                    )
            for variant in (Variant(AR), Variant(UNMASK, "static")):
                time.sleep(SETTLE_SECONDS)
                grown[variant.system].append(
                    engines[variant.system].call(
                        "step_seconds", prompts, LONG_OUTPUT, variant.extra_args
                    )
                )
    finally:
        for engine in engines.values():
            engine.close()
    versions, *_ = [fact.pop("versions") for fact in facts.values()]
    environment = surroundings(
        load,
        versions=versions,
        engines=facts,
        prompts={str(concurrency): count for concurrency, count in counts.items()},
        repeats=repeats,
        diffusion_model=args.diffusion,
        max_tokens=MAX_TOKENS,
    )
    found = {system: growth(steps) for system, steps in grown.items()}
    return assemble(samples, environment) | {"growth": found}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, required=True, help="write the result here"
    )
    parser.add_argument("--plot", type=Path, help="draw it here (PNG)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer prompts, repeats and thresholds"
    )
    parser.add_argument("--repeats", type=int, help="default 5, or 3 with --quick")
    parser.add_argument(
        "--mode",
        choices=("auto", "eager", "compiled"),
        default="auto",
        help="forward pass of both; auto (default): whichever is faster for each",
    )
    parser.add_argument(
        "--one-process",
        action="store_true",
        help="front end, engine core and worker of an engine in one process, instead "
        "of vLLM's default",
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[None],
        help="OpenMP threads of an engine (default: vLLM's); of several the fastest "
        "for each",
    )
    parser.add_argument(
        "--models", type=Path, default=DEMO, help="folder that holds both models"
    )
    parser.add_argument(
        "--diffusion", default="sdar", help="name of the block-diffusion model there"
    )
    parser.add_argument(
        "--concurrencies",
        type=int,
        nargs="+",
        default=CONCURRENCIES,
        help="requests in flight (default: %(default)s)",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "engines.log"
        try:
            result = run(args, log)
        except RuntimeError as error:
            tail = log.read_text(errors="replace").splitlines()[-40:]
            sys.stderr.write("\n".join([*tail, f"throughput: {error}", ""]))
            return 1
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(result))
    if args.plot:
        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
