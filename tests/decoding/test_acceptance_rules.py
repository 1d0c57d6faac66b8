# SPDX-License-Identifier: Apache-2.0
"""The stateless acceptance rules, each against a specification for one request."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import (
    CONFIDENCE,
    INF,
    ORDER,
    THRESHOLD,
    Batch,
    Row,
    best,
    check,
    check_blind,
    flags,
    where,
)

from vllm_unmask.decoding.acceptance import (
    accept_above,
    accept_capped,
    accept_confident,
    accept_entropy_below,
    accept_entropy_bounded,
    accept_factor,
    accept_local_leap,
    accept_runs,
    accept_top,
    ascending_count,
    cosine_count,
)

ENTROPY = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 3.0])


def spent_in_full(num_masks: int, counts: list[int]) -> list[int]:
    """What a schedule really unmasks, step by step, until nothing is left."""
    taken = []
    for count in counts:
        taken.append(min(count, num_masks - sum(taken)))
    return taken


@given(st.integers(1, 80), st.integers(1, 80))
def test_cosine_schedule(num_masks: int, num_steps: int) -> None:
    steps = torch.arange(num_steps)
    counts = cosine_count(
        torch.full_like(steps, num_masks), torch.full_like(steps, num_steps), steps
    )
    assert counts.dtype == torch.int64
    taken = spent_in_full(num_masks, counts.tolist())
    assert sum(taken) == num_masks
    for step in range(num_steps):
        angle = math.pi / 2 * (step + 1) / num_steps
        # A half times an integer is the only value near an integer.
        left = math.floor(round(num_masks * math.cos(angle), 9))
        # One a step is the least, which can only be ahead of the curve.
        assert num_masks - sum(taken[: step + 1]) <= left
        if min(counts[: step + 1]) > 1:
            assert num_masks - sum(taken[: step + 1]) == left


@pytest.mark.parametrize(
    ("num_masks", "num_steps", "expected"),
    [
        (32, 4, [3, 7, 10, 12]),
        (32, 3, [5, 11, 16]),
        (8, 1, [8]),
        (2, 4, [1, 1, 1, 1]),
    ],
)
def test_cosine_schedule_by_hand(
    num_masks: int, num_steps: int, expected: list[int]
) -> None:
    steps = torch.arange(num_steps)
    arguments = torch.full_like(steps, num_masks), torch.full_like(steps, num_steps)
    assert cosine_count(*arguments, steps).tolist() == expected


@given(st.integers(0, 80), st.integers(1, 80), st.integers(0, 1 << 40))
def test_schedules_that_ran_out(num_masks: int, num_steps: int, late: int) -> None:
    """One a step of the cosine, and all there is when doubling."""
    masks, steps, now = torch.tensor([[num_masks], [num_steps], [late]])
    assert int(cosine_count(masks, steps, steps + now)) == 1
    assert int(ascending_count(masks, now + 7)) == max(num_masks, 1)


@given(st.integers(1, 5000))
def test_ascending_schedule(num_masks: int) -> None:
    steps = torch.arange(num_masks.bit_length())
    counts = ascending_count(torch.full_like(steps, num_masks), steps).tolist()
    assert counts == [2**step for step in steps.tolist()]
    taken = spent_in_full(num_masks, counts)
    assert sum(taken) == num_masks
    assert sum(taken[:-1]) < num_masks


def test_schedules_wait_for_no_value() -> None:
    one = torch.ones(2, dtype=torch.int64)
    check_blind(cosine_count, one, one, one)
    check_blind(ascending_count, one, one)


def factor_rule(confidence: Row, masked: Row, factor: float) -> list[bool]:
    chosen: list[int] = []
    for column in best(confidence, where(masked), len(masked)):
        if (len(chosen) + 2) * (1 - confidence[column]) > factor:
            break
        chosen.append(column)
    return flags(chosen, masked)


@given(st.data())
def test_factor(data: st.DataObject) -> None:
    batch = Batch(data)
    factor = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 100.0])
    check(
        accept_factor,
        factor_rule,
        batch.table(CONFIDENCE),
        batch.masked(),
        batch.each(factor),
    )


def test_factor_does_not_reveal_the_position_that_fails() -> None:
    """The reference does if it is the last one."""
    confidence = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.9, 0.8]])
    accepted = accept_factor(
        confidence, torch.ones(2, 3, dtype=torch.bool), torch.tensor([1.0, 0.1])
    )
    assert accepted.tolist() == [[True, True, False], [False, False, False]]


@given(st.data())
def test_factor_between_nothing_and_everything(data: st.DataObject) -> None:
    batch = Batch(data)
    confidence = batch.table(st.sampled_from([0.0, 0.5, 0.75]))
    masked = batch.masked()
    nothing = torch.full((batch.rows,), 0.25)
    assert not accept_factor(confidence, masked, nothing).any()
    everything = torch.full((batch.rows,), batch.length + 1.0)
    assert torch.equal(accept_factor(confidence, masked, everything), masked)


def entropy_rule(
    order: Row, entropy: Row, masked: Row, bound: float, whole_sum: bool
) -> list[bool]:
    ranked = best(order, where(masked), len(masked))
    for count in range(len(ranked), 0, -1):
        spent = [entropy[c] for c in ranked[:count]]
        if sum(spent) < bound if whole_sum else sum(spent) - max(spent) <= bound:
            return flags(ranked[:count], masked)
    return flags([], masked)


@given(st.data())
def test_entropy_bounded(data: st.DataObject) -> None:
    batch = Batch(data)
    check(
        accept_entropy_bounded,
        entropy_rule,
        batch.table(ORDER),
        batch.table(ENTROPY),
        batch.masked(),
        batch.each(st.sampled_from([0.0, 0.125, 0.5, 1.0, 4.0, 100.0])),
        batch.each(st.booleans()),
    )


@given(st.data())
def test_entropy_bound_between_one_position_and_all(data: st.DataObject) -> None:
    batch = Batch(data)
    order, masked = batch.table(ORDER), batch.masked()
    entropy = batch.table(st.sampled_from([0.125, 1.0, 3.0]))
    one = torch.ones(batch.rows, dtype=torch.int64)
    no, yes = torch.zeros_like(one).bool(), one.bool()
    none, huge = torch.zeros(batch.rows), torch.full((batch.rows,), 1e6)

    least = accept_entropy_bounded(order, entropy, masked, none, no)
    assert torch.equal(least, accept_top(order, masked, one))
    assert not accept_entropy_bounded(order, entropy, masked, none, yes).any()
    for whole_sum in (no, yes):
        most = accept_entropy_bounded(order, entropy, masked, huge, whole_sum)
        assert torch.equal(most, masked)


@given(st.data())
def test_entropy_below(data: st.DataObject) -> None:
    def rule(entropy: Row, masked: Row, bound: float) -> list[bool]:
        return [m and h <= bound for h, m in zip(entropy, masked, strict=True)]

    batch = Batch(data)
    check(
        accept_entropy_below,
        rule,
        batch.table(ENTROPY),
        batch.masked(),
        batch.each(st.sampled_from([-1.0, 0.0, 0.125, 0.5, 2.0, 100.0])),
    )


def local_leap_rule(
    confidence: Row,
    masked: Row,
    threshold: float,
    relaxed: float,
    radius: int,
    strict: bool,
) -> list[bool]:
    def passes(column: int, bound: float) -> bool:
        value = confidence[column]
        return masked[column] and (value > bound if strict else value >= bound)

    columns = range(len(masked))
    anchors = [c for c in columns if passes(c, threshold)]
    near = [c for c in columns if any(abs(c - a) <= radius for a in anchors)]
    return flags(set(anchors) | {c for c in near if passes(c, relaxed)}, masked)


@given(st.data())
def test_local_leap(data: st.DataObject) -> None:
    batch = Batch(data, longest=12)
    check(
        accept_local_leap,
        local_leap_rule,
        batch.table(CONFIDENCE),
        batch.masked(),
        batch.each(THRESHOLD),
        batch.each(THRESHOLD),
        batch.each(st.sampled_from([0, 1, 2, 4, (1 << 63) - 1])),
        batch.each(st.booleans()),
    )


@given(st.data())
def test_local_leap_reduces_to_a_threshold(data: st.DataObject) -> None:
    batch = Batch(data)
    confidence, masked = batch.table(CONFIDENCE), batch.masked()
    threshold, strict = batch.each(THRESHOLD), batch.each(st.booleans())
    above = accept_above(confidence, masked, threshold, strict)
    radius = batch.each(st.integers(0, 5))
    for relaxed, reach in (
        (batch.each(THRESHOLD), torch.zeros_like(radius)),
        (threshold, radius),
    ):
        accepted = accept_local_leap(
            confidence, masked, threshold, relaxed, reach, strict
        )
        assert torch.equal(accepted, above)


def runs_rule(
    confidence: Row, masked: Row, threshold: float, low_threshold: float
) -> list[bool]:
    chosen = {c for c in where(masked) if confidence[c] > threshold}
    run: list[int] = []
    for column in range(len(masked) + 1):
        if column < len(masked) and masked[column]:
            run.append(column)
            continue
        peak = max((confidence[c] for c in run), default=-INF)
        if peak > low_threshold:
            chosen |= {c for c in run if confidence[c] == peak}
        run = []
    return flags(chosen, masked)


@given(st.data())
def test_runs(data: st.DataObject) -> None:
    batch = Batch(data, longest=12)
    check(
        accept_runs,
        runs_rule,
        batch.table(CONFIDENCE),
        batch.masked(),
        batch.each(THRESHOLD),
        batch.each(THRESHOLD),
    )


def test_runs_by_hand() -> None:
    confidence = torch.tensor([[0.5, 0.6, 1.0, 0.5, 0.5, 0.1, 1.0, 0.3]])
    masked = torch.tensor([[True, True, False, True, True, True, False, True]])
    accepted = accept_runs(confidence, masked, torch.tensor([0.9]), torch.tensor([0.4]))
    assert where(accepted[0].tolist()) == [1, 3, 4]


@given(st.data())
def test_runs_without_a_low_bar_are_a_threshold(data: st.DataObject) -> None:
    batch = Batch(data)
    confidence, masked = batch.table(CONFIDENCE), batch.masked()
    threshold = batch.each(THRESHOLD)
    never = torch.full((batch.rows,), 2.0)
    strict = torch.ones(batch.rows, dtype=torch.bool)
    assert torch.equal(
        accept_runs(confidence, masked, threshold, never),
        accept_above(confidence, masked, threshold, strict),
    )


def capped_rule(
    confidence: Row, masked: Row, barred: Row, threshold: float, least: int, most: int
) -> list[bool]:
    valid = [c for c in where(masked) if not barred[c]]
    if not valid:
        return flags(best(confidence, where(masked), least), masked)
    passed = sum(confidence[c] >= threshold for c in valid)
    return flags(best(confidence, valid, min(max(passed, least), most)), masked)


@given(st.data())
def test_capped(data: st.DataObject) -> None:
    batch = Batch(data)
    least = batch.each(st.integers(1, 3))
    masked = batch.masked()
    accepted = check(
        accept_capped,
        capped_rule,
        batch.table(CONFIDENCE),
        masked,
        batch.table(st.booleans()) | batch.each(st.booleans()).unsqueeze(1),
        batch.each(THRESHOLD),
        least,
        least + batch.each(st.integers(0, 9)),
    )
    assert torch.equal(accepted.any(dim=1), masked.any(dim=1))


@given(st.data())
def test_capped_without_a_cap_is_a_threshold_with_a_floor(data: st.DataObject) -> None:
    batch = Batch(data)
    confidence, masked = batch.table(CONFIDENCE), batch.masked()
    threshold, least = batch.each(THRESHOLD), batch.each(st.integers(1, 3))
    capped = accept_capped(
        confidence,
        masked,
        torch.zeros_like(masked),
        threshold,
        least,
        torch.full_like(least, 99),
    )
    strict = torch.zeros(batch.rows, dtype=torch.bool)
    above = accept_above(confidence, masked, threshold, strict)
    assert torch.equal(capped, above | accept_top(confidence, masked, least))


def confident_rule(
    sureness: Row,
    masked: Row,
    threshold: float,
    num_masks: int,
    num_steps: int,
    step: int,
) -> list[bool]:
    columns = where(masked)
    sure = [c for c in columns if sureness[c] > threshold]
    if sure or not columns:
        return flags(sure, masked)
    ratio = Fraction(len(columns), num_masks)
    for later in range(step + 1, num_steps + 1):
        time = 1 - Fraction(999, 1000) * Fraction(later, num_steps)
        count = int(len(columns) * (1 - time / ratio))
        if count >= 1:
            return flags(best(sureness, columns, count), masked)
    return flags(columns, masked)


@settings(max_examples=120)
@given(st.data())
def test_confident(data: st.DataObject) -> None:
    batch = Batch(data)
    masked = batch.masked()
    # At a multiple of 1000 steps or masks, a count may be an integer exactly.
    fresh = st.one_of(st.integers(batch.length, 40), st.sampled_from([1000, 2000]))
    steps = st.one_of(st.integers(1, 40), st.sampled_from([111, 999, 1998]))
    accepted = check(
        accept_confident,
        confident_rule,
        batch.table(st.sampled_from([-3.0, -0.5, -0.25, 0.0, 0.5])),
        masked,
        batch.each(st.sampled_from([-1.0, -0.25, 0.5, 2.0])),
        batch.each(fresh),
        batch.each(steps),
        batch.each(st.integers(0, 45)),
    )
    assert torch.equal(accepted.any(dim=1), masked.any(dim=1))


@pytest.mark.parametrize(
    ("num_masks", "num_steps", "expected"),
    [
        # At a share of 1, not 0.999, each of these counts would be 2.
        pytest.param(8, 4, [1, 2, 2, 2, 1], id="fewer-steps"),
        pytest.param(4, 9, [1, 1, 1, 1], id="no-step-is-idle"),
        pytest.param(4, 1, [3, 1], id="one-step"),
    ],
)
def test_fallback_of_confident_by_hand(
    num_masks: int, num_steps: int, expected: list[int]
) -> None:
    masked = torch.ones(1, num_masks, dtype=torch.bool)
    fresh, steps = torch.tensor([[num_masks], [num_steps]])
    counts = []
    while masked.any():
        step = torch.tensor([len(counts)])
        sureness = torch.zeros(1, num_masks)
        never = torch.ones(1)
        accepted = accept_confident(sureness, masked, never, fresh, steps, step)
        counts.append(int(accepted.sum()))
        masked = masked & ~accepted
    assert counts == expected


def test_confident_of_an_idle_row_divides_by_nothing() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    masked = torch.zeros(1, 4, dtype=torch.bool)
    accepted = accept_confident(
        torch.zeros(1, 4), masked, torch.zeros(1), zero, zero + 1, zero
    )
    assert not accepted.any()
