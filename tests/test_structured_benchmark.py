# SPDX-License-Identifier: Apache-2.0
"""The structured output benchmark: what it makes of measurements."""

import importlib
import json
import sys
from types import ModuleType
from typing import Any

import pytest
from structured_sweep import EXAMPLES

# What the benchmark promises of each row.
ROW_KEYS = set(
    "mode budget vocabulary schemas refused valid schema_valid exact_match "
    "tokens_per_second tokens_per_forward grammar_us_p50 grammar_us_p99".split()
)


@pytest.fixture(scope="module")
def bench() -> Any:
    path = list(sys.path)
    sys.path.insert(0, str(EXAMPLES / "benchmarks"))
    yield importlib.import_module("structured")
    sys.path[:] = path


def sample(
    bench: ModuleType, seconds: float, times: list[float], right: int = 9
) -> Any:
    """10 answers of 12 tokens: 8 of them fit their schema, `right` are right."""
    result = bench.Measurement(
        seconds=seconds,
        engine_steps=50,
        forwards=40,
        grammar_us=times,
        answers=[bench.Answer("{}", 12, "stop")] * 10,
    )
    verdicts = [(True, index < 8, index < right) for index in range(10)]
    return bench.Sample(3, result, verdicts)


def result(bench: ModuleType, right: int = 9, slow: float = 400.0) -> Any:
    samples = {}
    for mode in reversed(bench.MODES):
        times = [] if mode == "unconstrained" else [100.0] * 98 + [slow] * 2
        for task, vocabulary in (("real", 150_000), ("demo", 512)):
            key = bench.Key(task, vocabulary, "normal", mode)
            hits = right if mode == "fv" else 9
            samples[key] = [
                sample(bench, seconds, times, hits) for seconds in (1.0, 4.0, 2.0)
            ]
    return bench.assemble(samples, {"cpu": "some"})


def test_rows_hold_what_is_promised_in_a_fixed_order(bench):
    rows = result(bench)["rows"]
    assert all(row.keys() >= ROW_KEYS for row in rows)
    assert [(row["vocabulary"], row["mode"]) for row in rows] == [
        (vocabulary, mode) for vocabulary in (512, 150_000) for mode in bench.MODES
    ]


def test_row_values(bench):
    plain, ours = result(bench)["rows"][:2]
    assert ours["tokens_per_second"] == pytest.approx(60)
    assert ours["tokens_per_forward"] == pytest.approx(3)
    assert ours["ms_per_forward"] == pytest.approx(40)
    assert (ours["schemas"], ours["refused"]) == (10, 3)
    assert (ours["valid"], ours["schema_valid"]) == (1.0, 0.8)
    assert ours["exact_match"] == pytest.approx(0.9)
    assert (ours["grammar_us_p50"], ours["grammar_us_p99"]) == (100, 400)
    assert plain["grammar_us_p50"] is None


def test_requirements_say_what_is_missed(bench):
    def missed(made: Any) -> list[str]:
        return [item["name"] for item in made["requirements"] if not item["holds"]]

    assert missed(result(bench)) == []
    assert missed(result(bench, right=8)) == ["exact match over unconstrained"]
    assert missed(result(bench, slow=2000.0)) == ["grammar us at 150,000 tokens, p99"]
    assert "MISSED" in bench.table(result(bench, right=8))


def test_what_was_not_measured_is_not_judged(bench):
    made = bench.assemble({}, {})
    assert all(item["holds"] is None for item in made["requirements"])
    assert bench.table(made).count("\n") == 1


def test_result_is_json_and_a_picture(bench, tmp_path):
    pytest.importorskip("matplotlib")
    made = result(bench)
    assert json.loads(json.dumps(made)) == made
    importlib.import_module("structured_plot").plot(made, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_schema_of_a_record(bench):
    schema = bench.schema_of('{"b": "x", "a": 1, "c": 1.5, "d": true}')
    assert list(schema["properties"]) == ["b", "a", "c", "d"] == schema["required"]
    types = [item["type"] for item in schema["properties"].values()]
    assert types == ["string", "integer", "number", "boolean"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', (True, True)),
        ('{"a": "x"}', (False, False)),
        ('{"a": 1', (False, False)),
        ("", (False, False)),
        # JSON Schema takes it for an integer, the grammar does not.
        ('{"a": 1.0}', (False, True)),
    ],
)
def test_verdicts(bench, text, expected):
    case = bench.Case("", json.dumps(bench.schema_of('{"a": 1}')))
    verdict = bench.Checker().verdict(case, bench.Answer(text, 1, "stop"))
    assert verdict == (*expected, False)
