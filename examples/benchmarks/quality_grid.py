# SPDX-License-Identifier: Apache-2.0
"""What the quality report measures: strategies and values of their options.

Every preset as published; every filler, alone, over the option that trades quality for
speed; compositions. An empty choice stands for the defaults.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vllm_unmask.presets import FILLERS, PRESETS, compose

Options = Mapping[str, Any]

# Self-speculation has a report of its own, `speculation.py`: what it is about is how
# many forwards an output takes. The rule for a streaming window says little of a model
# with blocks.
_ELSEWHERE = {"entropy_distance"} | {
    name for name, filler in FILLERS.items() if filler.slot == "speculate"
}
STRATEGIES = [
    *(name for name in FILLERS if name not in _ELSEWHERE),
    *(name for name in PRESETS if _ELSEWHERE.isdisjoint(compose(name).fillers)),
]


class Config(NamedTuple):
    """What a row of the result is about."""

    kind: str  # preset, filler or composition
    strategy: str
    options: Options

    @property
    def label(self) -> str:
        values = [f"{name}={value}" for name, value in self.options.items()]
        return " ".join([self.strategy, *values])

    @property
    def parameters(self) -> dict[str, Any]:
        """Every option of the strategy's fillers, and what was given or preset."""
        composition = compose(self.strategy)
        return {**composition.defaults, **composition.values, **self.options}

    @property
    def extra_args(self) -> dict[str, Any]:
        """Request options of this plugin."""
        options = {f"unmask_{name}": value for name, value in self.options.items()}
        return {"unmask_strategy": self.strategy, "unmask_trace": True, **options}


def _over(name: str, *values: Any) -> tuple[Options, ...]:
    return tuple({name: value} for value in values)


BASELINE = Config("filler", "threshold", {})

# Filler -> choices besides its defaults; --quick takes the first one.
CHOICES: Mapping[str, tuple[Options, ...]] = {
    "static": _over("steps", 4, 2),
    "threshold": _over("threshold", 0.7, 0.5, 0.8, 0.95),
    "factor": _over("factor", 2.0, 0.5, 4.0),
    "entropy_bounded": _over("entropy_bound", 0.5, 0.3, 1.0),
    "entropy_threshold": _over("entropy_bound", 1.0, 0.25, 1.5),
    "klass": _over("kl_history", 0, 1),
    "local_leap": _over("relaxed_threshold", 0.5, 0.4, 0.6),
    "hierarchy": _over("low_threshold", 0.2, 0.1, 0.6),
    "bacd": _over("low_threshold", 0.4, 0.5, 0.8),
    # The demo model's answers end long before half of max_tokens.
    "cad": ({"end_gate": 0.0, "max_reveals": 8}, {"end_gate": 0.0}),
    "ccd": ({"warm_up": 0}, {"expand": 8.0}),
    "dimple": _over("threshold", 0.7, 0.5, 0.85),
    "learned": _over("threshold", 0.9, 0.8, 0.99),
    "credit": _over("credit_weight", 1.5, 0.3, 3.0),
    "eos_rejection": _over("end_floor", 0.01, 0.8),
    "sub_blocks": _over("sub_block_length", 4, 1),
    # No answer of the demo model has a new line.
    "adablock": (
        {"delimiter": "comma"},
        {"delimiter": "comma", "delimiter_threshold": 0.6},
        {"delimiter": "comma", "sub_block_length": 4},
    ),
    "prophet": _over("gap_high", 5.0, 4.0, 3.0),
    "sched": (
        {"gap_high": 5.0},
        {"gap_high": 4.0},
        {"gap_high": 5.0, "gap_agreement": True},
    ),
    "end_of_text": _over("threshold", 0.7, 0.5),
    "edit": _over("edit_threshold", 0.99, 0.7),
    "remdm": (
        {"remask": "cap", "remask_rate": 0.02},
        {"remask": "rescale", "remask_rate": 0.02},
    ),
    "rcr": _over("steps", 4, 2),
    "lookahead": _over("ahead_threshold", 0.99, 0.9, 0.8),
}

# In --quick each with its first choice alone.
COMPOSITIONS: Mapping[str, tuple[Options, ...]] = {
    "credit+hierarchy+end_of_text": (
        {"low_threshold": 0.2},
        {"low_threshold": 0.2, "credit_weight": 0.3},
        {"low_threshold": 0.2, "threshold": 0.95},
        {"low_threshold": 0.1, "threshold": 0.95},
    ),
    "credit+hierarchy": (
        {"low_threshold": 0.2},
        {"low_threshold": 0.2, "credit_weight": 0.3},
    ),
    "hierarchy+end_of_text": _over("low_threshold", 0.1, 0.2),
    "hierarchy+lookahead": (
        {"low_threshold": 0.2, "ahead_threshold": 0.99},
        {"low_threshold": 0.2},
    ),
    "hierarchy+end_of_text+lookahead": (
        {"low_threshold": 0.1, "ahead_threshold": 0.99},
    ),
    "hierarchy+end_of_text+prophet": (
        {"low_threshold": 0.2, "gap_high": 6.0},
        {"low_threshold": 0.2, "gap_high": 5.0},
    ),
    "credit+local_leap": ({}, {"credit_weight": 0.3}),
    "credit+local_leap+prophet": (
        {},
        {"relaxed_threshold": 0.6},
        {"relaxed_threshold": 0.5, "gap_high": 5.0},
    ),
    "local_leap+end_of_text": ({}, {"relaxed_threshold": 0.85}, {"radius": 1}),
    "local_leap+lookahead": ({"ahead_threshold": 0.99},),
    "credit+threshold+end_of_text": ({}, *_over("threshold", 0.7, 0.5)),
    "credit+threshold+lookahead": (
        {},
        {"threshold": 0.7},
        {"ahead_threshold": 0.99},
    ),
    "factor+lookahead": ({"ahead_threshold": 0.99}, {"factor": 2.0}),
    "factor+end_of_text": ({}, {"factor": 0.7}),
    "credit+factor+lookahead": (
        {"ahead_threshold": 0.99},
        {"factor": 0.5, "ahead_threshold": 0.99},
    ),
    "bacd+lookahead": ({"ahead_threshold": 0.99}, {"low_threshold": 0.5}),
    "learned+lookahead": ({}, {"threshold": 0.99, "ahead_threshold": 0.99}),
    "learned+end_of_text": _over("threshold", 0.99, 0.995),
    "sdar+lookahead+sched": ({}, {"gap_high": 5.0, "ahead_threshold": 0.99}),
    "sdar+sched+end_of_text": ({"gap_high": 6.0},),
    "entropy_threshold+prophet": ({"gap_high": 6.0},),
}


def grid(quick: bool, only: Iterable[str] | None = None) -> list[Config]:
    """All configurations; the first one is the baseline.

    Args:
        quick: two choices of each filler and one of each composition.
        only: strategies to take, and the baseline.
    """
    configs = [BASELINE]
    for name in (name for name in STRATEGIES if name in FILLERS):
        choices = CHOICES[name][: 1 if quick else None]
        configs += [Config("filler", name, options) for options in ({}, *choices)]
    configs += [Config("preset", name, {}) for name in STRATEGIES if name in PRESETS]
    for name, choices in COMPOSITIONS.items():
        choices = choices[: 1 if quick else None]
        configs += [Config("composition", name, options) for options in choices]
    if only is not None:
        wanted = set(only)
        configs = [BASELINE, *(c for c in configs if c.strategy in wanted)]
        for name in sorted(wanted - {c.strategy for c in configs}):
            compose(name)
            configs.append(Config("composition", name, {}))
    unique: dict[str, Config] = {}
    for config in configs:
        unique.setdefault(config.label, config)
    return list(unique.values())
