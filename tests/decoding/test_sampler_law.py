# SPDX-License-Identifier: Apache-2.0
"""The law of the sampler: what is drawn has the probabilities it should have.

Chi-square against the exact probabilities, with fixed seeds. Each kind of test is
shown to reject a sampler with a typical mistake, so passing means something.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_unmask.decoding.sampling import (
    CANDIDATE_STREAM,
    ORDER_STREAM,
    sample,
    uniform,
)

DRAWS = 40_000
# All seeds are fixed, so a test that passes always does. The bound leaves room for
# about 50 tests; every control exceeds it by far.
P_VALUE = 1e-4
MASK64 = (1 << 64) - 1
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)

Uniform = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
Sample = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def chi_square_p_value(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """P-value of counts [bins] under expected counts, small bins merged."""
    order = expected.argsort()
    expected, observed = expected[order].double(), observed[order].double()
    # Rare bins are joined, smallest first, until each holds at least 5.
    groups, held = [0], 0.0
    for value in expected.tolist():
        if held >= 5:
            groups.append(groups[-1] + 1)
            held = 0.0
        else:
            groups.append(groups[-1])
        held += value
    index = torch.tensor(groups[1:])
    if held < 5 and int(index[-1]) > 0:
        index[index == index[-1]] -= 1
    bins = int(index[-1]) + 1
    e = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, expected)
    o = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, observed)
    if bool((o[e == 0] > 0).any()):
        return 0.0
    statistic = ((o - e) ** 2 / e).sum()
    half = torch.tensor((bins - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


def law_p_value(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    probs = logits.double().softmax(dim=-1)
    observed = torch.bincount(tokens, minlength=len(probs))
    return chi_square_p_value(observed, probs * len(tokens))


def draw_tokens(
    logits: torch.Tensor,
    vary: str,
    *,
    uniform: Uniform = uniform,
    sample: Sample = sample,
) -> torch.Tensor:
    """Many tokens of one row of logits, one argument of ``uniform`` varied."""
    number = DRAWS if len(logits) < 1000 else DRAWS // 4
    arguments = {"seed": 12345, "position": 77, "step": 3}
    seeds, positions, steps = (
        torch.arange(number) if name == vary else torch.full((number,), value)
        for name, value in arguments.items()
    )
    draws = uniform(seeds, positions, steps, CANDIDATE_STREAM)
    probs = logits.softmax(dim=-1)
    size = max(1, (1 << 20) // len(logits))
    return torch.cat(
        [sample(probs.expand(len(part), -1), part) for part in draws.split(size)]
    )


def spread(vocab: int, scale: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


LAWS = {
    "two": torch.tensor([0.0, 1.0]),
    "narrow": spread(16, 1.0),
    "peaked": spread(16, 4.0),
    "banned": torch.where(torch.arange(16) % 3 == 0, -torch.inf, spread(16, 1.0)),
    "wide": spread(4096, 2.0),
}


@pytest.mark.parametrize("vary", ["seed", "position", "step"])
@pytest.mark.parametrize("name", [n for n in LAWS if n != "wide"])
def test_sampler_law(name: str, vary: str) -> None:
    tokens = draw_tokens(LAWS[name], vary)
    assert law_p_value(LAWS[name], tokens) > P_VALUE
    assert bool((LAWS[name][tokens] > -torch.inf).all())


def test_sampler_law_of_a_wide_vocabulary() -> None:
    assert law_p_value(LAWS["wide"], draw_tokens(LAWS["wide"], "position")) > P_VALUE


def _biased(
    seeds: torch.Tensor, positions: torch.Tensor, steps: torch.Tensor, stream: int
) -> torch.Tensor:
    return uniform(seeds, positions, steps, stream) ** 1.05


def _part_of_the_range(
    seeds: torch.Tensor, positions: torch.Tensor, steps: torch.Tensor, stream: int
) -> torch.Tensor:
    return uniform(seeds, positions, steps, stream) * 0.98


def _blind_to_position(
    seeds: torch.Tensor, positions: torch.Tensor, steps: torch.Tensor, stream: int
) -> torch.Tensor:
    return uniform(seeds, torch.zeros_like(positions), steps, stream)


def _one_past(probs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    return (sample(probs, draws) + 1).clamp(max=probs.shape[1] - 1)


def _left_of_a_coarse_draw(probs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The wrong side of searchsorted, which shows where draws meet the borders."""
    cdf = probs.double().cumsum(dim=-1)
    coarse = (draws * 64).floor() / 64
    return torch.searchsorted(cdf, (coarse * cdf[:, -1])[:, None]).squeeze(1)


def _ignoring_the_total(probs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    cdf = (probs * 0.97).double().cumsum(dim=-1)
    index = torch.searchsorted(cdf, draws[:, None], right=True).squeeze(1)
    return index.clamp(max=probs.shape[1] - 1)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"uniform": _biased}, id="biased"),
        pytest.param({"uniform": _part_of_the_range}, id="part-of-the-range"),
        pytest.param({"uniform": _blind_to_position}, id="one-draw-for-all"),
        pytest.param({"sample": _one_past}, id="off-by-one"),
        pytest.param({"sample": _ignoring_the_total}, id="not-normalised"),
    ],
)
def test_the_law_rejects_a_wrong_sampler(wrong: dict[str, Any]) -> None:
    tokens = draw_tokens(LAWS["narrow"], "position", **wrong)
    assert law_p_value(LAWS["narrow"], tokens) < P_VALUE * 1e-3


@pytest.mark.parametrize("wrong", [_one_past, _ignoring_the_total])
def test_the_wide_law_rejects_a_wrong_sampler(wrong: Sample) -> None:
    tokens = draw_tokens(LAWS["wide"], "position", sample=wrong)
    assert law_p_value(LAWS["wide"], tokens) < P_VALUE * 1e-3


def test_the_law_rejects_the_wrong_side_of_the_border() -> None:
    """Probabilities of 1/8 have their borders on the grid of the coarse draws."""
    logits = torch.zeros(8)
    tokens = draw_tokens(logits, "position", sample=_left_of_a_coarse_draw)
    assert law_p_value(logits, tokens) < P_VALUE * 1e-3


def joint_p_value(first: torch.Tensor, second: torch.Tensor, bins: int) -> float:
    """Chi-square of pairs of uniform draws against independence."""
    cell = (first * bins).long() * bins + (second * bins).long()
    observed = torch.bincount(cell, minlength=bins * bins)
    expected = torch.full((bins * bins,), len(first) / bins**2)
    return chi_square_p_value(observed, expected)


SEEDS = torch.arange(DRAWS)
ZERO = torch.zeros(DRAWS, dtype=torch.int64)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((SEEDS, ZERO + 1, ZERO, CANDIDATE_STREAM), id="next-position"),
        pytest.param((SEEDS, ZERO + 32, ZERO, CANDIDATE_STREAM), id="next-block"),
        pytest.param((SEEDS, ZERO, ZERO + 1, CANDIDATE_STREAM), id="next-step"),
        pytest.param((SEEDS, ZERO + 1, ZERO + 1, CANDIDATE_STREAM), id="diagonal"),
        pytest.param((SEEDS, ZERO, ZERO, ORDER_STREAM), id="order"),
        pytest.param((SEEDS + 1, ZERO, ZERO, CANDIDATE_STREAM), id="next-seed"),
        pytest.param((ZERO, SEEDS, ZERO, CANDIDATE_STREAM), id="seed-as-position"),
        pytest.param((ZERO, ZERO, SEEDS, CANDIDATE_STREAM), id="seed-as-step"),
    ],
)
@pytest.mark.parametrize("bins", [4, 20])
def test_two_draws_are_independent(
    other: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], bins: int
) -> None:
    base = uniform(SEEDS, ZERO, ZERO, CANDIDATE_STREAM)
    assert joint_p_value(base, uniform(*other), bins) > P_VALUE


def test_position_and_step_do_not_trade_places() -> None:
    base = uniform(SEEDS, ZERO + 1, ZERO + 2, CANDIDATE_STREAM)
    other = uniform(SEEDS, ZERO + 2, ZERO + 1, CANDIDATE_STREAM)
    assert joint_p_value(base, other, 10) > P_VALUE


@pytest.mark.parametrize("kind", ["shared", "reversed", "shifted", "half shared"])
def test_independence_rejects_a_dependent_pair(kind: str) -> None:
    base = uniform(SEEDS, ZERO, ZERO, CANDIDATE_STREAM)
    other = {
        "shared": base,
        "reversed": 1 - 2.0**-53 - base,
        "shifted": (base + 0.3) % 1,
        "half shared": torch.where(
            SEEDS % 2 == 0, base, uniform(SEEDS, ZERO + 1, ZERO, CANDIDATE_STREAM)
        ),
    }[kind]
    assert joint_p_value(base, other, 10) < P_VALUE * 1e-3


def test_two_positions_have_the_product_law() -> None:
    """Tokens of two positions of one request, with different distributions."""
    left, right = LAWS["narrow"], LAWS["banned"]
    tokens = [
        sample(
            logits.softmax(dim=-1).expand(DRAWS, -1),
            uniform(SEEDS, ZERO + position, ZERO, CANDIDATE_STREAM),
        )
        for position, logits in enumerate((left, right))
    ]
    expected = left.softmax(-1)[:, None] * right.softmax(-1)[None, :] * DRAWS
    observed = torch.bincount(tokens[0] * 16 + tokens[1], minlength=256)
    assert chi_square_p_value(observed, expected.flatten()) > P_VALUE
    dependent = torch.bincount(tokens[0] * 16 + tokens[0], minlength=256)
    assert chi_square_p_value(dependent, expected.flatten()) < P_VALUE * 1e-3


def integer_uniform(seed: int, position: int, step: int, stream: int) -> float:
    """splitmix64 in unbounded integers, apart from torch's arithmetic."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK64
        x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK64
        return x ^ x >> 31

    x = seed
    for counter in (stream, position, step):
        x = mix(x + 0x9E3779B97F4A7C15 * (counter + 1) & MASK64)
    return (x >> 11) * 2.0**-53


@given(
    st.lists(
        st.tuples(INT64, st.integers(0, 1 << 40), st.integers(0, 1 << 20)), min_size=1
    ),
    st.sampled_from([CANDIDATE_STREAM, ORDER_STREAM]),
)
def test_uniform_is_a_pure_function_of_its_row(
    rows: list[tuple[int, int, int]], stream: int
) -> None:
    """Seeds anywhere in int64; neighbours in the batch make no difference."""
    table = torch.tensor(rows)
    batch = uniform(table[:, 0], table[:, 1], table[:, 2], stream)
    assert batch.dtype == torch.float64
    assert batch.tolist() == [integer_uniform(*row, stream) for row in rows]
    assert all(0 <= value < 1 for value in batch.tolist())


def test_uniform_tells_everything_apart() -> None:
    grid = torch.cartesian_prod(
        torch.tensor([-(1 << 63), -1, 0, 1, (1 << 63) - 1]),
        torch.arange(40),
        torch.arange(20),
    )
    draws = torch.cat(
        [uniform(grid[:, 0], grid[:, 1], grid[:, 2], stream) for stream in (0, 1)]
    )
    assert len(draws.unique()) == len(draws)


def test_uniform_moments() -> None:
    draws = uniform(SEEDS, ZERO, ZERO, CANDIDATE_STREAM)
    error = math.sqrt(1 / 12 / DRAWS)
    assert abs(float(draws.mean()) - 0.5) < 4 * error
    bins = torch.bincount((draws * 100).long(), minlength=100)
    assert chi_square_p_value(bins, torch.full((100,), DRAWS / 100)) > P_VALUE


def test_chi_square_against_known_values() -> None:
    """Upper tail of the chi-square distribution, from tables."""
    expected = torch.tensor([100.0, 100.0])
    # Statistic 2 * 10**2 / 100 = 2 with 1 degree of freedom.
    observed = torch.tensor([100 + 10.0, 100 - 10.0])
    assert chi_square_p_value(observed, expected) == pytest.approx(0.15730, abs=1e-5)
    four = torch.full((4,), 50.0)
    observed = torch.tensor([57.0, 46.0, 52.0, 45.0])
    statistic = (49 + 16 + 4 + 25) / 50
    closed = math.erfc(math.sqrt(statistic / 2)) + math.sqrt(
        2 * statistic / math.pi
    ) * math.exp(-statistic / 2)
    assert chi_square_p_value(observed, four) == pytest.approx(closed, rel=1e-9)


def test_small_bins_are_merged() -> None:
    expected = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.5, 1.0, 50.0, 44.5])
    observed = torch.tensor([0.0, 0.0, 0.0, 5.5, 0.0, 0.0, 50.0, 44.5])
    assert chi_square_p_value(observed, expected) == pytest.approx(1.0)
