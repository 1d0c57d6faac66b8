# SPDX-License-Identifier: Apache-2.0
"""Which revealed tokens are replaced or masked again."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_cases import CONFIDENCE, THRESHOLD, Batch, Row, check, flags, where

from vllm_unmask.decoding.acceptance import accept_top
from vllm_unmask.decoding.revising import (
    doubted,
    edited,
    remasked_at_random,
    remasked_by_rank,
)

TOKEN = st.integers(0, 2)


@given(st.data())
def test_edited(data: st.DataObject) -> None:
    def rule(t: Row, c: Row, ids: Row, editable: Row, threshold: float) -> Row:
        columns = where(editable)
        return flags([i for i in columns if t[i] != ids[i] and c[i] > threshold], t)

    batch = Batch(data)
    check(
        edited,
        rule,
        batch.table(TOKEN),
        batch.table(CONFIDENCE),
        batch.table(TOKEN),
        batch.masked(),
        batch.each(THRESHOLD),
    )


@given(st.data())
def test_an_edit_settles(data: st.DataObject) -> None:
    """The same prediction again edits nothing; a threshold of 1 never does."""
    batch = Batch(data)
    tokens, ids = batch.table(TOKEN), batch.table(TOKEN)
    confidence, editable = batch.table(CONFIDENCE), batch.masked()
    threshold = batch.each(THRESHOLD)
    edits = edited(tokens, confidence, ids, editable, threshold)
    ids = torch.where(edits, tokens, ids)
    assert not edited(tokens, confidence, ids, editable, threshold).any()
    never = torch.ones(batch.rows)
    assert not edited(tokens, confidence, ids + 1, editable, never).any()


def random_rule(
    revealed: Row,
    confidence: Row,
    num_masks: int,
    num_next: int,
    rate: float,
    variant: int,
    draws: Row,
) -> list[bool]:
    columns = where(revealed)
    if not columns:
        return [False] * len(revealed)
    now = len(columns) / num_masks
    limit = min(1.0, max(0.0, 1 - num_next / num_masks) / now)
    sigma = dict.fromkeys(columns, [min(rate, limit), rate * limit, 0.0][variant])
    if variant == 2:
        mass = {c: math.exp(-confidence[c]) for c in columns}
        sigma = {c: m / sum(mass.values()) * limit for c, m in mass.items()}
    return flags([c for c in columns if draws[c] < sigma[c]], revealed)


@given(st.data())
def test_remasked_at_random(data: st.DataObject) -> None:
    batch = Batch(data)
    # Draws just off every simple fraction, which is where a sigma may be.
    draw = st.integers(0, 31).map(lambda n: (n + 0.3) / 32)
    check(
        remasked_at_random,
        random_rule,
        batch.masked(),
        batch.table(CONFIDENCE),
        batch.each(st.integers(batch.length, 12)),
        batch.each(st.integers(0, 14)),
        batch.each(st.sampled_from([0.0, 0.125, 0.5, 1.0])),
        batch.each(st.integers(0, 2)),
        batch.table(draw).double(),
    )


@pytest.mark.parametrize(
    ("variant", "rate", "num_next", "sigma"),
    [
        pytest.param(0, 0.1, 6, [0.1, 0.1, 0.1, 0.1], id="cap-below-the-limit"),
        pytest.param(0, 0.9, 6, [0.5, 0.5, 0.5, 0.5], id="cap-at-the-limit"),
        pytest.param(1, 0.4, 6, [0.2, 0.2, 0.2, 0.2], id="rescale"),
        pytest.param(1, 0.4, 2, [0.4, 0.4, 0.4, 0.4], id="limit-of-one"),
        pytest.param(0, 1.0, 8, [0.0, 0.0, 0.0, 0.0], id="nothing-may-go"),
        pytest.param(
            2,
            0.0,
            6,
            [0.5 * m / 6 for m in (3, 1, 1, 1)],
            id="by-confidence",
        ),
    ],
)
def test_law_of_remasking(
    variant: int, rate: float, num_next: int, sigma: list[float]
) -> None:
    """Share of the draws in which each of 4 revealed positions of 8 goes back."""
    rows = 40_000
    generator = torch.Generator().manual_seed(1)
    revealed = torch.tensor([True, False, True, True, True]).expand(rows, -1)
    # The first token counts three times as much as the others.
    confidence = torch.tensor([0.0, 0.2, *[math.log(3)] * 3]).expand(rows, -1)
    remasked = remasked_at_random(
        revealed,
        confidence,
        torch.full((rows,), 8),
        torch.full((rows,), num_next),
        torch.full((rows,), rate),
        torch.full((rows,), variant),
        torch.rand(rows, 5, generator=generator, dtype=torch.float64),
    )
    share = remasked.double().mean(dim=0)
    assert float(share[1]) == 0
    for got, want in zip(share[[0, 2, 3, 4]].tolist(), sigma, strict=True):
        # Five standard deviations.
        assert got == pytest.approx(
            want, abs=5 * math.sqrt(want * (1 - want) / rows) + 1e-12
        )


@given(st.data())
def test_no_rate_or_a_draw_of_almost_one_remasks_nothing(data: st.DataObject) -> None:
    batch = Batch(data)
    revealed, confidence = batch.masked(), batch.table(CONFIDENCE)
    zero = torch.zeros(batch.rows, dtype=torch.int64)
    num_masks, variant = zero + batch.length, batch.each(st.integers(0, 1))
    lowest = torch.zeros(batch.rows, batch.length, dtype=torch.float64)

    def remasked(rate: float, draws: torch.Tensor) -> torch.Tensor:
        rates = torch.full((batch.rows,), rate)
        return remasked_at_random(
            revealed, confidence, num_masks, zero, rates, variant, draws
        )

    assert not remasked(0.0, lowest).any()
    # Nothing has to be revealed next and all may go: then all do.
    assert torch.equal(remasked(1.0, lowest + 0.999), revealed)


@given(st.data())
def test_remasked_by_rank(data: st.DataObject) -> None:
    def rule(confidence: Row, live: Row, count: int) -> Row:
        # Of equals, the rightmost goes first.
        worst = sorted(where(live), key=lambda c: (confidence[c], -c))
        return flags(worst[:count], live)

    batch = Batch(data)
    confidence, live = batch.table(CONFIDENCE), batch.masked()
    count = batch.each(st.integers(0, batch.length + 2))
    back = check(remasked_by_rank, rule, confidence, live, count)
    kept = accept_top(confidence, live, live.sum(dim=1) - count)
    assert torch.equal(kept | back, live) and not (kept & back).any()


@given(st.data())
def test_doubted(data: st.DataObject) -> None:
    def rule(probability: Row, injected: Row, threshold: float) -> Row:
        return flags(
            [c for c in where(injected) if probability[c] < threshold], injected
        )

    batch = Batch(data)
    check(doubted, rule, batch.table(CONFIDENCE), batch.masked(), batch.each(THRESHOLD))
