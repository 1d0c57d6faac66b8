# SPDX-License-Identifier: Apache-2.0
"""Whether drafts are verified: while that has been paying, by the clock.

A verification costs a forward with more rows, and what it gains depends on the text.
It is worth what it makes of a step: masks that the requests unmask in the time of a
plain step, over those that they unmask in one. The account is that of `engine.depth`.
"""

from collections.abc import Callable
from enum import IntFlag
from time import perf_counter

from vllm_unmask.engine.depth import Depth

# Plain steps that tell how many masks a request unmasks in one; how many of them are
# remembered at most, and how many steps of requests in them.
_TOLD, _STEPS, _REQUEST_STEPS = 64, 256, 1024
# Trials after which plain steps are measured again while verifying pays. A text may
# come that is easier for the rule alone, which only they show.
_LATE = 16


class Asked(IntFlag):
    """What the scheduler asks of the worker in a step.

    It is told in the place where vLLM says whether the batch has structured outputs,
    which is when the worker has to report draft tokens.
    """

    REPORT = 1  # what the next queries need
    DRAFT = 2  # requests that `Throttle` knows may have drafts verified


class Throttle:
    """Chooses whether requests may have drafts verified, step by step.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.depth = Depth(1, clock, _LATE)
        self.requests: set[str] = set()  # those that it is about
        self.allowed = False
        self.members = 0  # of them, those in the step
        self.told = 0  # plain steps
        # Steps of requests in these and what they unmasked, the older the less.
        self.steps = self.masks = 0.0
        self.measured = False

    def next_step(self, num_running: int) -> None:
        """Choose.

        Args:
            num_running: requests that share the step.
        """
        self.allowed = False
        if self.requests:
            pays = self.depth.choose(num_running) > 0
            self.allowed = pays and self.told >= _TOLD

    def start(self, num_running: int, usual: bool) -> None:
        """The step begins; `usual` without a prompt in it."""
        self.measured = usual and self.members > 0
        self.depth.start(num_running, int(self.allowed), self.measured)

    def finish(self, num_unmasked: float) -> None:
        """The step ends; its requests have unmasked so many positions."""
        num_saved = 0.0
        if self.measured:
            if not self.allowed:
                self.told += 1
                kept = 1 - max(1 / _STEPS, min(self.members / _REQUEST_STEPS, 1))
                self.steps = kept * self.steps + self.members
                self.masks = kept * self.masks + num_unmasked
            elif self.masks:
                num_plain = num_unmasked * self.steps / self.masks
                num_saved = num_plain - self.members
        self.depth.finish(num_saved)
