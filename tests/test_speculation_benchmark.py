# SPDX-License-Identifier: Apache-2.0
"""The speculation benchmark: its smallest run, and what it makes of numbers."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "examples" / "benchmarks"
RESULT = BENCHMARKS / "results" / "speculation.json"
# What the benchmark promises of each row.
ROW_KEYS = set(
    "preset concurrency exact_match tokens_per_forward forwards rows "
    "tokens_per_second acceptance".split()
)


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    path = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    parts = ("frontier", "loop", "plot", "rows")
    found = {part: importlib.import_module(f"speculation_{part}") for part in parts}
    yield SimpleNamespace(main=importlib.import_module("speculation"), **found)
    sys.path[:] = path


def test_smallest_run(
    bench: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A real engine: freedave gives static's output in fewer forwards."""
    file = tmp_path / "speculation.json"
    arguments = "--quick --presets freedave s2d2_sdar_4 --concurrency 4 --prompts 12"
    arguments += f" --repeats 1 --temperatures --json {file}"
    monkeypatch.setattr(sys, "argv", ["speculation.py", *arguments.split()])
    assert bench.main.main() == 0
    result = json.loads(file.read_text())
    rows = {row["preset"]: row for row in result["rows"]}
    assert list(rows) == ["static", "freedave", "threshold", "s2d2_sdar_4"]
    assert all(row.keys() >= ROW_KEYS for row in rows.values())
    static, speculative = rows["static"], rows["freedave"]
    assert speculative["identical"] == 1
    assert speculative["exact_match"] == static["exact_match"]
    assert 2 * speculative["forwards"] < static["forwards"]
    assert speculative["rows"] > static["rows"]
    assert static["acceptance"] is None and rows["threshold"]["acceptance"] is None
    assert 0 < speculative["acceptance"] < 1
    assert 0 < rows["s2d2_sdar_4"]["acceptance"] < 1
    # Other outputs are told from equal ones.
    assert rows["s2d2_sdar_4"]["identical"] < 1
    assert result["frontier"] == [] and result["conclusions"] == []
    assert result["environment"].keys() >= {"commit", "versions", "cpu", "engines"}
    assert result["environment"]["engines"].keys() == {"fixed"}
    assert "s2d2_sdar_4" in capsys.readouterr().out


def measured(bench: Any, tokens: list[int], forwards: int, **fields: Any) -> Any:
    """Answers of so many tokens each, all in two seconds."""
    outputs = [bench.loop.Output(str(n), n) for n in tokens]
    known = {"seconds": 2.0, "rows": 8 * forwards, "drafted": 0, "accepted": 0}
    known["cpu_seconds"] = fields.get("seconds", 2.0) / 2
    return bench.loop.Measured(forwards=forwards, outputs=outputs, **(known | fields))


def test_what_a_row_says(bench: Any) -> None:
    static, preset = bench.rows.PRESETS[:2]
    samples = {
        ("static", 4): [
            bench.rows.Sample(measured(bench, [8, 4], 24), 2),
            bench.rows.Sample(measured(bench, [6, 6], 16, seconds=6.0), 1),
            bench.rows.Sample(measured(bench, [6, 6], 20), 1),
        ],
        ("freedave", 4): [
            bench.rows.Sample(measured(bench, [8, 4], 4, drafted=6, accepted=2), 2),
            bench.rows.Sample(measured(bench, [6, 5], 4, seconds=3.0), 1),
            bench.rows.Sample(measured(bench, [6, 6], 4, seconds=1.0), 1),
        ],
    }
    row = bench.rows.row(preset, 4, samples)
    assert row.keys() >= ROW_KEYS
    assert (row["forwards"], row["rows"], row["requests"]) == (12, 96, 6)
    assert row["tokens_per_forward"] == 35 / 12
    assert row["tokens_per_second"] == 6
    # Of each repeat with its own, not of the medians.
    assert row["speed_over_static"] == row["speed_over_base"] == pytest.approx(11 / 6)
    assert row["cpu_speed_over_base"] == pytest.approx(11 / 6)
    assert row["forwards_of_base_over"] == 5
    assert row["acceptance"] == pytest.approx(1 / 3)
    assert row["exact_match"] == pytest.approx(4 / 6)
    assert row["identical"] == pytest.approx(5 / 6)
    plain = bench.rows.row(static, 4, samples)
    assert plain["acceptance"] is None and plain["speed_over_base"] == 1
    assert "freedave" in bench.rows.table([plain, row])


def point(
    bench: Any, series: str, right: float, speed: float, causal_kv: bool = False
) -> Any:
    """100 answers, of which so large a share is right; temperature 0."""
    config = bench.frontier.Config(series, 0.5, causal_kv, 0.0)
    answers = np.arange(100) < round(100 * right)
    taken = measured(bench, [12] * 100, round(1200 / speed))
    return bench.frontier.Point(config, answers.astype(float), taken)


def test_threshold_decoding_at_a_speed(bench: Any) -> None:
    line = [
        point(bench, "threshold", right, speed)
        for right, speed in ((0.2, 4.0), (0.6, 1.0), (0.4, 2.0))
    ]

    def best(speed: float) -> float:
        return float(bench.frontier.at_speed(line, speed).mean())

    assert [best(speed) for speed in (0.5, 1.0, 2.0, 4.0)] == [0.6, 0.6, 0.4, 0.2]
    assert best(1.5) == pytest.approx(0.5) and best(3.0) == pytest.approx(0.3)
    assert bench.frontier.at_speed(line, 4.1) is None
    # A faster point that is right more often is the better choice.
    line.append(point(bench, "threshold", 0.7, 2.5))
    assert best(1.2) == 0.7


def test_verdict(bench: Any) -> None:
    base = [
        point(bench, "threshold", right, speed, kv)
        for kv, shift in ((False, 0.0), (True, 0.1))
        for right, speed in ((0.4 + shift, 1.0), (0.2 + shift, 3.0))
    ]
    some = [
        point(bench, "s2d2_sdar_4", 0.42, 2.0),
        point(bench, "s2d2_sdar_16", 0.5, 2.0),
        point(bench, "s2d2_sdar_16", 0.9, 5.0),  # no threshold is as fast
    ]
    found = bench.frontier.verdict([*base, *some], 0.0)
    # Beside threshold decoding with the better KV, 0.4 at that speed.
    assert found["series"] == "s2d2_sdar_16" and found["gain"] == pytest.approx(0.1)
    low, high = found["gain_interval"]
    assert low < 0.1 < high
    assert found["holds"] and (found["rows"], found["rows_that_hold"]) == (2, 1)
    assert "+10.0 points" in bench.frontier.sentence(found)
    missed = bench.frontier.verdict([*base, some[0]], 0.0)
    assert not missed["holds"] and "MISSED" in bench.frontier.sentence(missed)
    assert bench.frontier.verdict([*base, some[2]], 0.0) is None
    assert bench.frontier.verdict([*base, *some], 1.0) is None


def test_the_frontier_has_every_choice(bench: Any) -> None:
    chosen = list(bench.frontier.configs([0.0, 1.0], quick=False))
    assert len(set(chosen)) == len(chosen)
    for series in bench.frontier.SERIES:
        for kv in (False, True):
            found = {
                c.threshold for c in chosen if (c.series, c.causal_kv) == (series, kv)
            }
            assert found >= {0.5, 0.6, 0.7, 0.8, 0.9, 0.95}
    quick = list(bench.frontier.configs([0.0], quick=True))
    assert set(quick) < set(chosen)


def test_prompts_of_tasks_with_several_right_answers(bench: Any) -> None:
    records = bench.main.read(bench.main.DEMO / "held_out.jsonl")
    chosen = bench.frontier.prompts_of(records, 5)
    tasks = [record["task"] for record in chosen]
    assert tasks == [task for task in bench.frontier.TASKS for _ in range(5)]


def test_the_shipped_result(bench: Any, tmp_path: Path) -> None:
    """Holds every preset at every concurrency, the claims, and can be drawn."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    names = [preset.name for preset in bench.rows.PRESETS]
    found = [(row["concurrency"], row["preset"]) for row in result["rows"]]
    assert found == [(c, name) for c in (1, 4, 16) for name in names]
    for row in result["rows"]:
        assert row.keys() >= ROW_KEYS
        if "freedave" in row["strategy"]:
            assert row["identical"] == 1
            assert row["forwards_of_base_over"] >= 1
    alone = next(row for row in result["rows"] if row["preset"] == "freedave")
    assert alone["forwards_of_base_over"] >= 2.5
    greedy = next(v for v in result["verdicts"] if v["temperature"] == 0)
    assert greedy["holds"] and greedy["gain_interval"][0] > 0
    assert len(result["conclusions"]) == len(result["verdicts"])
    pytest.importorskip("matplotlib")
    bench.plot.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
