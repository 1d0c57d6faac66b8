# SPDX-License-Identifier: Apache-2.0
"""The layout of asynchronous steps, by a clock of the test's own."""

import random

import pytest

from vllm_unmask.engine.async_scheduler import LayoutPlan


def run(plan: LayoutPlan, now: list[float], half: float, num_steps: int) -> list[bool]:
    """Eight requests decode; which of their steps were exact.

    Args:
        plan: chooses.
        now: its clock.
        half: time of an exact step of four of them, over that of a uniform one of all.
    """
    rng = random.Random(0)
    chosen: list[bool] = []
    under_way: list[float] = []
    for _ in range(num_steps):
        plan.next_step(8, True)
        chosen.append(plan.exact)
        plan.start(8, 4 if plan.exact else 8, True)
        under_way.append((half if plan.exact else 1.0) * rng.uniform(0.9, 1.1))
        # One step is in flight while the next one is planned.
        if len(under_way) == 2:
            now[0] += under_way.pop(0)
            plan.finish()
    return chosen


@pytest.mark.parametrize(("half", "turns"), [(0.3, True), (0.44, True), (1.0, False)])
def test_the_faster_layout_is_found(half: float, turns: bool) -> None:
    """Two exact steps do what one uniform step does."""
    now = [0.0]
    chosen = run(LayoutPlan("auto", lambda: now[0]), now, half, 3000)
    share = sum(chosen[1000:]) / 2000
    assert share > 0.8 if turns else share < 0.03
    # What is tried costs little.
    steps = sum(0.5 if exact else 1.0 for exact in chosen)
    assert now[0] < 1.02 * steps


@pytest.mark.parametrize("layout", ["uniform", "exact"])
def test_a_layout_that_was_asked_for_stays(layout: str) -> None:
    now = [0.0]
    for half in (0.1, 2.0):
        chosen = run(LayoutPlan(layout, lambda: now[0]), now, half, 300)
        assert chosen == [layout == "exact"] * 300


def test_without_a_measure_the_layout_is_uniform() -> None:
    now = [0.0]
    plan = LayoutPlan("auto", lambda: now[0])
    assert True in run(plan, now, 0.1, 300)
    plan.next_step(8, False)
    assert not plan.exact
