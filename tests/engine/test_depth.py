# SPDX-License-Identifier: Apache-2.0
"""How far to speculate, by a clock of the test's own."""

import random
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from vllm_unmask.engine.depth import Depth, WindowPlan
from vllm_unmask.options import DecodingOptions

# Windows -> denoising steps of a request that a forward carries out.
STEPS = {0: 1.0, 1: 1.45, 3: 1.9, 7: 2.3, 15: 2.6}
# Windows -> duration of a forward over that of one without.
WORLDS = {
    "rows are free": {windows: 1 + 0.01 * windows for windows in STEPS},
    "rows cost": {windows: 1 + 0.1 * windows for windows in STEPS},
    "windows cost, rows do not": {0: 1.0, 1: 1.5, 3: 1.5, 7: 1.55, 15: 1.6},
    "nothing gained": {0: 1.0, 1: 1.47, 3: 2.0, 7: 3.0, 15: 5.0},
    "loaded": {windows: 1 + 0.6 * windows for windows in STEPS},
}
# Where speculation pays, and how near the best depth it must come: less where the first
# depths do not pay, and the others have to be saved up for.
PAYING = {"rows are free": 0.9, "rows cost": 0.9, "windows cost, rows do not": 0.8}


class Run(NamedTuple):
    """What became of some thousand steps."""

    rate: float  # denoising steps in the time of a plain one
    depths: list[int]


class World:
    """Requests that are served in a time of the test's own.

    Args:
        depth: what chooses.
        now: its clock.
        seed: of everything that is random.
    """

    def __init__(self, depth: Depth, now: list[float], seed: int = 0) -> None:
        self.depth, self.now = depth, now
        self.rng = random.Random(seed)

    def run(
        self, cost: Mapping[int, float], num_steps: int, loads: tuple[int, ...]
    ) -> Run:
        """Durations spread by a tenth, and some are held up; so do saved steps."""
        done = spent = 0.0
        drafted, depths, num_running = False, [], loads[0]
        for _ in range(num_steps):
            if self.rng.random() < 0.05:
                num_running = self.rng.choice(loads)
            windows = self.depth.choose(num_running)
            depths.append(windows)
            self.depth.start(num_running, windows, True)
            plain = 1 + 0.1 * num_running
            held_up = 5 if self.rng.random() < 0.005 else 1
            seconds = plain * cost[windows] * self.rng.uniform(0.9, 1.1) * held_up
            saved = 0
            # Nothing was drafted in a step without windows.
            if windows and drafted:
                chance = 1 / (STEPS[windows] - 1)
                draws = (self.rng.expovariate(chance) for _ in range(num_running))
                saved = sum(min(windows, round(draw)) for draw in draws)
            drafted = windows > 0
            self.now[0] += seconds
            self.depth.finish(saved)
            self.now[0] += 5  # nobody asks for anything meanwhile
            done += plain * (1 + saved / num_running)
            spent += seconds
        # What is held up would be without speculation, too.
        return Run(1.02 * done / spent, depths)


def world(seed: int = 0) -> World:
    now = [0.0]
    return World(Depth(15, lambda: now[0]), now, seed)


@pytest.mark.parametrize("loads", [(1,), (16,), tuple(range(1, 17))], ids=str)
@pytest.mark.parametrize("name", WORLDS)
def test_nothing_is_lost_and_much_is_won(name: str, loads: tuple[int, ...]) -> None:
    """At most 3 % behind the plain rule, from the first step on, where windows do not
    pay; near the best depth where they do."""
    for seed in range(3):
        cost = WORLDS[name]
        of = world(seed)
        early = of.run(cost, 2500, loads).rate
        rate = of.run(cost, 7500, loads).rate
        assert early > 0.97
        best = max(
            # A window may be too small for all that the world would save.
            (1 + of_depth(windows)) / cost[windows]
            for windows in STEPS
        )
        wanted = PAYING[name] * best if name in PAYING else 0.98
        assert rate > wanted, (seed, rate, best)


def of_depth(windows: int) -> float:
    """Steps that so many windows save on average."""
    if not windows:
        return 0.0
    rng = random.Random(1)
    chance = 1 / (STEPS[windows] - 1)
    draws = (min(windows, round(rng.expovariate(chance))) for _ in range(20_000))
    return sum(draws) / 20_000


def test_loads_are_told_apart() -> None:
    of = world()
    for _ in range(20):
        few = of.run(WORLDS["rows are free"], 200, (1,)).depths
        many = of.run(WORLDS["loaded"], 200, (16,)).depths
    assert few.count(0) < 20 and many.count(0) > 150


def test_a_change_is_noticed() -> None:
    of = world()
    assert of.run(WORLDS["loaded"], 3000, (4,)).depths[-200:].count(0) > 150
    assert of.run(WORLDS["rows are free"], 4000, (4,)).depths[-200:].count(0) < 40
    again = of.run(WORLDS["loaded"], 1000, (4,)).depths
    assert again[-200:].count(0) > 150


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


def test_windows_without_pages_take_none() -> None:
    windows = WindowPlan(3, 8, None, False, 2)
    windows.add("a", DecodingOptions(strategy="freedave"))
    windows.next_step(3, -5)
    assert windows.of("a") == 3


def test_adaptive_plan_never_exceeds_what_was_asked() -> None:
    windows = plan(adaptive=True)
    seen = set()
    for _ in range(200):
        windows.next_step(2, 100)
        seen.add(windows.of("a"))
        assert windows.of("b") <= 1
        windows.start(2, True)
        windows.finish(3 * windows.of("a"))
    assert seen <= {0, 1, 3} and len(seen) > 1
