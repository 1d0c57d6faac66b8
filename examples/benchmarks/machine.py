# SPDX-License-Identifier: Apache-2.0
"""What a benchmark says of where and how it was run."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any


def say(text: str) -> None:
    """Tell how far a benchmark is."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def load_average() -> float:
    """Processes that have been running over the last minute."""
    return os.getloadavg()[0]


def surroundings(load_before: float, **facts: Any) -> dict[str, Any]:
    """The `environment` of a result.

    Args:
        load_before: `load_average` when the measurements began. More than the
            benchmark itself keeps busy means that something else ran too.
        facts: of the benchmark; `versions` are added to those of every benchmark.
    """
    versions: Mapping[str, str] = facts.pop("versions", {})
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "vllm-unmask")},
            **versions,
        },
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before_and_after": [load_before, load_average()],
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **facts,
    }


def commit() -> str | None:
    """The commit of this folder, marked if files differ from it."""
    result = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return result.stdout.strip() or None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.processor()
