# SPDX-License-Identifier: Apache-2.0
"""Where several answers are right: what verification is worth at the same speed.

Positions that are unmasked in one forward do not know of each other, so they may come
from different answers. S2D2 has the same weights read them one after another. Threshold
decoding and presets of S2D2 are run over thresholds, with the model's own KV and with
token-causal KV, on the tasks that have several right answers.

The presets for SDAR verify whenever they can, or nearly, so the threshold changes next
to nothing there. Verification gives the law of autoregressive decoding, so at
temperature 1 it inherits that the demo model's law is flat: its logits were divided by
1.5 to calibrate its diffusion confidences. Threshold decoding, which keeps the draws
that are sure, minds that less. At 1 / 1.5 verification gains again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from quality_numbers import Bootstrap
from speculation_loop import Measured

Record = Mapping[str, str]

# The demo model's tasks with several right answers.
TASKS = ("json_free", "shuffle", "paraphrase", "any")
THRESHOLDS: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
BASELINE = "threshold"
# Lower ones for threshold decoding alone: S2D2 may be faster than at 0.5.
FASTER = (0.3, 0.4)
QUICK_THRESHOLDS: tuple[float, ...] = (0.5, 0.7, 0.9)  # of S2D2
SERIES = (BASELINE, "s2d2_sdar_4", "s2d2_sdar_16", "s2d2_fast_dllm_v2")
# Exact match that S2D2 is to gain over threshold decoding of the same speed.
GAIN = 0.03


class Config(NamedTuple):
    """What a point is about."""

    series: str
    threshold: float
    causal_kv: bool
    temperature: float

    @property
    def extra_args(self) -> dict[str, Any]:
        """Request options of this plugin."""
        return {"unmask_strategy": self.series, "unmask_threshold": self.threshold}


class Point(NamedTuple):
    """One configuration on all prompts."""

    config: Config
    right: npt.NDArray[np.float64]  # [prompts], 1 if the answer is right, else 0
    measured: Measured

    @property
    def tokens(self) -> int:
        """Output tokens, stop tokens included."""
        return sum(output.tokens for output in self.measured.outputs)

    @property
    def speed(self) -> float:
        """Tokens per forward."""
        return self.tokens / self.measured.forwards


def configs(temperatures: Sequence[float], quick: bool) -> Iterator[Config]:
    """Everything that is measured."""
    for temperature, causal_kv, series in product(temperatures, (False, True), SERIES):
        thresholds = QUICK_THRESHOLDS if quick else THRESHOLDS
        if series == BASELINE:
            thresholds = (*FASTER, *THRESHOLDS)
        for threshold in thresholds:
            yield Config(series, threshold, causal_kv, temperature)


def prompts_of(records: Sequence[Record], count: int) -> list[Record]:
    """The first records of each task that has several right answers."""
    chosen = [record for record in records if record["task"] in TASKS]
    groups = groupby(chosen, lambda record: record["task"])
    return [record for _, group in groups for record in list(group)[:count]]


def point_of(
    config: Config,
    records: Sequence[Record],
    measured: Measured,
    check: Callable[[str, str, str, str], bool],
) -> Point:
    """A point, judged."""
    right = [
        check(record["task"], record["prompt"], record["answer"], output.text)
        for record, output in zip(records, measured.outputs, strict=True)
    ]
    return Point(config, np.array(right, dtype=float), measured)


def row(point: Point, records: Sequence[Record]) -> dict[str, Any]:
    """One row of the result."""
    measured = point.measured
    tasks = np.array([record["task"] for record in records])
    return {
        "preset": point.config.series,
        "threshold": point.config.threshold,
        "causal_kv": point.config.causal_kv,
        "temperature": point.config.temperature,
        "exact_match": float(point.right.mean()),
        "exact_match_by_task": {
            task: float(point.right[tasks == task].mean()) for task in TASKS
        },
        "tokens_per_forward": point.speed,
        "forwards": measured.forwards,
        "rows": measured.rows,
        "tokens_per_second": point.tokens / measured.seconds,
        "acceptance": acceptance(measured.drafted, measured.accepted),
    }


def acceptance(drafted: int, accepted: int) -> float | None:
    """Share of what was drafted, None if nothing was."""
    return accepted / drafted if drafted else None


def at_speed(points: Sequence[Point], speed: float) -> npt.NDArray[np.float64] | None:
    """How right threshold decoding is at that speed or above, for each prompt.

    Between two neighbouring thresholds it is taken to be as right as their mean,
    weighted by speed. The best choice counts.

    Args:
        points: one series of thresholds.
        speed: tokens per forward.

    Returns:
        float64 [prompts], None if no threshold is as fast.
    """
    line = sorted(points, key=lambda point: point.speed)
    choices = [point.right for point in line if point.speed >= speed]
    for slow, fast in zip(line, line[1:], strict=False):
        if slow.speed < speed <= fast.speed:
            share = (speed - slow.speed) / (fast.speed - slow.speed)
            choices.append((1 - share) * slow.right + share * fast.right)
    return max(choices, key=lambda right: float(right.mean()), default=None)


def verdict(points: Sequence[Point], temperature: float) -> dict[str, Any] | None:
    """What the best configuration of S2D2 gains; None if none can be compared.

    Threshold decoding may choose its KV; the interval is a 95 % bootstrap over prompts.
    """
    points = [p for p in points if p.config.temperature == temperature]
    base = [p for p in points if p.config.series == BASELINE]
    lines = [[p for p in base if p.config.causal_kv is kv] for kv in (False, True)]
    gains = []
    for point in points:
        if point.config.series == BASELINE:
            continue
        found = [at_speed(line, point.speed) for line in lines]
        known = [right for right in found if right is not None]
        if known:
            reference = max(known, key=lambda right: float(right.mean()))
            gains.append((point, point.right - reference))
    if not gains:
        return None
    best, gained = max(gains, key=lambda pair: float(pair[1].mean()))
    gain, interval = Bootstrap(len(gained))(lambda draws: gained[draws].mean(axis=-1))
    return {
        "temperature": temperature,
        "prompts": len(gained),
        **best.config._asdict(),
        "exact_match": float(best.right.mean()),
        "tokens_per_forward": best.speed,
        "gain": gain,
        "gain_interval": interval,
        "required": GAIN,
        "holds": gain >= GAIN,
        "rows": len(gains),
        "rows_that_hold": sum(float(g.mean()) >= GAIN for _, g in gains),
    }


def sentence(found: Mapping[str, Any]) -> str:
    """A verdict in words."""
    low, high = found["gain_interval"]
    kv = "token-causal KV" if found["causal_kv"] else "the model's own KV"
    reference = found["exact_match"] - found["gain"]
    return (
        f"Temperature {found['temperature']:g}, {found['prompts']} prompts with "
        f"several right answers: {found['series']} at threshold "
        f"{found['threshold']:g} with {kv} is right for {found['exact_match']:.1%} at "
        f"{found['tokens_per_forward']:.2f} tokens per forward, threshold decoding of "
        f"that speed for {reference:.1%}, so verification brings "
        f"{100 * found['gain']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}); "
        f"required {100 * GAIN:+.0f}: {'holds' if found['holds'] else 'MISSED'} "
        f"({found['rows_that_hold']} of {found['rows']} S2D2 configurations)."
    )
