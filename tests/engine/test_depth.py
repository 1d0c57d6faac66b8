# SPDX-License-Identifier: Apache-2.0
"""How far to speculate, by a clock of the test's own."""

import random

import pytest

from vllm_unmask.engine.depth import Depth, WindowPlan
from vllm_unmask.options import DecodingOptions

# Windows -> seconds and tokens of a step.
PAYS = {0: (1.0, 1.0), 1: (1.1, 1.5), 3: (1.3, 2.0), 7: (1.7, 2.5), 15: (2.5, 2.9)}
LOADED = {0: (1.0, 1.0), 1: (1.6, 1.4), 3: (2.6, 1.7), 7: (4.6, 2.0), 15: (8.0, 2.2)}


def run(
    depth: Depth,
    world: dict[int, tuple[float, float]],
    steps: int,
    load: int,
    now: list[float],
) -> list[int]:
    """Depths that were chosen; tokens come at random around their mean."""
    rng = random.Random(0)
    chosen = []
    for _ in range(steps):
        windows = depth.choose(load)
        chosen.append(windows)
        depth.start(load, windows, True)
        seconds, tokens = world[windows]
        now[0] += seconds * rng.uniform(0.9, 1.1)
        depth.finish(round(8 * tokens * rng.uniform(0.8, 1.2)))
        now[0] += 5  # nobody asks for anything meanwhile
    return chosen


@pytest.mark.parametrize(("world", "best"), [(PAYS, 3), (LOADED, 0)])
def test_the_best_depth_is_kept(
    world: dict[int, tuple[float, float]], best: int
) -> None:
    now = [0.0]
    depth = Depth(15, lambda: now[0])
    chosen = run(depth, world, 20_000, 3, now)[1000:]
    rates = {windows: tokens / seconds for windows, (seconds, tokens) in world.items()}
    mean = sum(rates[windows] for windows in chosen) / len(chosen)
    assert mean >= 0.97 * max(rates.values())
    assert chosen.count(best) > 0.9 * len(chosen)


def test_loads_are_told_apart() -> None:
    now = [0.0]
    depth = Depth(15, lambda: now[0])
    for _ in range(20):
        few = run(depth, PAYS, 200, 1, now)
        many = run(depth, LOADED, 200, 16, now)
    assert few.count(3) > 100 and many.count(0) > 100


def test_a_change_is_noticed() -> None:
    now = [0.0]
    depth = Depth(15, lambda: now[0])
    assert run(depth, LOADED, 3000, 4, now)[-200:].count(0) > 150
    assert run(depth, PAYS, 12000, 4, now)[-200:].count(0) < 20


def plan(adaptive: bool = False) -> WindowPlan:
    plan = WindowPlan(3, 8, 32, adaptive, 2)
    plan.add("a", DecodingOptions(strategy="freedave"))
    plan.add("b", DecodingOptions(strategy="freedave", candidates=2))
    plan.add("c", DecodingOptions(strategy="threshold"))
    return plan


def test_windows_of_requests() -> None:
    windows = plan()
    windows.next_step(3, 100)
    assert [windows.of(name) for name in "abc"] == [3, 1, 0]
    windows.forget("a")
    assert windows.of("a") == 0


def test_nobody_has_to_make_room() -> None:
    windows = plan()
    windows.next_step(3, -5)
    assert windows.of("a") == 0
    windows.next_step(3, 1)
    assert windows.of("a") == 0
    windows.next_step(3, 2)
    assert windows.of("a") == 3


def test_adaptive_plan_never_exceeds_what_was_asked() -> None:
    windows = plan(adaptive=True)
    seen = set()
    for step in range(200):
        windows.next_step(2, 100)
        seen.add(windows.of("a"))
        assert windows.of("b") <= 1
        windows.start(2, True)
        windows.finish(step % 5)
    assert seen <= {0, 1, 3} and len(seen) > 1
