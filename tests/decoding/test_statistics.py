# SPDX-License-Identifier: Apache-2.0
"""Statistics of logits rows against their definitions in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_unmask.decoding.scoring import score
from vllm_unmask.decoding.statistics import (
    RowStatistics,
    greedy_scores,
    row_statistics,
)

# Below, at and above what is searched in groups; no multiple of anything.
VOCABULARIES = (2, 7, 64, 4095, 4096, 4097, 5003, 12345)


def definition(logits: torch.Tensor) -> RowStatistics:
    """The same, as the docstring says it, in float64."""
    tokens, probability, gap, entropy = [], [], [], []
    for row in logits.double():
        peak = row.max()
        first, second = row.sort(descending=True).values[:2]
        token = int((row == peak).nonzero()[0])
        finite = row.isfinite()
        tokens.append(token)
        if not finite.any():
            probability.append(0.0)
            gap.append(0.0)
            entropy.append(math.log(len(row)))
            continue
        probs = row.softmax(dim=0)
        probability.append(float(probs[token]))
        gap.append(float(first - second))
        entropy.append(float(torch.special.entr(probs).sum()))
    return RowStatistics(
        torch.tensor(tokens),
        torch.tensor(probability),
        torch.tensor(gap),
        torch.tensor(entropy),
    )


def check(logits: torch.Tensor) -> RowStatistics:
    before = logits.clone()
    got, want = row_statistics(logits), definition(logits)
    assert torch.equal(logits, before)
    assert [x.dtype for x in got] == [torch.int64] + [torch.float32] * 3
    assert torch.equal(got.tokens, want.tokens)
    torch.testing.assert_close(got.probability, want.probability, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.gap, want.gap, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=2e-5, atol=2e-5)
    assert (got.entropy >= 0).all()
    return got


def rows(vocab: int, seed: int = 0) -> torch.Tensor:
    """Rows of every kind."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(14, vocab, generator=generator)
    noise[1] *= 8
    noise[2] *= 50
    noise[3] = 0  # all tied
    noise[4] = noise[4].round()  # many ties
    noise[5, -1] = 30  # the last column leads
    noise[6] += 1000  # far from 0
    noise[7] -= 1000
    noise[8, vocab // 2 :] = -math.inf
    noise[9] = -math.inf
    noise[10] = -math.inf
    noise[10, -1] = -3  # one finite logit
    noise[11, 1:] = -math.inf  # another, the first
    noise[12] = -math.inf
    noise[12, [0, -1]] = 2.5  # two, tied
    noise[13, :2] = torch.tensor([25.0, 24.0])  # two neighbours lead
    return noise


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_definition(vocab: int) -> None:
    got = check(rows(vocab))
    assert got.gap[10].isinf() and got.gap[11].isinf()
    assert got.entropy[10] == got.entropy[11] == 0
    assert got.probability[10] == got.probability[11] == 1
    assert got.gap[3] == got.gap[12] == 0
    assert got.probability[9] == got.gap[9] == 0


@given(
    st.lists(
        st.lists(
            st.sampled_from([-math.inf, -60.0, -1.0, 0.0, 0.125, 5.0, 80.0]),
            min_size=5,
            max_size=5,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_definition_on_few_values(table: list[list[float]]) -> None:
    check(torch.tensor(table))


@pytest.mark.parametrize("vocab", [7, 4097, 12345])
def test_entropy_on_request(vocab: int) -> None:
    """Without the entropy the rest is the same, bit for bit."""
    logits = rows(vocab)
    full, rest = row_statistics(logits), row_statistics(logits, entropy=False)
    assert (rest.entropy == 0).all()
    for name in ("tokens", "probability", "gap"):
        assert torch.equal(getattr(full, name), getattr(rest, name))


@pytest.mark.parametrize("vocab", [7, 4097])
def test_probability_on_request(vocab: int) -> None:
    logits = rows(vocab)
    full, rest = row_statistics(logits), row_statistics(logits, False, False)
    assert (rest.entropy == 0).all() and (rest.probability == 0).all()
    for name in ("tokens", "gap"):
        assert torch.equal(getattr(full, name), getattr(rest, name))
    assert all(map(torch.equal, full, row_statistics(logits, True, False)))


@pytest.mark.parametrize("vocab", [7, 4097])
def test_entropy_of_some_rows(vocab: int) -> None:
    """Whatever is read along with them."""
    logits = rows(vocab)
    unsure = torch.arange(len(logits)) % 3 == 0
    some, every = row_statistics(logits, unsure=unsure), row_statistics(logits)
    assert torch.equal(some.entropy, torch.where(unsure, every.entropy, 0.0))
    assert all(map(torch.equal, some[:3], every[:3]))


@pytest.mark.parametrize("vocab", [7, 4097])
def test_no_number(vocab: int) -> None:
    """NaN is no token; +inf leaves no distribution."""
    logits = rows(vocab)
    broken = logits.clone()
    broken[0, 3] = math.nan
    logits[0, 3] = -math.inf
    broken[9, 1:] = math.nan
    assert all(map(torch.equal, row_statistics(broken), row_statistics(logits)))
    logits[0, 4] = math.inf
    tokens, *others = row_statistics(logits)
    assert tokens[0] == 4
    assert [float(x[0]) for x in others] == [0, 0, pytest.approx(math.log(vocab))]


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_ties_go_to_the_smallest_token(vocab: int) -> None:
    places = torch.randperm(vocab, generator=torch.Generator().manual_seed(1))[:5]
    logits = torch.zeros(1, vocab)
    logits[0, places] = 3.0
    assert row_statistics(logits).tokens.tolist() == [int(places.min())]
    assert row_statistics(logits).gap.tolist() == [0.0 if vocab > 1 else math.inf]


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_greedy_scores(vocab: int, order: int) -> None:
    """The scores that would be read of the logits once more."""
    logits = rows(vocab)
    orders = torch.full((len(logits),), order)
    got = greedy_scores(row_statistics(logits), orders)
    want = score(
        logits,
        None,
        sampled=False,
        raw_confidence=None,
        orders=orders,
        orders_used=frozenset({order}),
    )
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.confidence, want.confidence)
    torch.testing.assert_close(got.order, want.order, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("vocab", [7, 4097, 12345])
def test_batches_change_nothing(vocab: int) -> None:
    """In whichever batch a row is."""
    logits = rows(vocab)
    expected = row_statistics(logits)
    for got in (
        RowStatistics(*(x.flip(0) for x in row_statistics(logits.flip(0)))),
        RowStatistics(
            *map(torch.cat, zip(*map(row_statistics, logits.split(1)), strict=True))
        ),
    ):
        for mine, other in zip(got, expected, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [40_000, 152_001])
def test_batches_change_nothing_with_threads(vocab: int, threads: int) -> None:
    """Threads share the sum over a single long row, but not one of several rows."""
    logits = rows(vocab)[:3]
    torch.set_num_threads(threads)
    try:
        together = row_statistics(logits)
        alone = [row_statistics(row) for row in logits.split(1)]
    finally:
        torch.set_num_threads(1)
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_no_rows() -> None:
    assert [x.shape for x in row_statistics(torch.zeros(0, 9))] == [(0,)] * 4
    assert [x.shape for x in row_statistics(torch.zeros(0, 5000))] == [(0,)] * 4
