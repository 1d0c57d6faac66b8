# SPDX-License-Identifier: Apache-2.0
"""Self-speculation on the demo model: forwards, speed, and what verification is worth.

`rows` are presets at 1, 4 and 16 requests in flight, on held-out prompts of all tasks,
greedy. `freedave` gives the output of the rule that it is added to: `identical` is the
share of answers that are equal to that rule's. "adaptive" is a server that
speculates as far as that has been paying, as servers do unless told otherwise; the
others have `adaptive_candidates` off, which saves most forwards and costs most rows.
Presets take turns, so that whatever else the machine does hits all of them; ratios
are medians over repeats, paired.

`frontier` is exact match against tokens per forward where several answers are right,
for threshold decoding and S2D2 (`speculation_frontier`).

A forward counts once for every request in it, and all of its token rows count,
candidates and drafts included. Prompt processing is in tokens_per_second only.
acceptance: with freedave the candidates that a denoising step took over all that were
forwarded, with s2d2 the tokens that passed over all that were verified.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo_model"
# Not a package: the engines' processes and the tests import this file by its path.
sys.path[:0] = [str(HERE), str(DEMO)]

from closed_loop import MAX_CONCURRENCY, MAX_TOKENS  # noqa: E402
from machine import load_average, say, surroundings  # noqa: E402
from quality import Record, demo_records, read  # noqa: E402
from quality_report import rounded  # noqa: E402
from speculation_frontier import (  # noqa: E402
    Point,
    configs,
    point_of,
    prompts_of,
    sentence,
    verdict,
)
from speculation_frontier import row as frontier_row  # noqa: E402
from speculation_loop import SpeculationEngine  # noqa: E402
from speculation_rows import (  # noqa: E402
    ADAPTIVE,
    CAUSAL,
    FIXED,
    PRESETS,
    SERVERS,
    STATIC,
    Preset,
    Sample,
    row,
    table,
)
from tasks import check  # noqa: E402
from throughput import CONCURRENCIES  # noqa: E402

# (prompts of a repeat, repeats, prompts of each task of the frontier)
QUICK_SIZE = (14, 3, 12)
SIZE = (60, 5, 60)


class Bench:
    """Engines and what they have been asked.

    Args:
        args: of the command line.
        log: file that takes what engines write.
    """

    def __init__(self, args: argparse.Namespace, log: Path) -> None:
        self.args = args
        self.load = load_average()
        wanted = {preset.server for preset in args.presets}
        wanted |= {FIXED, CAUSAL} if args.temperatures else set()
        self.engines = {
            name: SpeculationEngine(DEMO / "sdar", SERVERS[name], args.threads, log)
            for name in SERVERS
            if name in wanted
        }

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()

    def measure(
        self, preset: Preset, concurrency: int, records: Sequence[Record]
    ) -> Sample:
        """One measurement, its outputs checked."""
        prompts = [record["prompt"] for record in records]
        engine = self.engines[preset.server]
        measured = engine.closed(prompts, concurrency, preset.extra_args)
        pairs = zip(records, measured.outputs, strict=True)
        right = sum(
            check(r["task"], r["prompt"], r["answer"], output.text)
            for r, output in pairs
        )
        return Sample(measured, right)

    def rows(self) -> list[dict[str, Any]]:
        """Every preset at every concurrency."""
        args = self.args
        records, _ = demo_records(args.quick)
        random.Random(0).shuffle(records)
        # Unmeasured: an engine prepares some things at first use only, and an adaptive
        # one learns from as many requests as it will be measured with.
        for preset in args.presets:
            if preset.server not in ADAPTIVE:
                self.measure(preset, max(args.concurrency), records[:8])
                continue
            for concurrency in args.concurrency:
                self.measure(
                    preset, concurrency, records[: args.prompts * args.repeats]
                )
        samples: dict[tuple[str, int], list[Sample]] = {}
        for repeat in range(args.repeats):
            say(f"repeat {repeat + 1} of {args.repeats}")
            # Other prompts in every repeat, the same for all presets.
            first = repeat * args.prompts % len(records)
            chosen = (records[first:] + records[:first])[: args.prompts]
            for concurrency in args.concurrency:
                for preset in args.presets:
                    sample = self.measure(preset, concurrency, chosen)
                    samples.setdefault((preset.name, concurrency), []).append(sample)
        return [row(p, c, samples) for c in args.concurrency for p in args.presets]

    def frontier(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of the frontier, and what follows at each temperature."""
        records = prompts_of(read(DEMO / "held_out.jsonl"), self.args.frontier_prompts)
        prompts = [record["prompt"] for record in records]
        points: list[Point] = []
        say(f"frontier at {len(self.args.temperatures)} temperatures")
        for config in configs(self.args.temperatures, self.args.quick):
            name = CAUSAL if config.causal_kv else FIXED
            measured = self.engines[name].sampled(
                prompts, config.temperature, config.extra_args
            )
            points.append(point_of(config, records, measured, check))
        found = [verdict(points, temperature) for temperature in self.args.temperatures]
        return [frontier_row(p, records) for p in points], [f for f in found if f]

    def environment(self) -> dict[str, Any]:
        """Where and how the numbers were measured."""
        args = self.args
        facts = {name: dict(engine.facts) for name, engine in self.engines.items()}
        versions = [of.pop("versions") for of in facts.values()][0]
        return surroundings(
            self.load,
            versions=versions,
            threads=args.threads,
            engines=facts,
            prompts=args.prompts,
            repeats=args.repeats,
            frontier_prompts_of_a_task=args.frontier_prompts,
            max_tokens=MAX_TOKENS,
            frontier_requests_in_flight=MAX_CONCURRENCY,
        )


def run(args: argparse.Namespace, log: Path) -> dict[str, Any]:
    """The JSON object."""
    bench = Bench(args, log)
    try:
        rows = bench.rows()
        frontier, verdicts = bench.frontier()
        environment = bench.environment()
    finally:
        bench.close()
    conclusions = [sentence(found) for found in verdicts]
    return {
        "rows": rows,
        "frontier": frontier,
        "verdicts": verdicts,
        "conclusions": conclusions,
        "environment": environment,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, required=True, help="write the result here"
    )
    parser.add_argument("--plot", type=Path, help="draw it here (PNG)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer prompts and repeats, greedy only"
    )
    parser.add_argument("--prompts", type=int, help="of a repeat: 60, quick 14")
    parser.add_argument("--repeats", type=int, help="5, quick 3")
    parser.add_argument(
        "--frontier-prompts", type=int, help="of each task: 60, quick 12"
    )
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="*",
        help="of the frontier: 0 and 1, quick 0; none: no frontier",
    )
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=[preset.name for preset in PRESETS],
        default=[preset.name for preset in PRESETS],
        help="of the rows, static and threshold besides",
    )
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=list(CONCURRENCIES)
    )
    parser.add_argument("--threads", type=int, default=1, help="of OpenMP, default 1")
    args = parser.parse_args(arguments)
    names = {STATIC, *args.presets}
    names |= {preset.base for preset in PRESETS if preset.name in names}
    args.presets = [preset for preset in PRESETS if preset.name in names]
    prompts, repeats, of_a_task = QUICK_SIZE if args.quick else SIZE
    args.prompts = args.prompts or prompts
    args.repeats = args.repeats or repeats
    args.frontier_prompts = args.frontier_prompts or of_a_task
    if args.temperatures is None:
        args.temperatures = [0.0] if args.quick else [0.0, 1.0]
    return args


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "engines.log"
        try:
            result = run(args, log)
        except RuntimeError as error:
            tail = log.read_text(errors="replace").splitlines()[-40:]
            sys.stderr.write("\n".join([*tail, f"speculation: {error}", ""]))
            return 1
    text = json.dumps(rounded(result)).replace('{"preset": ', '\n{"preset": ')
    args.json.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write("\n".join([table(result["rows"]), *result["conclusions"], ""]))
    if args.plot:
        from speculation_plot import plot

        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
