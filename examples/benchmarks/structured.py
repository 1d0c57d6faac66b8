# SPDX-License-Identifier: Apache-2.0
"""Structured output: how valid, how parallel and how fast it is.

Modes: `unconstrained` and `fv`, requests of one server of this plugin without and
with a schema; `fv_no_guard`, a server whose outputs may be cut off by max_tokens;
`ar_xgrammar`, the autoregressive twin on stock vLLM with its own xgrammar backend and
the plugin switched off.

Tasks: `demo`, held-out records, each with the schema of its answer; `real`, schemas
of installed packages (`schema_corpus`), which no model here was trained on. Budgets:
`normal`, and `tight`, the shortest output that the schema allows and 30 % more. The
vocabulary is the demo model's of 512 tokens, or one of 150,000 under random weights.

Every request is greedy, at threshold 0.9. An output is valid if a new matcher takes
all of it and it parses, schema_valid if jsonschema agrees. Compiling a schema is not
in the numbers: all are compiled before. grammar_us is the processor time on the host
for one request in one step.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo_model"
# Not a package: the engines' processes and the tests import this file by its path.
sys.path[:0] = [str(HERE), str(DEMO)]

import schema_corpus  # noqa: E402
from closed_loop import MAX_TOKENS  # noqa: E402
from machine import load_average, say, surroundings  # noqa: E402
from structured_loop import (  # noqa: E402
    Answer,
    Measurement,
    Request,
    StructuredEngine,
)
from tasks import check  # noqa: E402

MODES = ("unconstrained", "fv", "fv_no_guard", "ar_xgrammar")
BUDGETS = ("normal", "tight")
THRESHOLD = 0.9
# What one task takes: (schemas with --quick, schemas).
SIZES = {"demo": (32, 160), "real": (32, 160), "large": (12, 60)}
# Longest shortest output; with twice that an answer still fits into the context.
MAX_CLOSING = 320
# What must hold: a name, a comparison, a bound.
REQUIREMENTS = (
    ("exact match over unconstrained", ">=", 1.0),
    ("tokens per forward over unconstrained", ">=", 0.9),
    ("tokens per second over unconstrained", ">=", 0.9),
    ("grammar us at 150,000 tokens, p50", "<=", 150.0),
    ("grammar us at 150,000 tokens, p99", "<=", 1000.0),
)


class Case(NamedTuple):
    """One prompt of a task."""

    prompt: str
    schema: str
    answer: dict[str, str] | None = None  # the held-out record


class Key(NamedTuple):
    """What a row is about."""

    task: str
    vocabulary: int
    budget: str
    mode: str


class Sample(NamedTuple):
    """One measurement."""

    refused: int
    result: Measurement
    verdicts: list[tuple[bool, bool, bool]]  # valid, schema_valid, right


def schema_of(answer: str) -> dict[str, Any]:
    """The JSON Schema of a record: its keys in order, all required, and their types."""
    names = {str: "string", bool: "boolean", int: "integer", float: "number"}
    record = json.loads(answer)
    return {
        "type": "object",
        "properties": {k: {"type": names[type(v)]} for k, v in record.items()},
        "required": list(record),
        "additionalProperties": False,
    }


def cases(task: str, count: int) -> list[Case]:
    """The first prompts of a task."""
    lines = (DEMO / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["task"] == "json"]
    if task == "demo":
        return [
            Case(record["prompt"], json.dumps(schema_of(record["answer"])), record)
            for record in records[:count]
        ]
    schemas = schema_corpus.corpus()
    # Spread over the corpus, of which the beginning is large documents.
    schemas = schemas[:: max(len(schemas) // count, 1)][:count]
    return [
        Case(record["prompt"], schema.text)
        for record, schema in zip(records, schemas, strict=False)
    ]


def budget_of(budget: str, task: str, closing: int) -> int:
    """max_tokens of a request whose schema's shortest output has `closing` tokens."""
    if budget == "tight":
        return closing * 13 // 10
    return MAX_TOKENS if task == "demo" else 2 * closing + 64


class Checker:
    """Verdicts on outputs, by grammars compiled here."""

    def __init__(self) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher
        single = [bytes([value]) for value in range(256)] + [b""]
        info = xgrammar.TokenizerInfo(single, stop_token_ids=[256])
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)

    def verdict(self, case: Case, answer: Answer) -> tuple[bool, bool, bool]:
        """Whether an output is valid, fits its schema, and is right."""
        from jsonschema.validators import validator_for

        compiled = self._compiler.compile_json_schema(case.schema)
        matcher = self._matcher(compiled)
        valid = matcher.accept_string(answer.text) and matcher.is_completed()
        try:
            value = json.loads(answer.text)
        except ValueError:
            return False, False, False
        schema = json.loads(case.schema)
        fits = validator_for(schema)(schema).is_valid(value)
        record = case.answer
        right = record is not None and check(
            record["task"], record["prompt"], record["answer"], answer.text
        )
        return valid, fits, right


def row(key: Key, samples: Sequence[Sample]) -> dict[str, Any]:
    """One row: the samples of one mode in one setting."""
    verdicts = [verdict for sample in samples for verdict in sample.verdicts]
    results = [sample.result for sample in samples]
    tokens = [sum(answer.tokens for answer in r.answers) for r in results]
    times = sorted(us for r in results for us in r.grammar_us)

    def share(which: int) -> float:
        return sum(verdict[which] for verdict in verdicts) / len(verdicts)

    return {
        **key._asdict(),
        "schemas": len(results[0].answers),
        "refused": samples[0].refused,
        "valid": share(0),
        "schema_valid": share(1),
        "exact_match": share(2) if key.task == "demo" else None,
        "tokens_per_second": median(
            n / r.seconds for n, r in zip(tokens, results, strict=True)
        ),
        "tokens_per_forward": sum(tokens) / sum(r.forwards for r in results),
        "ms_per_forward": median(1e3 * r.seconds / r.engine_steps for r in results),
        "grammar_us_p50": quantile(times, 0.5),
        "grammar_us_p99": quantile(times, 0.99),
        "grammar_steps": len(times),
    }


def quantile(ordered: Sequence[float], part: float) -> float | None:
    """The smallest value that is not below `part` of them; None of none."""
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else None


def assemble(
    samples: dict[Key, list[Sample]], environment: dict[str, Any]
) -> dict[str, Any]:
    """The JSON object: rows, what was required of them, where they were measured."""
    order = {name: place for place, name in enumerate((*BUDGETS, *MODES))}
    keys = sorted(
        samples, key=lambda k: (k.vocabulary, k.task, order[k.budget], order[k.mode])
    )
    rows = [row(key, samples[key]) for key in keys]
    return {
        "rows": rows,
        "requirements": list(requirements(rows)),
        "environment": environment,
    }


def requirements(rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Each requirement, its value and whether it holds; None where not measured."""
    found = {
        (r["task"], r["vocabulary"] > 512, r["budget"], r["mode"]): r for r in rows
    }
    plain = found.get(("demo", False, "normal", "unconstrained"))
    ours = found.get(("demo", False, "normal", "fv"))
    large = found.get(("real", True, "normal", "fv"))
    values: list[float | None] = [None] * len(REQUIREMENTS)
    if plain and ours:
        names = ("exact_match", "tokens_per_forward", "tokens_per_second")
        values[:3] = [ours[name] / plain[name] for name in names]
    if large:
        values[3:] = [large["grammar_us_p50"], large["grammar_us_p99"]]
    for (name, sign, bound), value in zip(REQUIREMENTS, values, strict=True):
        holds = value is not None and (
            value >= bound if sign == ">=" else value <= bound
        )
        yield {
            "name": name,
            "value": value,
            "required": f"{sign} {bound:g}",
            "holds": holds if value is not None else None,
        }


COLUMNS = {
    "task": "{}",
    "vocabulary": "{:,}",
    "budget": "{}",
    "mode": "{}",
    "schemas": "{}",
    "refused": "{}",
    "valid": "{:.3f}",
    "schema_valid": "{:.3f}",
    "exact_match": "{:.3f}",
    "tokens_per_second": "{:.0f}",
    "tokens_per_forward": "{:.2f}",
    "ms_per_forward": "{:.2f}",
    "grammar_us_p50": "{:.0f}",
    "grammar_us_p99": "{:.0f}",
}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [[name.replace("_", " ") for name in COLUMNS]]
    for item in result["rows"]:
        cells = COLUMNS.items()
        lines.append(["" if item[n] is None else f.format(item[n]) for n, f in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True))
        for line in lines
    ]
    for item in result["requirements"]:
        if item["value"] is not None:
            verdict = "holds" if item["holds"] else "MISSED"
            value = f"{item['value']:.3g} ({item['required']})"
            text.append(f"{item['name']}: {value}: {verdict}")
    return "\n".join(text) + "\n"


class Setting(NamedTuple):
    """Model folders of one vocabulary, and the tasks for it."""

    vocabulary: int
    models: Path
    tasks: dict[str, list[Case]]


class Bench:
    """All measurements.

    Args:
        args: the command line.
        log: where the engines write.
    """

    def __init__(self, args: argparse.Namespace, log: Path) -> None:
        self.args = args
        self.log = log
        self.checker = Checker()
        self.load = load_average()
        self.samples: dict[Key, list[Sample]] = defaultdict(list)
        self.facts: dict[str, Any] = {}
        # Of the vocabulary that is measured: schema -> tokens of its shortest output,
        # schema -> why this plugin does not serve it.
        self.closing: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self.refusals: dict[str, dict[str, str]] = {}

    def run(self, setting: Setting) -> None:
        """Measure every mode; one engine at a time."""
        self.closing, self.refused = {}, {}
        for modes, folder, environment, options in (
            (MODES[:2], "sdar", {"UNMASK_DISABLE": ""}, {}),
            (MODES[2:3], "sdar", {"UNMASK_DISABLE": ""}, {"grammar_guard": False}),
            (MODES[3:], "ar", {"UNMASK_DISABLE": "1"}, None),
        ):
            say(f"{setting.vocabulary} tokens: starting {', '.join(modes)}")
            more: dict[str, Any] = {
                "structured_outputs_config": {"backend": "xgrammar"}
            }
            if options is not None:
                more = {"additional_config": {"unmask": options}}
            engine = StructuredEngine(
                (setting.models / folder).resolve(),
                log=self.log,
                environment=environment | {"OMP_NUM_THREADS": str(self.args.threads)},
                **more,
            )
            try:
                self.facts[f"{modes[-1]}, {setting.vocabulary}"] = engine.facts
                for task, members in setting.tasks.items():
                    self._task(engine, setting, modes, task, members)
            finally:
                engine.close()

    def _task(
        self,
        engine: StructuredEngine,
        setting: Setting,
        modes: Sequence[str],
        task: str,
        members: list[Case],
    ) -> None:
        schemas = list(dict.fromkeys(case.schema for case in members))
        if modes[0] == MODES[0]:
            for schema, found in zip(
                schemas, engine.call("shortest", schemas), strict=True
            ):
                if isinstance(found, str):
                    self.refused[schema] = found
                elif found > MAX_CLOSING:
                    self.refused[schema] = f"takes more than {MAX_CLOSING} tokens"
                else:
                    self.closing[schema] = found
        refused = {s: self.refused[s] for s in schemas if s in self.refused}
        if modes[0] != MODES[0]:
            # Only what this plugin serves is compared.
            served = [schema for schema in schemas if schema not in refused]
            reasons = zip(served, engine.call("admit", served), strict=True)
            refused |= {s: reason for s, reason in reasons if reason is not None}
        name = f"{modes[-1]}, {task}, {setting.vocabulary}"
        self.refusals[name] = {s[:80]: r[:200] for s, r in refused.items()}
        members = [case for case in members if case.schema not in refused]
        # Unmeasured: the engine prepares some things at first use only.
        engine.call("serve", self._requests(task, "tight", modes[-1], members), 4)
        for _ in range(self.args.repeats):
            for budget in BUDGETS:
                for mode in modes:
                    requests = self._requests(task, budget, mode, members)
                    result = engine.call("serve", requests, self.args.concurrency)
                    pairs = zip(members, result.answers, strict=True)
                    verdicts = [self.checker.verdict(*pair) for pair in pairs]
                    key = Key(task, setting.vocabulary, budget, mode)
                    self.samples[key].append(Sample(len(refused), result, verdicts))

    def _requests(
        self, task: str, budget: str, mode: str, members: list[Case]
    ) -> list[Request]:
        options = {"unmask_strategy": "threshold", "unmask_threshold": THRESHOLD}
        return [
            Request(
                case.prompt,
                budget_of(budget, task, self.closing[case.schema]),
                None if mode == "unconstrained" else case.schema,
                None if mode == "ar_xgrammar" else options,
            )
            for case in members
        ]

    def environment(self) -> dict[str, Any]:
        """Where and how it was measured."""
        packages = ("vllm", "xgrammar", "jsonschema")
        versions = {name: version(name) for name in packages}
        return surroundings(
            self.load,
            versions=versions | schema_corpus.versions(),
            threads=self.args.threads,
            concurrency=self.args.concurrency,
            repeats=self.args.repeats,
            threshold=THRESHOLD,
            engines=self.facts,
            refusals=self.refusals,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, required=True, help="write the result here"
    )
    parser.add_argument("--plot", type=Path, help="draw it here (PNG)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer schemas, one repeat"
    )
    parser.add_argument("--schemas", type=int, help="of each task")
    parser.add_argument("--repeats", type=int, help="default 3, or 1 with --quick")
    parser.add_argument("--concurrency", type=int, default=4, help="default 4")
    parser.add_argument("--threads", type=int, default=1, help="of OpenMP, default 1")
    parser.add_argument(
        "--vocabulary",
        choices=("both", "demo", "large"),
        default="both",
        help="the demo model's, that of 150,000 tokens, or both (default)",
    )
    args = parser.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 3)
    size = {
        task: args.schemas or sizes[0 if args.quick else 1]
        for task, sizes in SIZES.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "engines.log"
        bench = Bench(args, log)
        try:
            if args.vocabulary != "large":
                tasks = {task: cases(task, size[task]) for task in ("demo", "real")}
                bench.run(Setting(512, DEMO, tasks))
            if args.vocabulary != "demo":
                from large_vocabulary import write_model

                for kind in ("sdar", "ar"):
                    write_model(Path(folder) / kind, DEMO / kind)
                tasks = {"real": cases("real", size["large"])}
                bench.run(Setting(150_000, Path(folder), tasks))
        except RuntimeError as error:
            tail = log.read_text(errors="replace").splitlines()[-40:]
            sys.stderr.write("\n".join([*tail, f"structured: {error}", ""]))
            return 1
        result = assemble(bench.samples, bench.environment())
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(result))
    if args.plot:
        from structured_plot import plot

        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
