# SPDX-License-Identifier: Apache-2.0
"""Whether to verify drafts, by a clock of the test's own."""

import random
from functools import cache
from typing import NamedTuple

import pytest

from vllm_unmask.engine.throttle import Throttle

BLOCK = 8


def unmasked(rng: random.Random, mean: float) -> int:
    """Masks of a request that a forward unmasks, spread as widely as texts are."""
    return min(1 + round(rng.expovariate(1 / (mean - 1))), 2 * BLOCK)


@cache
def mean(asked: float) -> float:
    """What `unmasked` comes to."""
    rng = random.Random(0)
    return sum(unmasked(rng, asked) for _ in range(20_000)) / 20_000


class World(NamedTuple):
    """What a forward is like."""

    plain: float  # masks that a request unmasks in one
    verified: float  # in one that verifies its draft
    cost: float  # duration of a forward among which some verify

    @property
    def worth(self) -> float:
        """Of verifying always: every other forward drafts, and unmasks nothing."""
        return mean(self.verified) / 2 / mean(self.plain) / self.cost


WORLDS = {
    "rows are free": World(2.5, 7.0, 1.05),
    "it pays": World(2.0, 6.0, 1.2),
    "even": World(2.5, 6.0, 1.2),
    "a loss": World(2.5, 5.0, 1.5),
    "a large loss": World(4.0, 5.0, 2.0),
}


class Server:
    """Requests that are served in a time of the test's own."""

    def __init__(self, seed: int, others: int = 0, held_up: int = 0) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.throttle = Throttle(lambda: self.now)
        self.others = others
        self.held_up = held_up  # which step that may verify takes very long
        self.waiting: set[int] = set()
        self.allowed = 0  # steps of the last run

    def run(self, world: World, num_steps: int, loads: tuple[int, ...]) -> float:
        """Work in plain steps, over the time of that many."""
        throttle, rng = self.throttle, self.rng
        done = spent = 0.0
        members, self.allowed = loads[0], 0
        for _ in range(num_steps):
            if rng.random() < 0.05:
                members = rng.choice(loads)
                self.waiting &= set(range(members))
            running = members + self.others
            throttle.requests = {str(n) for n in range(members)}
            throttle.next_step(running)
            throttle.members = members
            self.allowed += throttle.allowed
            throttle.start(running, True)
            plain = 1 + 0.1 * running
            cost = world.cost if throttle.allowed else 1.0
            seconds = plain * cost * rng.uniform(0.9, 1.1)
            seconds *= 5 if rng.random() < 0.005 else 1
            seconds *= 100 if throttle.allowed and self.allowed == self.held_up else 1
            count = 0
            for request in range(members):
                if not throttle.allowed:
                    count += unmasked(rng, world.plain)
                elif request in self.waiting:
                    count += unmasked(rng, world.verified)
            idle = set(range(members)) - self.waiting
            self.waiting = idle if throttle.allowed else set()
            self.now += seconds
            throttle.finish(count)
            self.now += 5  # nobody asks for anything meanwhile
            mine = count / mean(world.plain)
            done += plain * (mine + self.others) / running
            spent += seconds
        return 1.02 * done / spent


@pytest.mark.parametrize("loads", [(1,), (16,), tuple(range(1, 17))], ids=str)
@pytest.mark.parametrize("name", WORLDS)
def test_nothing_is_lost_and_most_is_won(name: str, loads: tuple[int, ...]) -> None:
    """At most 3 % behind the rule alone, from the first step on."""
    world = WORLDS[name]
    for seed in range(2):
        server = Server(seed)
        assert server.run(world, 2500, loads) > 0.96
        rate = server.run(world, 7500, loads)
        assert rate > (0.95 * world.worth if world.worth > 1.1 else 0.975)


def test_others_in_the_batch_count_as_much() -> None:
    """What pays for few of many requests does not, where all wait for it."""
    server = Server(0, others=12)
    server.run(WORLDS["it pays"], 5000, (4,))
    assert server.allowed < 1000


@pytest.mark.parametrize("held_up", [1, 2])
def test_an_accident_is_forgotten(held_up: int) -> None:
    """A trial that something else held up is not believed for ever."""
    server = Server(0, held_up=held_up)
    server.run(WORLDS["it pays"], 5000, (4,))
    server.held_up = 0
    assert server.run(WORLDS["it pays"], 2000, (4,)) > 1.1


def test_a_change_is_noticed() -> None:
    """Also where the rule alone gains by it, which is seen in plain steps only."""
    server, easier = Server(0), World(4.0, 7.0, 1.2)
    assert server.run(WORLDS["it pays"], 5000, (8,)) > 1.1
    server.run(easier, 2000, (8,))
    assert server.run(easier, 2000, (8,)) > 0.97
    server.run(WORLDS["it pays"], 4000, (8,))
    assert server.run(WORLDS["it pays"], 2000, (8,)) > 1.1


def test_nobody_is_asked_nothing_is_measured() -> None:
    throttle = Throttle(lambda: 0.0)
    for _ in range(200):
        throttle.next_step(3)
        throttle.start(3, True)
        throttle.finish(7)
    assert not throttle.allowed and not throttle.depth.plain
