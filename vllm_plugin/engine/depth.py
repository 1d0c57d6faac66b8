# SPDX-License-Identifier: Apache-2.0
"""How far to speculate: as far as it has been paying, by the clock.

Windows cost rows. Next to a small batch these are nearly free; next to a large one they
are not, and how many steps a forward then saves depends on the text. So the depth is
climbed like a ladder: beside the best one its neighbours are tried, for some steps, and
one that did not pay is tried again after ever longer times.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from vllm_unmask.options import DecodingOptions

# Steps that a depth is tried or kept before the next choice.
_TRIAL = 24
# Trials after which a depth that did not pay is tried again: at first, and at most.
_SOON, _LATE = 8, 512
# Weight of what was measured before, when a trial begins.
_MEMORY = 0.8
# How much better a depth must be than the best one to take its place.
_MARGIN = 1.05


@dataclass
class _Arm:
    """One depth at one load."""

    tokens: float = 0.0
    seconds: float = 0.0
    pause: int = _SOON  # trials until it is tried again, once it has not paid
    due: int = 0  # trial from which that may happen

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Depth:
    """Chooses how many windows a request may have, step by step.

    Args:
        most: windows that a request may have.
        clock: seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = perf_counter) -> None:
        self.arms = sorted({0, most} | {n for n in (1, 3, 7) if n < most})
        self.clock = clock
        # Load, a power of two of running requests -> what its depths brought, in the
        # order of `arms`.
        self.tried: dict[int, list[_Arm]] = {}
        self.trials: dict[int, int] = {}
        self.best: dict[int, int] = {}
        self.current: dict[int, int] = {}
        self.left: dict[int, int] = {}
        # Load, place and start of the steps under way; None for one that is no measure.
        self.under_way: deque[tuple[int, int, float] | None] = deque()
        self.finished = 0.0

    def choose(self, num_running: int) -> int:
        """Windows of a request in the next step.

        Args:
            num_running: requests that share it.
        """
        load = num_running.bit_length()
        if self.left.get(load, 0) <= 0:
            self._next(load)
        return self.arms[self.current[load]]

    def _next(self, load: int) -> None:
        """Judge the trial that has ended, and choose what to run now."""
        arms = self.tried.setdefault(load, [_Arm() for _ in self.arms])
        trial = self.trials[load] = self.trials.get(load, 0) + 1
        best, last = self.best.setdefault(load, 0), self.current.get(load, 0)
        if last != best and arms[last].rate > _MARGIN * arms[best].rate:
            # What it was better than may be so at another time.
            arms[best].due = trial + arms[best].pause
            best = self.best[load] = last
            arms[best].pause = _SOON
        elif last != best:
            arms[last].due = trial + arms[last].pause
            arms[last].pause = min(2 * arms[last].pause, _LATE)
        chosen = best
        if arms[best].seconds:
            beside = [n for n in (best + 1, best - 1) if 0 <= n < len(arms)]
            chosen = next((n for n in beside if arms[n].due < trial), best)
        self.current[load], self.left[load] = chosen, _TRIAL
        arms[chosen].tokens *= _MEMORY
        arms[chosen].seconds *= _MEMORY

    def start(self, num_running: int, depth: int, measured: bool) -> None:
        """A step begins.

        Args:
            num_running: as in `choose`.
            depth: what that said.
            measured: whether the step is what most are: no prompt in it.
        """
        step = (num_running.bit_length(), self.arms.index(depth), self.clock())
        self.under_way.append(step if measured else None)

    def finish(self, num_tokens: int) -> None:
        """The oldest step under way ends.

        Args:
            num_tokens: what it reported, of all requests.
        """
        step = self.under_way.popleft() if self.under_way else None
        now = self.clock()
        if step is not None:
            load, place, started = step
            arm = self.tried[load][place]
            arm.tokens += num_tokens
            arm.seconds += now - max(started, self.finished)
            if place == self.current[load]:
                self.left[load] -= 1
        self.finished = now


class WindowPlan:
    """Windows of every request that speculates, in the next step.

    Args:
        most: windows that a request may have.
        block_length: rows of a window.
        page_size: tokens of a KV page.
        adaptive: follow what they bring.
        to_verify: windows of a request that verifies.
    """

    def __init__(
        self,
        most: int,
        block_length: int,
        page_size: int,
        adaptive: bool,
        to_verify: int,
    ) -> None:
        self.to_verify = to_verify
        self.most = most
        self.pages = 1 + most * block_length // page_size
        self.depth = Depth(most) if adaptive else None
        self.wanted: dict[str, int] = {}  # request id -> windows that it asks for
        # Requests whose output depends on having theirs: those that verify.
        self.fixed: dict[str, int] = {}
        self.allowed = most
        self.measured = False

    def add(self, req_id: str, options: DecodingOptions) -> None:
        """A request has arrived."""
        if "freedave" in options.fillers and self.most:
            candidates = options.value("candidates") or self.most + 1
            self.wanted[req_id] = candidates - 1
        if "s2d2" in options.fillers:
            self.fixed[req_id] = self.to_verify

    def forget(self, req_id: str) -> None:
        """A request has left."""
        self.wanted.pop(req_id, None)
        self.fixed.pop(req_id, None)

    def of(self, req_id: str) -> int:
        """Windows of a request in the step that is being planned."""
        return self.fixed.get(req_id, 0) + self.optional(req_id)

    def optional(self, req_id: str) -> int:
        """How many of them it can do without."""
        return min(self.wanted.get(req_id, 0), self.allowed)

    def next_step(self, num_running: int, free_pages: int) -> None:
        """Plan a step.

        Args:
            num_running: requests that share it.
            free_pages: KV pages of nobody, less what requests wait for. A window must
                make no request wait or leave.
        """
        affordable = free_pages >= len(self.wanted) * self.pages
        self.allowed = self.most if affordable else 0
        self.measured = bool(self.wanted) and affordable and self.depth is not None
        if self.measured and self.depth is not None:
            self.allowed = self.depth.choose(num_running)

    def start(self, num_running: int, usual: bool) -> None:
        """The step begins; `usual` without a prompt in it."""
        if self.depth is not None:
            self.depth.start(num_running, self.allowed, usual and self.measured)

    def finish(self, num_tokens: int) -> None:
        """The oldest step under way ends and has reported so many tokens."""
        if self.depth is not None:
            self.depth.finish(num_tokens)
