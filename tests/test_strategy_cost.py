# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the strategy layer: that it runs, and what it makes of times."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_unmask.presets import FILLERS

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    path = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("strategy_cost")
    sys.path[:] = path


def test_quick_run(
    bench: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every filler is measured, and all that is promised is in the result."""
    file = tmp_path / "cost.json"
    arguments = ["--quick", "--repeats", "1", "--threads", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["strategy_cost.py", *arguments])
    assert bench.main() == 0
    result = json.loads(file.read_text())
    rows = {row["filler"]: row for row in result["rows"]}
    other = {name for name, f in FILLERS.items() if f.slot == "speculate"}
    assert rows.keys() == FILLERS.keys() - {"static", "threshold"} - other
    assert {name for name, row in rows.items() if row["whole_row"]} == bench.WHOLE_ROW
    for row in rows.values():
        assert row["plain_ms"] > 0 and all(row["forward_ms"].values())
        assert all(row["lm_head_ms"].values())
        assert row["read_ms"] >= 0 and row["decide_ms"] > 0
    assert result["environment"].keys() >= {"commit", "versions", "cpu", "sizes"}
    assert all(name in capsys.readouterr().out for name in ["1 threads"])


def test_what_a_row_says(bench: Any) -> None:
    clock = bench.Clock()
    clock.times = {
        "forward bfloat16": [100.0],
        "forward float32": [200.0],
        "lm_head bfloat16": [140.0],
        "lm_head float32": [300.0],
        "score": [20.0],
        "accept": [1.0],
        "read edit": [30.0, 22.0, 10.0],
        "decide edit": [3.0],
        "shared edit": [0.5],
    }
    row = bench.row("edit", 1, clock, True)
    assert row["plain_ms"] == 21
    # Beyond acceptance, which the strategy takes the place of.
    assert (row["extra_ms"], row["extra_ms_shared"]) == (24, 4.5)
    assert row["share"] == {"bfloat16": 0.24, "float32": 0.12}
    assert row["share_with_lm_head"] == {"bfloat16": 4.5 / 240, "float32": 4.5 / 500}
    assert row["holds"]
    alone = bench.row("edit", 1, clock, False)
    assert alone["extra_ms_shared"] == 24 and not alone["holds"]
    assert "MISSES 5%" in bench.table({"rows": [alone]})
    assert "MISSES" not in bench.table({"rows": [row]})


def test_scores_that_were_read_already(bench: Any) -> None:
    """What is shared is what plain scoring gives."""
    import torch

    logits = bench.random_logits(bench.TINY)
    plain = bench.plain_score(logits)
    block = bench.open_blocks(bench.TINY)
    for filler in FILLERS:
        step = bench.Step(bench.TINY, bench.strategy_of(filler), block)
        step.state = {}
        evidence, _ = step.read(logits.clone())
        shared = bench.shared_score(step, evidence)
        assert (shared is not None) == (filler in bench.SHARED)
        for mine, other in zip(shared or (), plain, strict=False):
            assert torch.equal(mine, other)
