# SPDX-License-Identifier: Apache-2.0
"""Counters of the workers, as Prometheus reads them in this process."""

from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY, Counter

from vllm_unmask.engine import metrics
from vllm_unmask.engine.metrics import Counters, create_counters

DRAFTS = "vllm:spec_decode_num_drafts"


@pytest.fixture
def counters() -> Iterator[list[Counters]]:
    """Two workers of two engines."""
    yield [Counters(create_counters(1), 0) for _ in range(2)]
    metrics._collector.files.clear()
    REGISTRY.unregister(metrics._collector)


def read() -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("vllm:")
    }


def test_drafts_are_told_by_the_names_of_vllm(counters: list[Counters]) -> None:
    assert f"{DRAFTS}_total" not in read()
    for worker in counters:
        worker.add("speculation_verified", 2)
        worker.add("speculation_tokens_drafted", 14)
        worker.add("speculation_tokens_verified", 9)
        worker.add("speculation_tokens_corrected", 1)
    told = read()
    assert told[f"{DRAFTS}_total"] == told["vllm:unmask_speculation_verified_total"]
    assert told[f"{DRAFTS}_total"] == 4
    assert told["vllm:spec_decode_num_draft_tokens_total"] == 28
    assert told["vllm:spec_decode_num_accepted_tokens_total"] == 16


def test_names_of_vllm_stay_free(counters: list[Counters]) -> None:
    """An engine with a drafter of its own may start in the same process."""
    counters[0].add("speculation_verified", 2)
    REGISTRY.unregister(Counter(DRAFTS, "of vLLM"))
