# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the kernels: that it compares like with like, and what it writes."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    path = list(sys.path)
    # By its path: the tests of the kernels are modules of that name.
    spec = importlib.util.spec_from_file_location(
        "kernels_benchmark", BENCHMARKS / "kernels.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


def small(bench: Any) -> list[Any]:
    return [
        bench.row_stats(4, 300, torch.bfloat16, False),
        bench.row_stats(4, 300, torch.float32, True),
        bench.window(3, 45, 4, 3),
    ]


def test_both_sides_compute_the_same(bench: Any) -> None:
    for case in small(bench):
        ours, reference = case.ours(), case.reference()
        if case.op == "window":
            found = ours.view(3, 12, *ours.shape[1:]).transpose(1, 2)
            torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)
            continue
        assert torch.equal(ours.tokens, reference[0])
        assert torch.equal(ours.candidates, reference[6])
        torch.testing.assert_close(ours.entropy, reference[4], rtol=1e-4, atol=1e-4)
        assert (case.vllm is None) == (case.op == "row_stats")
        if case.vllm is not None:
            tokens, _, entropy, _ = case.vllm()
            assert torch.equal(ours.tokens, tokens)
            torch.testing.assert_close(ours.entropy, entropy, rtol=1e-4, atol=1e-4)


def test_result(
    bench: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "kernels.json"
    arguments = ["--quick", "--repeats", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["kernels.py", *arguments])
    monkeypatch.setattr(bench, "cases", lambda quick: small(bench))
    assert bench.main() == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    keys = {"op", "shape", "dtype", "reference_ms", "ours_ms", "ratio", "bytes"}
    keys |= {"bandwidth_share", "vllm_ms"}
    assert all(row.keys() == keys for row in rows)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["reference_ms"] / row["ours_ms"])
    assert [row["bytes"] for row in rows] == [2400, 4800, 2 * 3 * 45 * 2 * 64 * 4]
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 4
    # The real ones, not run.
    assert len(bench.cases(True)) == 3
