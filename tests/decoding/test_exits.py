# SPDX-License-Identifier: Apache-2.0
"""When the rest of a block is filled at once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_cases import Batch, Row, check, where

from vllm_unmask.decoding.exits import agreeing, mean_gap, prophet, sched

GAP = st.sampled_from([0.0, 0.5, 2.0, 2.5, 5.0, 7.5, 8.0])


@given(st.data())
def test_mean_gap(data: st.DataObject) -> None:
    def rule(gap: Row, masked: Row) -> float:
        gaps = [gap[c] for c in where(masked)]
        mean = sum(gaps) / len(gaps) if gaps else 0.0
        return torch.tensor(mean).item()

    batch = Batch(data)
    result = check(mean_gap, rule, batch.table(GAP), batch.masked())
    assert result.dtype == torch.float32


def test_a_revealed_position_does_not_count_whatever_its_gap() -> None:
    gap = torch.tensor([[1.0, math.inf, 3.0], [math.inf] * 3])
    masked = torch.tensor([[True, False, True], [False] * 3])
    assert mean_gap(gap, masked).tolist() == [2.0, 0.0]


PROGRESS = st.sampled_from([0.0, 0.25, 0.32, 0.33, 0.34, 0.5, 0.66, 0.67, 0.75, 1.0])


@given(st.data())
def test_prophet(data: st.DataObject) -> None:
    def rule(gap: float, progress: float, high: float, low: float) -> bool:
        stage = (progress >= 0.33) + (progress >= 0.67)
        return gap >= [high, (high + low) / 2, low][stage]

    batch = Batch(data)
    low = batch.each(st.sampled_from([0.0, 2.5]))
    high = low + batch.each(st.sampled_from([0.0, 5.0]))
    check(prophet, rule, batch.each(GAP), batch.each(PROGRESS), high, low)


@pytest.mark.parametrize(
    ("progress", "threshold"),
    [(0.0, 7.5), (0.32, 7.5), (0.33, 5.0), (0.66, 5.0), (0.67, 2.5), (1.0, 2.5)],
)
def test_stages_of_prophet(progress: float, threshold: float) -> None:
    gap = torch.tensor([threshold, threshold - 0.001, threshold + 0.001])
    fired = prophet(
        gap, torch.full((3,), progress), torch.full((3,), 7.5), torch.full((3,), 2.5)
    )
    assert fired.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("shape", "thresholds"),
    [
        pytest.param(0, [7.5, 6.25, 5.0, 2.5], id="linear"),
        pytest.param(1, [7.5, 5 + 2.5 / math.sqrt(2), 5.0, 2.5], id="cosine"),
        pytest.param(
            2,
            [7.5, *(2.5 + 5 * math.exp(-x) for x in (0.5, 1, 2))],
            id="exponential",
        ),
    ],
)
def test_sched_thresholds(shape: int, thresholds: list[float]) -> None:
    progress = torch.tensor([0.0, 0.25, 0.5, 1.0])
    high, low = torch.full((4,), 7.5), torch.full((4,), 2.5)
    kind = torch.full((4,), shape)
    exact = torch.tensor(thresholds)
    assert sched(exact + 1e-4, progress, high, low, kind).all()
    assert not sched(exact - 1e-4, progress, high, low, kind).any()


@given(st.data())
def test_sched(data: st.DataObject) -> None:
    def rule(gap: float, q: float, high: float, low: float, shape: int) -> bool:
        q = min(q, 1)
        share = [1 - q, (1 + math.cos(math.pi * q)) / 2, math.exp(-2 * q)][shape]
        return gap >= low + (high - low) * share

    batch = Batch(data)
    low = batch.each(st.sampled_from([0.0, 2.5]))
    high = low + batch.each(st.sampled_from([0.0, 5.0]))
    # Off the thresholds, where the last bit of a cosine decides.
    gap = batch.each(GAP) + 0.0625
    progress = batch.each(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]))
    check(sched, rule, gap, progress, high, low, batch.each(st.integers(0, 2)))


def test_first_and_last_threshold_are_reached_exactly() -> None:
    high, low = torch.full((3,), 7.5), torch.full((3,), 2.5)
    assert sched(high, torch.zeros(3), high, low, torch.arange(3)).all()
    two = low[:2]
    assert sched(two, torch.ones(2), high[:2], two, torch.arange(2)).all()


@given(st.data())
def test_agreeing(data: st.DataObject) -> None:
    def rule(tokens: Row, previous: Row, masked: Row, step: int) -> bool:
        same = [tokens[c] == previous[c] for c in where(masked)]
        return step > 0 and all(same)

    batch = Batch(data)
    token = st.sampled_from([0, 0, 0, 1])
    check(
        agreeing,
        rule,
        batch.table(token),
        batch.table(token),
        batch.masked(),
        batch.each(st.integers(0, 2)),
    )
