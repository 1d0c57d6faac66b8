# SPDX-License-Identifier: Apache-2.0
"""Rows of the quality report: shares, ratios, their intervals, the Pareto front."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from quality_grid import Config

Array = npt.NDArray[np.float64]
Interval = list[float]

RESAMPLES = 2000
ALL = "all"


class Outcome(NamedTuple):
    """One configuration on every prompt; arrays float64 [prompts]."""

    right: Array  # 1 if the answer is right, else 0
    tokens: Array  # of the answer, stop token included
    forwards: Array  # denoising steps of the request
    blocks: Array  # that the answer lies in
    single: Array  # blocks of these that one forward completed, or none
    rows: float | None  # computed in all forwards
    seconds: float

    def of(self, members: npt.NDArray[np.intp]) -> "Outcome":
        """The same for some prompts only; `rows` and `seconds` stay those of all."""
        return self._replace(
            right=self.right[members],
            tokens=self.tokens[members],
            forwards=self.forwards[members],
            blocks=self.blocks[members],
            single=self.single[members],
        )


def exact_match(outcome: Outcome, draws: npt.NDArray[np.intp]) -> Array:
    """Share of right answers in each draw, [draws]."""
    share: Array = outcome.right[draws].mean(axis=-1)
    return share


def tokens_per_forward(outcome: Outcome, draws: npt.NDArray[np.intp]) -> Array:
    """Tokens of all answers over forwards of all requests in each draw, [draws]."""
    quotient: Array = outcome.tokens[draws].sum(-1) / outcome.forwards[draws].sum(-1)
    return quotient


class Bootstrap:
    """Percentile intervals over prompts.

    All statistics see the same draws, so that differences are paired by prompt.

    Args:
        count: prompts.
        seed: of the draws.
        resamples: draws.
    """

    def __init__(self, count: int, seed: int = 0, resamples: int = RESAMPLES) -> None:
        rng = np.random.default_rng(seed)
        self.whole = np.arange(count)[None]
        self.draws = rng.integers(count, size=(resamples, count))

    def __call__(
        self, statistic: Callable[[npt.NDArray[np.intp]], Array]
    ) -> tuple[float, Interval]:
        """The statistic and its 95 % interval.

        Args:
            statistic: maps prompt indices [draws, prompts] to values [draws].
        """
        low, high = np.quantile(statistic(self.draws), [0.025, 0.975])
        return float(statistic(self.whole)[0]), [float(low), float(high)]


def difference(
    outcome: Outcome, baseline: Outcome, bootstrap: Bootstrap
) -> dict[str, Any]:
    """Exact match minus the baseline's, tokens per forward over the baseline's."""
    match, match_interval = bootstrap(
        lambda draws: exact_match(outcome, draws) - exact_match(baseline, draws)
    )
    ratio, ratio_interval = bootstrap(
        lambda draws: (
            tokens_per_forward(outcome, draws) / tokens_per_forward(baseline, draws)
        )
    )
    return {
        "exact_match": match,
        "exact_match_interval": match_interval,
        "tokens_per_forward_ratio": ratio,
        "tokens_per_forward_ratio_interval": ratio_interval,
    }


def row(
    config: Config,
    outcome: Outcome,
    baseline: Outcome,
    groups: Mapping[str, npt.NDArray[np.intp]],
    asked: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """One row.

    Args:
        config: what was measured.
        outcome: what came out.
        baseline: what the baseline gave for the same prompts.
        groups: name -> indices of prompts; `all` is one of them.
        asked: groups whose difference to the baseline is of interest.
        seed: of the bootstrap.
    """
    bootstraps = {name: Bootstrap(len(of), seed) for name, of in groups.items()}
    parts = {name: outcome.of(of) for name, of in groups.items()}
    bases = {name: baseline.of(of) for name, of in groups.items()}
    matches = {
        name: bootstraps[name](partial(exact_match, part))
        for name, part in parts.items()
    }
    speed, speed_interval = bootstraps[ALL](partial(tokens_per_forward, parts[ALL]))
    tokens = outcome.tokens.sum()
    return {
        "kind": config.kind,
        "preset": config.strategy,
        "label": config.label,
        "options": dict(config.options),
        "parameters": config.parameters,
        "exact_match": {name: value for name, (value, _) in matches.items()},
        "exact_match_interval": {name: both for name, (_, both) in matches.items()},
        "tokens_per_forward": speed,
        "tokens_per_forward_interval": speed_interval,
        "tokens_per_forward_by_task": {
            name: part.tokens.sum() / part.forwards.sum()
            for name, part in parts.items()
        },
        "forwards": int(outcome.forwards.sum()),
        "tokens": int(tokens),
        "rows_per_token": None if outcome.rows is None else outcome.rows / tokens,
        "tokens_per_second": tokens / outcome.seconds,
        # Tokens per forward if each block took one.
        "ceiling": {
            name: parts[name].tokens.sum() / parts[name].blocks.sum() for name in asked
        },
        "blocks_in_one_forward": {
            name: parts[name].single.sum() / parts[name].blocks.sum() for name in asked
        },
        "difference": {
            name: difference(parts[name], bases[name], bootstraps[name])
            for name in asked
        },
    }


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats, by their first coordinate.

    A point beats another if it is at least as large in both coordinates and larger in
    one. Of equal points the first one stays.
    """
    order = sorted(range(len(points)), key=lambda i: (*points[i], -i), reverse=True)
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front[::-1]
