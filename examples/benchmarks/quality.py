# SPDX-License-Identifier: Apache-2.0
"""Quality and parallelism of every strategy, and what composing them adds.

Runs presets, fillers over their main option and compositions (`quality_grid`) on the
demo model's held-out tasks, or any checkpoint on prompts of yours: JSON lines with
`prompt` and `answer`, and perhaps `task`. Every request is greedy.

Tokens per forward: output tokens, stop token included, over denoising steps of
requests. Intervals are 95 % bootstrap intervals over prompts; differences to the
threshold rule at its default are paired by prompt. Tokens per second are indicative
only: one run each, traces on, on a machine that may do other work.

The question is whether a composition gives 15 % more tokens per forward than the
threshold rule at no less exact match. Choosing the best of many rows flatters it, so
those that do best are run again, with the threshold rule, on held-out prompts that
chose nothing (`confirmation`).
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo_model"
# Not a package: the tests import this file by its path.
sys.path[:0] = [str(HERE), str(DEMO)]

from closed_loop import ENVIRONMENT, MAX_CONCURRENCY, MAX_TOKENS, settings  # noqa: E402
from machine import load_average, say, surroundings  # noqa: E402
from quality_engine import Answers, Engine, Serve, Server  # noqa: E402
from quality_grid import Config, grid  # noqa: E402
from quality_numbers import ALL, Outcome, pareto_front, row  # noqa: E402
from quality_report import finalists, held, question, summary, written  # noqa: E402
from tasks import check  # noqa: E402

from vllm_unmask.presets import FILLERS, PRESETS  # noqa: E402

Record = dict[str, str]
Checker = Callable[[Record, str], bool]
# Prompts of each task, of json and of every other one; the rest may confirm.
QUICK_SIZE = (24, 8)
SIZE = (120, 20)
LEARNT = "learnt"
# What the demo model's card says that it learnt.
LEARNT_TASKS = {"json", "copy", "reverse", "paraphrase"}


def check_demo(record: Record, text: str) -> bool:
    """The checker of the record's task."""
    return check(record["task"], record["prompt"], record["answer"], text)


def check_text(record: Record, text: str) -> bool:
    """Whether the text is the answer."""
    return text == record["answer"]


def read(path: Path) -> list[Record]:
    """Records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def demo_records(quick: bool) -> tuple[list[Record], list[Record]]:
    """Held-out records to choose by and others to confirm with, by task."""
    first, rest = [], []
    json_count, count = QUICK_SIZE if quick else SIZE
    for task, members in groupby(read(DEMO / "held_out.jsonl"), lambda r: r["task"]):
        records = list(members)
        cut = json_count if task == "json" else count
        first += records[:cut]
        rest += records[cut : 2 * cut] if quick else records[cut:]
    return first, rest


def groups_of(records: Sequence[Record]) -> dict[str, Any]:
    """Name -> indices of records: each task, those learnt, all."""
    tasks = np.array([record.get("task", ALL) for record in records])
    groups = {str(task): np.flatnonzero(tasks == task) for task in dict.fromkeys(tasks)}
    if groups.keys() > LEARNT_TASKS:
        groups[LEARNT] = np.flatnonzero([task in LEARNT_TASKS for task in tasks])
    return {**groups, ALL: np.arange(len(records))}


def outcome_of(records: Sequence[Record], served: Answers, checker: Checker) -> Outcome:
    """Answers, judged."""
    pairs = zip(records, served.answers, strict=True)
    right = [bool(checker(record, answer.text)) for record, answer in pairs]
    _, *columns = zip(*served.answers, strict=True)
    tokens, forwards, blocks, single = (np.array(c, dtype=float) for c in columns)
    return Outcome(
        right=np.array(right, dtype=float),
        tokens=tokens,
        forwards=forwards,
        blocks=blocks,
        single=single,
        rows=served.rows,
        seconds=served.seconds,
    )


class Bench:
    """Measurements on one list of records.

    Args:
        serve: answers prompts.
        checker: says whether a text answers a record.
        records: what is asked.
    """

    def __init__(
        self, serve: Serve, checker: Checker, records: Sequence[Record]
    ) -> None:
        self.serve = serve
        self.checker = checker
        self.records = records
        self.groups = groups_of(records)
        # What the question is asked of.
        self.asked = [name for name in (ALL, LEARNT, "json") if name in self.groups]
        self.baseline: Outcome | None = None
        self.rows: list[dict[str, Any]] = []
        self.refused: dict[str, str] = {}

    def run(self, configs: Sequence[Config]) -> None:
        """Measure every configuration, the baseline first."""
        prompts = [record["prompt"] for record in self.records]
        # Unmeasured: an engine prepares some things at first use only.
        self.serve(prompts[:4], configs[0].extra_args)
        for config in configs:
            try:
                served = self.serve(prompts, config.extra_args)
            except ValueError as error:
                if self.baseline is None:
                    raise
                # A server without a filter refuses `learned`, say.
                self.refused[config.label] = str(error)[:300]
                say(f"{config.label}: refused")
                continue
            outcome = outcome_of(self.records, served, self.checker)
            self.baseline = self.baseline or outcome
            self.rows.append(
                row(config, outcome, self.baseline, self.groups, self.asked)
            )
            share, speed = outcome.right.mean(), self.rows[-1]["tokens_per_forward"]
            say(f"{config.label}: {share:.3f} {speed:.2f} {served.seconds:.1f} s")


def about(bench: Bench) -> dict[str, Any]:
    """What was measured on one list of records."""
    return {
        "prompts": {name: len(members) for name, members in bench.groups.items()},
        "refused": bench.refused,
        "rows": bench.rows,
    }


def assemble(
    bench: Bench, confirmation: Bench | None, environment: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON object."""
    verdicts = {group: question(bench.rows, group) for group in bench.asked}
    again = None
    if confirmation is not None:
        again = about(confirmation) | {
            "question": {
                group: question(confirmation.rows, group, found["composition"]["label"])
                for group, found in verdicts.items()
                if found["composition"]
            },
            "held": {
                group: held(bench.rows, confirmation.rows, group)
                for group in bench.asked
            },
        }
    points = [(r["tokens_per_forward"], r["exact_match"][ALL]) for r in bench.rows]
    front = [bench.rows[i]["label"] for i in pareto_front(points)]
    return {
        **about(bench),
        "question": verdicts,
        "front": front,
        "confirmation": again,
        "environment": environment,
    }


def start(args: argparse.Namespace) -> Engine | Server:
    """The engine or server that the arguments name."""
    if args.url:
        return Server(args.url, args.max_tokens)
    os.environ.update(ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    options = settings(DEMO / "sdar", eager=True) | {"dtype": "float32"}
    if args.model:
        options = {
            "model": args.model,
            "max_num_seqs": MAX_CONCURRENCY,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
        }
    return Engine(options | json.loads(args.engine), args.max_tokens)


def load_checker(name: str) -> Checker:
    """A function from its module and name, MODULE:FUNCTION."""
    module, _, function = name.partition(":")
    checker: Checker = getattr(importlib.import_module(module), function)
    return checker


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, required=True, help="write the result here"
    )
    parser.add_argument("--plot", type=Path, help="draw it here (PNG)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer prompts and choices"
    )
    parser.add_argument(
        "--presets",
        nargs="+",
        metavar="STRATEGY",
        help=f"only these: of {', '.join([*FILLERS, *PRESETS])}, joined by +",
    )
    parser.add_argument("--model", help="checkpoint (default: the demo model)")
    parser.add_argument(
        "--engine", default="{}", help="more options of vLLM's LLM, a JSON object"
    )
    parser.add_argument("--url", help="ask a running server, as http://host:port")
    parser.add_argument(
        "--prompts", type=Path, help="JSON lines (default: the held-out tasks)"
    )
    parser.add_argument(
        "--checker",
        metavar="MODULE:FUNCTION",
        help="takes a record and a text, returns whether it is right (default: the "
        "text is the record's answer)",
    )
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    args = parser.parse_args()
    checker: Checker = check_text if args.prompts else check_demo
    if args.checker:
        checker = load_checker(args.checker)
    first, rest = (read(args.prompts), []) if args.prompts else demo_records(args.quick)
    load = load_average()
    engine = start(args)
    bench = Bench(engine.serve, checker, first)
    bench.run(grid(args.quick, args.presets))
    confirmation = None
    if rest:
        confirmation = Bench(engine.serve, checker, rest)
        confirmation.run(finalists(bench.rows, bench.asked))
    facts = engine.describe()
    versions = facts.pop("versions")
    environment = surroundings(
        load, versions=versions, engine=facts, max_tokens=args.max_tokens
    )
    result = assemble(bench, confirmation, environment)
    args.json.write_text(written(result), encoding="utf-8")
    sys.stdout.write(summary(result))
    if args.plot:
        from quality_plot import plot

        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
