# SPDX-License-Identifier: Apache-2.0
"""The step profile: times add up, each part without those that it calls."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture
def step_profile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    path = list(sys.path)
    import step_profile

    yield step_profile
    sys.path[:] = path


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_a_part_leaves_out_what_it_calls(step_profile: Any) -> None:
    clock = Clock()

    class Sampler:
        def sample(self) -> None:
            clock.pass_(1)
            self.check()
            clock.pass_(2)

        def check(self) -> None:
            clock.pass_(4)
            raise KeyError

    parts = step_profile.Parts(clock)
    parts.time(Sampler, "sampler", "sample")
    parts.time(Sampler, "grammar", "check")
    clock.pass_(8)
    with pytest.raises(KeyError):
        Sampler().sample()
    clock.pass_(16)
    seconds = parts.take()
    assert seconds["rest"] == 24 and seconds["grammar"] == 4 and seconds["sampler"] == 1
    assert sum(seconds.values()) == clock.now
    assert sum(parts.take().values()) == 0


def test_rows_say_what_the_plugin_takes(step_profile: Any) -> None:
    ms = dict.fromkeys(step_profile.PARTS, 1.0) | {"forward": 11.0}
    (row,) = step_profile.rows_of("demo", {"greedy": {"steps": 3, "ms": ms}})
    assert row["step_ms"] == 18 and row["plugin_ms"] == 4
    assert row["plugin_share"] == pytest.approx(4 / 18)
    assert "4.00 (22.2%)" in step_profile.table([row])


@pytest.mark.e2e
@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "step_profile.py"), "--quick"]
    command += ["--models", "demo", "--max-tokens", "48", "--json", str(result)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    rows = json.loads(result.read_text())["rows"]
    assert [row["mode"] for row in rows] == [
        "greedy",
        "greedy, grammar",
        "sampled, grammar",
    ]
    for row in rows:
        assert row["steps"] > 0
        assert row["forward ms"] > 0 and row["sampler ms"] > 0
    # A step without a grammar has no grammar work.
    assert rows[0]["grammar ms"] < rows[1]["grammar ms"]
