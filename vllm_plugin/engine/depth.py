# SPDX-License-Identifier: Apache-2.0
"""How far to speculate: as far as it has been paying, by the clock.

Windows cost rows. Next to a small batch these are nearly free; next to a large one they
are not, and how many steps a forward then saves depends on the text. So a depth has a
*worth*: denoising steps that a forward carries out, in the time of a forward without
windows. Both are measured, and neither depends on how long the requests are; tokens a
second, which do, would need hundreds of steps to tell two depths apart.

What is tried must be paid for. Speculation has an account in plain steps, into which
every step pays a small share of itself, and from which a step with windows takes what
it is slower than the steps that it carries out. Without credit nothing is speculated,
so that all of it together costs no more than that share.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from vllm_unmask.options import DecodingOptions

# Steps that a depth is tried or kept before the next choice.
_TRIAL = 16
# Share of the time that speculation may lose.
_BUDGET = 0.01
# Credit, in plain steps: at first, at most, and what it takes to begin.
_START, _MOST, _STAKE = 2.0, 32.0, 2.0
# Trials after which a depth beside one that pays is tried again: at first, at most.
_SOON, _LATE = 8, 128
# Weight of what was measured before, when a trial begins.
_MEMORY = 0.8
# Steps without windows that tell how long one takes: so many are enough, or remembered.
_KNOWN, _REMEMBERED = 4, 15
# Steps that tell what a depth is worth, and how much more than the best one it must be.
_TOLD, _MARGIN = 12.0, 1.03
# A step that took longer than so many plain ones was held up by something else.
_LONGEST = 16.0


@dataclass
class _Arm:
    """One depth at one load."""

    forwards: float = 0.0
    steps: float = 0.0  # denoising steps of a request, in these forwards
    cost: float = 0.0  # of these forwards, in plain steps
    tries: int = 0
    pause: int = _SOON  # trials until it is tried again beside a better one
    due: int = 0  # trial from which that may happen

    @property
    def worth(self) -> float:
        """Denoising steps in the time of a plain one; 0 while nobody knows."""
        return self.steps / self.cost if self.forwards >= _TOLD else 0.0


class _Load:
    """What is known of the depths beside about so many requests."""

    def __init__(self, num_arms: int, late: int) -> None:
        self.late = late
        self.arms = [_Arm() for _ in range(num_arms)]
        self.best = self.current = 0  # places of arms; 0 is no windows
        self.trial = 0
        self.left = 0  # steps until the next choice

    def worth(self, place: int) -> float:
        return self.arms[place].worth if place else 1.0

    def next(self, credit: float) -> None:
        """Judge the trial that has ended, and choose what to run now."""
        arms, last = self.arms, self.current
        self.trial += 1
        if last != self.best:
            arms[last].due = self.trial + arms[last].pause
            arms[last].pause = min(2 * arms[last].pause, self.late)
        if self.worth(self.best) < 1:
            self.best = 0
        first = max(range(len(arms)), key=self.worth)
        if self.worth(first) > _MARGIN * self.worth(self.best):
            self.best = first
        self.current = self._choose(credit)
        self.left = _TRIAL
        arm = arms[self.current]
        arm.tries += 1
        arm.forwards *= _MEMORY
        arm.steps *= _MEMORY
        arm.cost *= _MEMORY

    def _choose(self, credit: float) -> int:
        if credit < (0 if self.best else _STAKE):
            return 0
        losses = self._losses()
        if self.best:
            beside = {0, self.best - 1, self.best + 1}.intersection(range(len(losses)))
            due = [n for n in beside if self.arms[n].due < self.trial]
            return max((n for n in due if losses[n] <= credit), default=self.best)
        # What the least has been spent on; it may have to be saved up for.
        spent = [(arm.tries + 1) * x for arm, x in zip(self.arms, losses, strict=True)]
        place = min(range(1, len(spent)), key=spent.__getitem__)
        return place if losses[place] <= credit else 0

    def _losses(self) -> list[float]:
        """Plain steps that a trial of each depth may lose, of an unknown one at twice
        the rate of the one before."""
        losses = [0.0]
        for arm in self.arms[1:]:
            # A trial that was broken off may have been held up: not believed for long.
            known = arm.forwards >= _TOLD or (arm.forwards and self.trial < arm.due)
            mean = (arm.cost - arm.steps) / arm.forwards if known else 0.0
            losses.append(_TRIAL * mean if known else 2 * losses[-1])
            losses[-1] = max(losses[-1], 1.0)
        return losses


class Depth:
    """Chooses how many windows a request may have, step by step.

    Args:
        most: windows that a request may have, at least 1.
        clock: seconds.
        late: trials after which a depth beside one that pays is tried again, at most.
    """

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = perf_counter,
        late: int = _LATE,
    ) -> None:
        self.depths = sorted({0, most} | {n for n in (1, 3, 7) if n < most})
        self.clock = clock
        self.late = late
        self.credit = _START
        # Running requests -> seconds of their last steps without windows.
        self.plain: dict[int, deque[float]] = {}
        self.loads: dict[int, _Load] = {}  # a power of two of them -> its depths
        # Running requests, place and start of the steps under way; None for one that is
        # no measure.
        self.under_way: deque[tuple[int, int, float] | None] = deque()
        self.finished = 0.0

    def _load(self, num_running: int) -> _Load:
        key = num_running.bit_length()
        if key not in self.loads:
            self.loads[key] = _Load(len(self.depths), self.late)
        return self.loads[key]

    def choose(self, num_running: int) -> int:
        """Windows of a request in the next step.

        Args:
            num_running: requests that share it.
        """
        if num_running not in self.plain:
            self.plain[num_running] = deque(maxlen=_REMEMBERED)
        if len(self.plain[num_running]) < _KNOWN:
            return 0
        load = self._load(num_running)
        if load.left <= 0 or (load.current and self.credit < 0):
            load.next(self.credit)
        return self.depths[load.current]

    def start(self, num_running: int, depth: int, measured: bool) -> None:
        """A step begins.

        Args:
            num_running: as in `choose`.
            depth: what that said.
            measured: whether the step is what most are: no prompt in it.
        """
        step = (num_running, self.depths.index(depth), self.clock())
        self.under_way.append(step if measured else None)

    def finish(self, num_saved: float) -> None:
        """The oldest step under way ends.

        Args:
            num_saved: denoising steps that its windows served, of all requests.
        """
        step = self.under_way.popleft() if self.under_way else None
        now = self.clock()
        if step is not None:
            num_running, place, started = step
            self._measure(
                num_running, place, now - max(started, self.finished), num_saved
            )
        self.finished = now

    def _measure(
        self, num_running: int, place: int, seconds: float, num_saved: float
    ) -> None:
        plain, load = self.plain[num_running], self._load(num_running)
        if not place:
            plain.append(seconds)
        # Something else may hold a step up, and must not pass for its usual time.
        cost = min(seconds / median(plain), _LONGEST)
        self.credit += _BUDGET * cost
        if place:
            steps = 1 + num_saved / num_running
            self.credit += steps - cost
            arm = load.arms[place]
            arm.forwards += 1
            arm.steps += steps
            arm.cost += cost
        self.credit = min(self.credit, _MOST)
        if place == load.current:
            load.left -= 1


class WindowPlan:
    """Windows of every request that speculates, in the next step.

    Args:
        most: windows that a request may have.
        block_length: rows of a window.
        page_size: tokens of a KV page; None if windows take none.
        adaptive: follow what they bring.
        to_verify: windows of a request that verifies.
    """

    def __init__(
        self,
        most: int,
        block_length: int,
        page_size: int | None,
        adaptive: bool,
        to_verify: int,
    ) -> None:
        self.to_verify = to_verify
        self.most = most
        self.pages = 1 + most * block_length // page_size if page_size else 0
        self.depth = Depth(most) if adaptive and most else None
        self.wanted: dict[str, int] = {}  # request id -> windows that it asks for
        # Windows of requests whose output depends on having them: those that verify.
        # With synchronous scheduling, while a draft waits.
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
        affordable = not self.pages or free_pages >= len(self.wanted) * self.pages
        self.allowed = self.most if affordable else 0
        self.measured = bool(self.wanted) and affordable and self.depth is not None
        if self.measured and self.depth is not None:
            self.allowed = self.depth.choose(num_running)

    def start(self, num_running: int, usual: bool) -> None:
        """The step begins; `usual` without a prompt in it."""
        if self.depth is not None:
            measured = usual and self.measured and num_running > 0
            self.depth.start(num_running, self.allowed, measured)

    def finish(self, num_saved: float) -> None:
        """The oldest step under way ends; its windows served so many steps."""
        if self.depth is not None:
            self.depth.finish(num_saved)
