# SPDX-License-Identifier: Apache-2.0
"""Counters of the workers, read where Prometheus asks for them.

Workers are other processes than the one that serves ``/metrics``, and what they
return to it has no room for a plugin's numbers. So every worker adds to a row of a
small file that the front end maps.
"""

import os
import tempfile
import weakref
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    HistogramMetricFamily,
    Metric,
)

# Name -> what it counts.
COUNTERS = {
    "grammar_tokens_remasked": "Tentative tokens that a grammar masked again.",
    "grammar_tokens_forced": "Tokens that a grammar's guard wrote.",
    "grammar_guard_closures": "Structured outputs that the guard had to complete.",
    "grammar_lookaheads": "Frontier tokens chosen for the sake of those after them.",
    "grammar_failures": "Requests ended by a fault inside their grammar.",
    "speculation_forwards": "Forward passes of requests that speculate, one for each.",
    "speculation_drafted": "Candidates that these forwards held besides canvases.",
    "speculation_accepted": "Denoising steps taken on candidates, without a forward.",
    "speculation_verified": "Drafts that the same weights verified one by one.",
    "speculation_tokens_drafted": "Tokens of those drafts.",
    "speculation_tokens_verified": "Of these, the ones that passed or were put right.",
    "speculation_tokens_corrected": "Of these, the ones that were put right.",
    "speculation_tokens_unmasked": "Tokens of requests that verify while it pays.",
}
# vLLM's names for speculative decoding, and what of the above they are. Beside a
# diffusion model it has no counters of these names: what it has for them counts
# denoising steps, canvas positions and committed tokens, under other names.
_DRAFTS = {
    "vllm:spec_decode_num_drafts": ("speculation_verified",),
    "vllm:spec_decode_num_draft_tokens": ("speculation_tokens_drafted",),
    "vllm:spec_decode_num_accepted_tokens": (
        "speculation_tokens_verified",
        "speculation_tokens_corrected",
    ),
}
# Upper bounds of grammar work, microseconds a request and step.
BUCKETS = (10, 20, 50, 100, 150, 250, 500, 1000, 2500, 5000, 10000)
_STEP = "grammar_step_microseconds"
# A row: counters | observations per bucket, the last without bound | their sum.
_COLUMNS = len(COUNTERS) + len(BUCKETS) + 2


class Counters:
    """A worker's row.

    Args:
        path: the file.
        row: which row is this worker's alone, None for a worker that does not count.
    """

    def __init__(self, path: str, row: int | None) -> None:
        self._row = np.zeros(_COLUMNS)
        # The front end of a worker on another machine has its file there.
        if row is not None and Path(path).exists():
            values = np.memmap(path, np.float64, "r+").reshape(-1, _COLUMNS)
            # As a plain array: one of the file costs microseconds more an access.
            self._row = values[row].view(np.ndarray)
        self._columns = {name: column for column, name in enumerate(COUNTERS)}

    def add(self, name: str, amount: int) -> None:
        """Count."""
        if amount:
            self._row[self._columns[name]] += amount

    def observe_step(self, microseconds: float) -> None:
        """Grammar work of one request in one step."""
        self._row[len(COUNTERS) + bisect_left(BUCKETS, microseconds)] += 1
        self._row[-1] += microseconds


class Watch:
    """One counter of a worker, as a process beside it sees it grow.

    Args:
        path: the file.
        row: the worker's.
        name: of the counter.
    """

    def __init__(self, path: str, row: int, name: str) -> None:
        self._row = Counters(path, row)._row
        self._column = list(COUNTERS).index(name)
        self._seen = float(self._row[self._column])

    def take(self) -> float:
        """How much was added since this was asked last."""
        before, self._seen = self._seen, float(self._row[self._column])
        return self._seen - before


class _Collector:
    """All workers of all engines of this process, summed."""

    def __init__(self) -> None:
        self.files: list[np.memmap[Any, Any]] = []

    def collect(self) -> Iterator[Metric]:
        total = np.zeros(_COLUMNS)
        for values in self.files:
            total += values.sum(axis=0)
        counted = dict(zip(COUNTERS, total, strict=False))
        for name, value in counted.items():
            yield CounterMetricFamily(f"vllm:unmask_{name}", COUNTERS[name], value)
        # Not claimed at registration: another engine here may have vLLM's own.
        if counted["speculation_verified"]:
            for name, (whole, *less) in _DRAFTS.items():
                value = counted[whole] - sum(counted[other] for other in less)
                yield CounterMetricFamily(name, "Of S2D2, summed over engines.", value)
        counts = np.cumsum(total[len(COUNTERS) : -1])
        bounds = [*map(str, BUCKETS), "+Inf"]
        yield HistogramMetricFamily(
            f"vllm:unmask_{_STEP}",
            "Grammar work a request and step, in microseconds.",
            buckets=list(zip(bounds, counts.tolist(), strict=True)),
            sum_value=float(total[-1]),
        )


_collector = _Collector()


def create_counters(num_workers: int) -> str:
    """Make the file of an engine's workers and expose it; returns its path.

    The file lives as long as this process.

    Args:
        num_workers: workers that count, each in a row of its own.
    """
    handle, path = tempfile.mkstemp(prefix="vllm-unmask-", suffix=".counters")
    os.close(handle)
    weakref.finalize(_collector, Path(path).unlink, missing_ok=True)
    values = np.memmap(path, np.float64, "w+", shape=(num_workers, _COLUMNS))
    if not _collector.files:
        REGISTRY.register(_collector)
    _collector.files.append(values)
    return path
