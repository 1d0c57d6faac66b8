# SPDX-License-Identifier: Apache-2.0
"""Rows of the speculation benchmark: presets, their servers, and what was measured."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from speculation_frontier import acceptance
from speculation_loop import Measured

STATIC = "static"
# Server options of the engines. Depths are learnt, so presets that do share none.
FIXED, CAUSAL = "fixed", "fixed, token-causal KV"
ADAPTIVE = ("freedave adaptive", "threshold+freedave adaptive")
# On the same engines, without speculation: no two processes are equally fast.
BESIDE = ("static, adaptive server", "threshold, adaptive server")
SERVERS: Mapping[str, Mapping[str, Any]] = {
    FIXED: {"adaptive_candidates": False},
    CAUSAL: {"adaptive_candidates": False, "causal_kv": True},
    **{name: {"adaptive_candidates": True} for name in ADAPTIVE},
}


class Preset(NamedTuple):
    """What a row is about."""

    name: str
    strategy: str
    base: str  # preset that it is compared with
    options: Mapping[str, Any] = {}
    server: str = FIXED

    @property
    def extra_args(self) -> dict[str, Any]:
        """Request options of this plugin."""
        options = {f"unmask_{name}": value for name, value in self.options.items()}
        return {"unmask_strategy": self.strategy, **options}


_RULE = "threshold"
PRESETS = (
    Preset(STATIC, STATIC, STATIC),
    Preset("freedave", "static+freedave", STATIC),
    Preset(BESIDE[0], STATIC, BESIDE[0], server=ADAPTIVE[0]),
    Preset(ADAPTIVE[0], "static+freedave", BESIDE[0], server=ADAPTIVE[0]),
    Preset(_RULE, _RULE, _RULE),
    Preset("threshold+freedave", "threshold+freedave", _RULE),
    Preset(BESIDE[1], _RULE, BESIDE[1], server=ADAPTIVE[1]),
    Preset(ADAPTIVE[1], "threshold+freedave", BESIDE[1], server=ADAPTIVE[1]),
    Preset("s2d2_sdar_4", "s2d2_sdar_4", _RULE),
    Preset("s2d2_sdar_16", "s2d2_sdar_16", _RULE),
    Preset("s2d2 always", "threshold+s2d2", _RULE, {"route": "always"}),
)


class Sample(NamedTuple):
    """One preset in one repeat at one concurrency."""

    measured: Measured
    right: int

    @property
    def tokens(self) -> int:
        return sum(output.tokens for output in self.measured.outputs)

    @property
    def speed(self) -> float:
        """Output tokens per second."""
        return self.tokens / self.measured.seconds

    @property
    def cpu_speed(self) -> float:
        """Output tokens per second of processor time."""
        return self.tokens / self.measured.cpu_seconds


Samples = Mapping[tuple[str, int], Sequence[Sample]]  # preset, concurrency -> repeats


def row(preset: Preset, concurrency: int, samples: Samples) -> dict[str, Any]:
    """One row; repeat for repeat beside static decoding and the preset's base."""
    mine = samples[preset.name, concurrency]
    base = samples[preset.base, concurrency]
    static = samples[STATIC, concurrency]
    measured = [sample.measured for sample in mine]
    tokens = sum(sample.tokens for sample in mine)
    forwards = sum(m.forwards for m in measured)
    pairs = [
        one == other
        for sample, known in zip(mine, base, strict=True)
        for one, other in zip(
            sample.measured.outputs, known.measured.outputs, strict=True
        )
    ]
    return {
        "preset": preset.name,
        "concurrency": concurrency,
        "exact_match": sum(sample.right for sample in mine) / len(pairs),
        "tokens_per_forward": tokens / forwards,
        "forwards": forwards,
        "rows": sum(m.rows for m in measured),
        "tokens_per_second": median(sample.speed for sample in mine),
        "acceptance": acceptance(
            sum(m.drafted for m in measured), sum(m.accepted for m in measured)
        ),
        "strategy": preset.strategy,
        "options": dict(preset.options),
        "server": dict(SERVERS[preset.server]),
        "requests": len(pairs),
        "repeats": len(mine),
        "speed_over_static": _ratio(mine, static),
        "base": preset.base,
        "speed_over_base": _ratio(mine, base),
        "cpu_speed_over_base": median(
            one.cpu_speed / other.cpu_speed
            for one, other in zip(mine, base, strict=True)
        ),
        "forwards_of_base_over": sum(s.measured.forwards for s in base) / forwards,
        "identical": sum(pairs) / len(pairs),
    }


def _ratio(samples: Sequence[Sample], others: Sequence[Sample]) -> float:
    pairs = zip(samples, others, strict=True)
    return median(one.speed / other.speed for one, other in pairs)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text."""
    head = ["in flight", "exact", "tok/fwd", "forwards", "rows", "tok/s", "accepted"]
    head += ["x static", "x base", "by CPU", "fewer", "identical"]
    width = max(len(item["preset"]) for item in rows)
    lines = [f"{'':{width}}" + "".join(f"{name:>10}" for name in head)]
    for item in rows:
        share = item["acceptance"]
        cells = (
            str(item["concurrency"]),
            f"{item['exact_match']:.3f}",
            f"{item['tokens_per_forward']:.2f}",
            str(item["forwards"]),
            str(item["rows"]),
            f"{item['tokens_per_second']:.0f}",
            "" if share is None else f"{share:.2f}",
            f"{item['speed_over_static']:.2f}",
            f"{item['speed_over_base']:.2f}",
            f"{item['cpu_speed_over_base']:.3f}",
            f"{item['forwards_of_base_over']:.2f}",
            f"{item['identical']:.3f}",
        )
        lines.append(
            f"{item['preset']:{width}}" + "".join(f"{cell:>10}" for cell in cells)
        )
    return "\n".join(lines) + "\n"
