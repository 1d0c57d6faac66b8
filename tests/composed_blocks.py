# SPDX-License-Identifier: Apache-2.0
"""Random requests with scripted logits, for strategies over whole blocks."""

import math
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_unmask.options import decoding_limits, parse_request_options
from vllm_unmask.presets import SEPARATOR, compose
from vllm_unmask.request_options import DecodingOptions

VOCAB = 13
BLOCKS = 2  # blocks of each request, so that the second one meets what is left over
# Rows of logits: unsure, sure, tied, with one token left, and with none.
KINDS = ("flat", "steep", "tied", "peaked", "single", "banned")
FINITE = KINDS[:4]


class Opening(NamedTuple):
    """How a block begins."""

    ids: torch.Tensor  # int64 [block]
    output: torch.Tensor  # bool [block]
    live: torch.Tensor  # bool [block]
    injected: torch.Tensor  # bool [block]


@dataclass(frozen=True)
class Request:
    """What one request asks for and meets, whatever its batch is."""

    strategy: str
    options: DecodingOptions
    openings: tuple[Opening, ...]
    mask_id: int
    seed: int
    stop_ids: tuple[int, ...]
    temperature: float
    kinds: tuple[str, ...] = KINDS

    @property
    def length(self) -> int:
        return len(self.openings[0].ids)

    def logits(self, block: int, step: int) -> torch.Tensor:
        """float32 [block, vocab], the mask banned."""
        rng = random.Random(f"{self.seed} {block} {step}")
        rows = [self._row(rng) for _ in range(self.length)]
        logits = torch.tensor(rows)
        logits[:, self.mask_id] = -math.inf
        return logits

    def _row(self, rng: random.Random) -> list[float]:
        kind = rng.choice(self.kinds)
        # Whole numbers of eighths, as a model's logits in bfloat16 may be.
        scale = {"flat": 1, "steep": 6, "peaked": 1}.get(kind, 0)
        row = [round(8 * rng.gauss(0, scale)) / 8 for _ in range(VOCAB)]
        token = (self.mask_id + rng.randrange(1, VOCAB)) % VOCAB
        if kind == "tied":
            return [float(rng.randrange(2)) for _ in row]
        if kind in ("single", "banned"):
            row = [-math.inf] * VOCAB
        if kind == "peaked":
            row[token] = 14.0
        if kind == "single":
            row[token] = 1.0
        return row

    def number(self, name: str) -> float:
        """An option as the rules read it."""
        value = self.options.value(name)
        if value is None:
            unset = {"steps": self.length, "sub_block_length": (self.length + 3) // 4}
            return unset.get(name, 0)
        choices = decoding_limits()[name].choices
        return choices.index(value) if choices else float(value)

    def most_steps(self, opening: Opening) -> int:
        """Steps in which a block ends at the latest.

        Each step unmasks at least one position, so a block has at most as many steps
        as masks; those that doubt adds to it come once. Token editing adds steps
        without a mask, at most ``post_steps``. ReMDM masks again for two steps a
        position, and all that may be masked is unmasked after that.
        """
        fillers = compose(self.strategy).fillers
        masks = int((opening.ids == self.mask_id)[opening.output].sum())
        # A block that begins complete has a step as well.
        steps = max(masks, 1) + int(opening.injected.sum())
        if "edit" in fillers:
            steps += int(self.options.value("post_steps"))
        if "remdm" in fillers:
            steps = 2 * self.length + int(opening.live.sum())
        return max(steps, 1)


def draw_value(rng: random.Random, name: str, length: int) -> Any:
    """A value within the option's limits, often at one of them."""
    limits = decoding_limits()[name]
    if limits.kind == "choice":
        return rng.choice(limits.choices)
    if limits.kind == "bool":
        return rng.random() < 0.5
    if limits.kind == "int":
        return rng.randint(int(limits.low or 0), length)
    high = 4.0 if limits.high is None else limits.high
    return rng.choice([0.0, high, *(rng.random() * high for _ in range(3))])


def draw_options(rng: random.Random, strategy: str, length: int) -> DecodingOptions:
    """Options that a request with the strategy may have."""
    names = [*compose(strategy).defaults, "steps", "step_sizes", "order", "doubt"]
    given = {
        name: draw_value(rng, name, length) for name in names if rng.random() < 0.8
    }
    if given.get("remask") in ("cap", "rescale"):
        given["remask_rate"] = rng.choice([0.0, rng.random(), 1.0])
    else:
        given.pop("remask_rate", None)
    # Refused where the schedule has no number of steps.
    if given.get("step_sizes") == "ascending":
        given.pop("steps", None)
    return options_of(strategy, given, length)


def options_of(strategy: str, given: dict[str, Any], length: int) -> DecodingOptions:
    extra = {"unmask_strategy": strategy} | {
        f"unmask_{name}": value for name, value in given.items()
    }
    return parse_request_options(extra, DecodingOptions(), length)


def draw_opening(
    rng: random.Random, length: int, mask_id: int, injects: bool
) -> Opening:
    """A block: prompt, verified, pinned and seeded tokens, masks, and what is beyond.

    Masks of the prompt and beyond the end are no output, and stay.
    """
    fixed = rng.choice([0, 0, rng.randint(0, length - 1)])
    width = rng.choice([length, length, rng.randint(fixed + 1, length)])
    verified = rng.choice([fixed, rng.randint(fixed, width)])
    ids, live, injected = [], [], []
    for column in range(length):
        token = (mask_id + rng.randrange(1, VOCAB)) % VOCAB
        is_live = is_injected = False
        if column < fixed or column >= width:
            token = rng.choice([token, mask_id])
        elif column >= verified:
            what = rng.choice(["mask", "mask", "mask", "pinned", "seeded", "ahead"])
            is_live = what != "pinned"
            is_injected = what == "seeded" and injects
            token = mask_id if what == "mask" else token
        ids.append(token)
        live.append(is_live)
        injected.append(is_injected)
    output = [fixed <= column < width for column in range(length)]
    return Opening(*map(torch.tensor, (ids, output, live, injected)))


def draw_requests(
    rng: random.Random,
    strategy: str,
    injects: bool = False,
    kinds: tuple[str, ...] = KINDS,
) -> list[Request]:
    """A few requests of one strategy with equally long blocks."""
    length = rng.randint(1, 8)
    mask_id = rng.choice([0, VOCAB - 1])
    return [
        Request(
            strategy,
            draw_options(rng, strategy, length),
            tuple(draw_opening(rng, length, mask_id, injects) for _ in range(BLOCKS)),
            mask_id,
            rng.getrandbits(32),
            tuple(rng.sample(range(1, VOCAB - 1), rng.randint(0, 2))),
            rng.choice([0.0, 0.0, 1.0]),
            kinds,
        )
        for _ in range(rng.randint(1, 4))
    ]


def join(*fillers: str) -> str:
    return SEPARATOR.join(name for name in fillers if name)
