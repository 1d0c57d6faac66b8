# SPDX-License-Identifier: Apache-2.0
"""The quality report: its grid, its statistics, and what it makes of answers."""

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unmask.options import DecodingOptions, parse_request_options
from vllm_unmask.presets import FILLERS, PRESETS, compose

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmarks"
RESULT = FOLDER / "results" / "quality.json"
# What the report promises of each row.
ROW_KEYS = set(
    "preset parameters exact_match exact_match_interval tokens_per_forward "
    "tokens_per_forward_interval forwards tokens rows_per_token tokens_per_second "
    "difference".split()
)


@pytest.fixture(scope="module")
def modules() -> Any:
    path = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    parts = ("engine", "grid", "numbers", "plot", "report")
    found = {part: importlib.import_module(f"quality_{part}") for part in parts}
    yield SimpleNamespace(main=importlib.import_module("quality"), **found)
    sys.path[:] = path


# ---- the grid


@pytest.mark.parametrize("quick", [False, True])
def test_grid_covers_every_preset_and_filler(modules, quick):
    configs = modules.grid.grid(quick)
    assert configs[0] == modules.grid.BASELINE
    assert len({config.label for config in configs}) == len(configs)
    strategies = modules.grid.STRATEGIES
    missing = {*FILLERS, *PRESETS} - {*strategies}
    assert {f for name in missing for f in compose(name).fillers} >= {"s2d2"}
    elsewhere = {"s2d2", "freedave", "entropy_distance"}
    assert all(elsewhere & compose(name).fillers for name in missing)
    for name in strategies:
        assert any(c.strategy == name and not c.options for c in configs), name
        if name in PRESETS:
            continue
        choices = [c.options for c in configs if c.strategy == name]
        fewest = 2 if quick else 3
        assert {} in choices, name
        # Nothing to choose twice of, but the schedule and what it allows.
        assert len(choices) >= fewest, name
    assert any(c.kind == "composition" for c in configs)


def test_every_configuration_is_one_that_a_server_takes(modules):
    for config in modules.grid.grid(quick=False):
        parse_request_options(config.extra_args, DecodingOptions(), block_length=8)
        known = compose(config.strategy).defaults.keys() | config.options.keys()
        assert config.parameters.keys() >= known
        assert config.parameters == {**config.parameters, **config.options}


def test_grid_of_some_strategies(modules):
    configs = modules.grid.grid(True, ["sdar", "credit+factor", "factor"])
    labels = [config.label for config in configs]
    assert labels[0] == "threshold" and len(labels) == 5
    assert {"sdar", "factor", "credit+factor"} < set(labels)
    with pytest.raises(ValueError, match="did you mean 'factor'"):
        modules.grid.grid(True, ["facto"])


# ---- statistics

points = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12)


@given(points)
def test_pareto_front_by_brute_force(modules, found):
    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] >= b[0] and a[1] >= b[1]

    expected = [
        i
        for i, point in enumerate(found)
        if not any(beats(other, point) for other in found) and point not in found[:i]
    ]
    front = modules.numbers.pareto_front(found)
    assert sorted(front) == expected
    assert [found[i] for i in front] == sorted(found[i] for i in front)


def outcome(modules, right: Sequence[float], forwards: Sequence[float]) -> Any:
    """Answers of 12 tokens in 2 blocks, 1 of them completed by one forward."""
    n = len(right)
    columns = ([12.0] * n, forwards, [2.0] * n, [1.0] * n)
    arrays = [np.array(column, dtype=float) for column in (right, *columns)]
    return modules.numbers.Outcome(*arrays, rows=8 * sum(forwards), seconds=2.0)


def test_bootstrap_by_brute_force(modules):
    n, draws = 9, 500
    rng = np.random.default_rng(3)
    right, other = rng.integers(2, size=(2, n))
    forwards, slow = rng.integers(2, 9, size=(2, n))
    ours, base = outcome(modules, right, forwards), outcome(modules, other, slow)
    bootstrap = modules.numbers.Bootstrap(n, seed=5, resamples=draws)
    found = modules.numbers.difference(ours, base, bootstrap)

    again = np.random.default_rng(5)
    matches, ratios = [], []
    for some in again.integers(n, size=(draws, n)):
        matches.append(sum(right[i] - other[i] for i in some) / n)
        ratios.append(sum(slow[i] for i in some) / sum(forwards[i] for i in some))
    assert found["exact_match"] == pytest.approx((right - other).mean())
    assert found["tokens_per_forward_ratio"] == pytest.approx(
        slow.sum() / forwards.sum()
    )
    for name, values in (
        ("exact_match", matches),
        ("tokens_per_forward_ratio", ratios),
    ):
        ends = np.quantile(values, [0.025, 0.975])
        assert found[f"{name}_interval"] == pytest.approx(list(ends), abs=0.08)


def test_a_difference_to_itself_is_certain(modules):
    same = outcome(modules, [1, 0, 1, 0], [3, 5, 8, 2])
    found = modules.numbers.difference(same, same, modules.numbers.Bootstrap(4))
    assert found["exact_match_interval"] == [0, 0]
    assert found["tokens_per_forward_ratio_interval"] == [1, 1]


# ---- a run


class Stub:
    """Serves each prompt its answer; strategies differ in forwards and mistakes."""

    def __init__(self, modules: Any, records: Sequence[Mapping[str, str]]) -> None:
        self.modules = modules
        self.answers = {r["prompt"]: r["answer"] for r in records}
        self.asked: list[str] = []

    def serve(self, prompts: Sequence[str], extra_args: Mapping[str, Any]) -> Any:
        name = extra_args["unmask_strategy"]
        self.asked.append(name)
        if "learned" in compose(name).fillers:
            raise ValueError("no filter")
        forwards = {"credit+local_leap": 4, "local_leap+lookahead": 2}.get(name, 6)
        wrong = name == "local_leap+lookahead"
        answers = [
            self.modules.engine.Answer(
                "" if wrong and i == 0 else self.answers[prompt], 24, forwards, 3, 1
            )
            for i, prompt in enumerate(prompts)
        ]
        return self.modules.engine.Answers(answers, 8.0 * forwards * len(answers), 0.5)


@pytest.fixture(scope="module")
def made(modules) -> Any:
    """The result of a stubbed run over the whole quick grid."""
    main = modules.main
    first, rest = main.demo_records(quick=True)
    stub = Stub(modules, first + rest)
    bench = main.Bench(stub.serve, main.check_demo, first)
    bench.run(modules.grid.grid(quick=True))
    again = main.Bench(stub.serve, main.check_demo, rest)
    again.run(modules.report.finalists(bench.rows, bench.asked))
    return main.assemble(bench, again, {"cpu": "some"})


def test_the_prompts_that_confirm_are_others(modules):
    for quick in (True, False):
        first, rest = modules.main.demo_records(quick)
        asked = [{record["prompt"] for record in part} for part in (first, rest)]
        assert len(asked[0]) == len(first) and not asked[0] & asked[1]
        tasks = [{record["task"] for record in part} for part in (first, rest)]
        assert len(tasks[0]) == 10 and tasks[0] == tasks[1]


def test_rows_hold_what_is_promised(modules, made):
    assert modules.report.rounded({"a": [0.123456, "x"]}) == {"a": [0.1235, "x"]}
    text = modules.report.written(made)
    assert json.loads(text) == modules.report.rounded(made)
    assert text.count("\n") == len(made["rows"] + made["confirmation"]["rows"]) + 1
    measured: dict[bool, list[str]] = {False: [], True: []}
    for config in modules.grid.grid(quick=True):
        refused = "learned" in compose(config.strategy).fillers
        measured[refused].append(config.label)
    assert [r["label"] for r in made["rows"]] == measured[False]
    assert list(made["refused"]) == measured[True] and measured[True]
    tasks = {r["task"] for r in modules.main.demo_records(quick=True)[0]}
    for item in made["rows"]:
        assert item.keys() >= ROW_KEYS
        assert item["exact_match"].keys() == tasks | {"learnt", "all"}
        assert item["exact_match_interval"].keys() == item["exact_match"].keys()
    base = made["rows"][0]
    assert (base["preset"], base["parameters"]["threshold"]) == ("threshold", 0.9)
    assert (base["tokens_per_forward"], base["rows_per_token"]) == (4, 2)
    n = made["prompts"]["all"]
    assert (base["forwards"], base["tokens"]) == (6 * n, 24 * n)
    assert base["tokens_per_second"] == 48 * n
    assert base["exact_match_interval"]["all"] == [1, 1]


def test_the_question_and_its_confirmation(modules, made):
    for part in (made, made["confirmation"]):
        item = part["question"]["all"]
        # The faster one is wrong once, so it does not count.
        assert item["composition"]["label"] == "credit+local_leap"
        assert item["composition"]["tokens_per_forward_ratio"] == 1.5
        assert item["holds"] is True
        assert item["ceiling_ratio"] == 2
        assert item["blocks_in_one_forward"] == pytest.approx(1 / 3)
    assert made["confirmation"]["held"]["all"] == ["credit+local_leap"]
    again = [r["label"] for r in made["confirmation"]["rows"]]
    assert again[0] == "threshold" and "credit+local_leap" in again
    slowed = [dict(r) for r in made["rows"]]
    for item in slowed:
        if item["label"] == "credit+local_leap":
            item["difference"] = slowed[0]["difference"]
    fresh = made["confirmation"]["rows"]
    assert modules.report.held(slowed, fresh, "all") == []
    assert modules.report.held(fresh, slowed, "all") == []
    judged = modules.report.question(slowed, "all", "credit+local_leap")
    assert judged["holds"] is False
    assert "MISSED" in modules.report.answer(judged)


def test_ranking_prefers_the_rightest_that_gain_enough(modules):
    gains = {"a": (1.1, 0.0), "b": (1.14, -0.01), "c": (1.3, 0.0), "d": (1.2, 0.01)}
    rows = [
        {
            "label": label,
            "difference": {
                "all": {"tokens_per_forward_ratio": ratio, "exact_match": match}
            },
        }
        for label, (ratio, match) in gains.items()
    ]
    ranked = modules.report.ranked(rows, "all")
    assert [item["label"] for item in ranked] == ["d", "c", "a"]


def test_the_front_is_printed_and_drawn(modules, made, tmp_path):
    pytest.importorskip("matplotlib")
    assert made["front"][-1].startswith("local_leap+lookahead")
    text = modules.report.summary(made)
    assert text.startswith("| strategy | exact match |")
    assert "| `credit+local_leap` | 1.000 | +0.000 (+0.000 to +0.000) | 6.00 |" in text
    modules.plot.plot(made, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_of_ones_own(modules, tmp_path):
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": f"p{i}", "answer": f"a{i}"} for i in range(5)]
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n", encoding="utf-8")
    assert modules.main.read(path) == records
    stub = Stub(modules, records)
    bench = modules.main.Bench(stub.serve, modules.main.check_text, records)
    bench.run(modules.grid.grid(True, ["credit+local_leap"]))
    result = modules.main.assemble(bench, None, {})
    assert result["prompts"] == {"all": 5} and result["confirmation"] is None
    assert result["question"]["all"]["holds"] is True
    assert [row["exact_match"]["all"] for row in result["rows"]] == [1, 1]
    stub.answers["p0"] = "another"
    bench.run([modules.grid.BASELINE])
    assert bench.rows[-1]["exact_match"]["all"] == 0.8
    assert modules.main.load_checker("operator:eq")(1, 1) is True


def test_the_shipped_result_has_every_preset(modules):
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    measured = {row["preset"] for row in result["rows"]}
    assert measured >= {*modules.grid.STRATEGIES} and not result["refused"]
    assert all(row.keys() >= ROW_KEYS for row in result["rows"])
    assert result["confirmation"]["question"]["all"]["composition"] is not None
    modules.report.summary(result)
