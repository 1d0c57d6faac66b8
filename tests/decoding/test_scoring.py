# SPDX-License-Identifier: Apache-2.0
"""Candidate, confidence and order score of a row."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unmask.decoding import scoring
from vllm_unmask.decoding.sampling import (
    CANDIDATE_STREAM,
    ORDER_STREAM,
    sample,
    transform,
    uniform,
)
from vllm_unmask.decoding.scoring import (
    ORDERS,
    SamplingRows,
    Scores,
    score,
)

INF = math.inf
NAN = math.nan


@dataclass
class Row:
    """One logits row with the parameters of its request."""

    logits: list[float]
    temperature: float = 0.0
    top_k: int = 1 << 20
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    step: int = 0
    raw: bool = False
    order: str = "confidence"

    @property
    def truncates(self) -> bool:
        return (self.top_k, self.top_p, self.min_p) != (1 << 20, 1.0, 0.0)


def score_rows(rows: list[Row]) -> Scores:
    """``score`` with every flag as the sampler would set it."""

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=dtype)

    orders = torch.tensor([ORDERS.index(row.order) for row in rows])
    used = frozenset(orders.tolist())
    sampled = any(row.temperature for row in rows)
    parameters = SamplingRows(
        column("temperature", torch.float32),
        column("top_k", torch.int64),
        column("top_p", torch.float32),
        column("min_p", torch.float32),
        column("seed", torch.int64),
        column("position", torch.int64),
        column("step", torch.int64),
    )
    draws = sampled or ORDERS.index("random") in used
    return score(
        column("logits", torch.float32),
        parameters if draws else None,
        sampled=sampled,
        raw_confidence=column("raw", torch.bool) if sampled else None,
        orders=orders if used != {0} else None,
        orders_used=used,
        truncated=any(row.truncates for row in rows if row.temperature),
        raw_used=any(row.raw for row in rows),
    )


def softmax(logits: list[float]) -> list[float]:
    peak = max(logits)
    if not math.isfinite(peak):
        return [NAN] * len(logits)
    mass = [math.exp(x - peak) for x in logits]
    return [m / sum(mass) for m in mass]


def expected(row: Row) -> tuple[int, float, float]:
    """The row's candidate, confidence and order score, in Python floats."""
    logits = [-INF if math.isnan(x) else x for x in row.logits]
    plain = softmax(logits)
    token = logits.index(max(logits))
    counters = torch.tensor([[row.seed], [row.position], [row.step]])
    probs = plain
    if row.temperature:
        kept = transform(
            torch.tensor([logits]),
            torch.tensor([row.temperature]),
            torch.tensor([row.top_k]),
            torch.tensor([row.top_p]),
            torch.tensor([row.min_p]),
        )
        probs = softmax(kept[0].tolist())
        if not math.isnan(probs[0]):
            draw = uniform(counters[0], counters[1], counters[2], CANDIDATE_STREAM)
            token = int(sample(torch.tensor([probs], dtype=torch.float64), draw))
    source = plain if row.raw else probs
    confidence = 0.0 if math.isnan(source[token]) else source[token]
    if row.order == "confidence":
        return token, confidence, confidence
    if row.order == "random":
        return (
            token,
            confidence,
            float(uniform(counters[0], counters[1], counters[2], ORDER_STREAM)),
        )
    if math.isnan(source[0]):
        return token, confidence, 0.0 if row.order == "margin" else -INF
    if row.order == "margin":
        first, second = sorted(source, reverse=True)[:2]
        return token, confidence, first - second
    return token, confidence, sum(p * math.log(p) for p in source if p)


def same(left: Scores, row: int, right: Scores) -> bool:
    """Bit for bit: a threshold may lie between any two floats."""
    return all(bool(a[row] == b[0]) for a, b in zip(left, right, strict=True))


LOGIT = st.sampled_from([-INF, NAN, -4.0, -1.0, 0.0, 0.5, 0.5, 1.0, 3.0, 9.0])


@st.composite
def batches(draw: st.DrawFn) -> list[Row]:
    vocab = draw(st.integers(2, 7))
    row = st.builds(
        Row,
        logits=st.lists(LOGIT, min_size=vocab, max_size=vocab)
        | st.lists(
            st.sampled_from([-INF, INF, NAN, 0.0]), min_size=vocab, max_size=vocab
        ),
        temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        top_k=st.sampled_from([1 << 20, 1, 2]),
        top_p=st.sampled_from([1.0, 0.6]),
        min_p=st.sampled_from([0.0, 0.3]),
        seed=st.integers(-(1 << 63), (1 << 63) - 1),
        position=st.integers(0, 1000),
        step=st.integers(0, 32),
        raw=st.booleans(),
        order=st.sampled_from(ORDERS),
    )
    return draw(st.lists(row, min_size=1, max_size=5))


@settings(max_examples=120)
@given(batches())
def test_score_is_the_row_by_row_specification(rows: list[Row]) -> None:
    """Greedy and sampled rows, all orders and broken logits in one batch."""
    scores = score_rows(rows)
    assert [s.dtype for s in scores] == [torch.int64, torch.float32, torch.float32]
    for index, row in enumerate(rows):
        token, confidence, order = expected(row)
        assert int(scores.tokens[index]) == token
        assert float(scores.confidence[index]) == pytest.approx(confidence, abs=2e-6)
        assert float(scores.order[index]) == pytest.approx(order, abs=2e-6)
        assert same(scores, index, score_rows([row])), "depends on its neighbours"


@pytest.mark.parametrize("vocab", [7, 512, 4099])
def test_a_row_gets_what_it_gets_alone(vocab: int) -> None:
    """Sizes that are read in groups and in parts, and sizes that are not."""
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randn(90, vocab, generator=g) * 4
    rows = [
        Row(
            logits[i].tolist(),
            temperature=[0.0, 0.8, 1.0][i % 3],
            top_p=[1.0, 0.9][i % 2],
            seed=i // 8,
            position=i,
            raw=i % 5 == 0,
            order=ORDERS[i % 4],
        )
        for i in range(90)
    ]
    scores = score_rows(rows)
    greedy = score_rows([Row(row.logits) for row in rows])
    for index, row in enumerate(rows):
        assert same(scores, index, score_rows([row]))
        if not row.temperature:
            assert scores.tokens[index] == greedy.tokens[index]
            assert scores.confidence[index] == greedy.confidence[index]
    reference = logits.double().softmax(dim=-1)
    assert torch.equal(greedy.tokens, logits.argmax(dim=-1))
    torch.testing.assert_close(
        greedy.confidence.double(), reference.amax(dim=-1), rtol=5e-6, atol=0
    )


@settings(max_examples=150)
@given(st.data())
def test_the_smallest_token_of_a_tie_wins(data: st.DataObject) -> None:
    """Wherever the ties are: within a group, in two, in the part past the last."""
    vocab = data.draw(st.integers(1, 200) | st.integers(4090, 4300))
    logits = torch.full((3, vocab), -1.0)
    for row in range(3):
        # From the end, where the last group is often not full.
        for back in data.draw(st.sets(st.integers(1, vocab), max_size=4)):
            place = vocab - back
            logits[row, place] = data.draw(st.sampled_from([NAN, 2.0, 2.0, INF, -INF]))
    result = score(
        logits,
        None,
        sampled=False,
        raw_confidence=None,
        orders=None,
        orders_used=frozenset({0}),
    )
    for row, token in zip(logits.tolist(), result.tokens.tolist(), strict=True):
        clean = [-INF if math.isnan(x) else x for x in row]
        assert token == clean.index(max(clean))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("logits", "token"),
    [
        pytest.param([-INF] * 4, 0, id="all-banned"),
        pytest.param([NAN] * 4, 0, id="all-nan"),
        pytest.param([NAN, -INF, NAN, -INF], 0, id="nan-and-banned"),
        pytest.param([0.0, INF, 1.0, INF], 1, id="infinite"),
    ],
)
def test_a_row_without_distribution_is_least_sure(
    logits: list[float], token: int, order: str, temperature: float
) -> None:
    """Neither a draw nor an error: token by rule, and last in any order."""
    good = Row([0.0, 0.1, 0.2, 0.3], temperature, order=order)
    scores = score_rows([Row(logits, temperature, order=order), good])
    assert int(scores.tokens[0]) == token
    assert float(scores.confidence[0]) == 0
    if order != "random":
        assert float(scores.order[0]) < float(scores.order[1])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_nan_and_banned_tokens_are_never_taken(temperature: float) -> None:
    logits = [NAN, -INF, 0.0, NAN, -INF, 1.0]
    rows = [Row(logits, temperature, position=i) for i in range(200)]
    taken = set(score_rows(rows).tokens.tolist())
    assert taken == ({5} if temperature == 0 else {2, 5})


@pytest.mark.parametrize(("raw", "confidence"), [(False, 1.0), (True, 0.5)])
def test_confidence_before_or_after_the_transform(raw: bool, confidence: float) -> None:
    """A nucleus of one token is sure by construction, the plain softmax is not."""
    row = Row([2.0, 2.0], temperature=1.0, top_k=1, raw=raw)
    assert float(score_rows([row]).confidence[0]) == confidence


def test_a_greedy_row_is_never_truncated() -> None:
    """Also next to a sampled one, whose parameters it happens to share."""
    rows = [Row([1.0, 1.0], 0.0, top_k=1, top_p=0.1), Row([1.0, 1.0], 1.0, top_k=1)]
    assert score_rows(rows).confidence.tolist() == [0.5, 1.0]


def test_seed_position_and_step_decide_a_draw() -> None:
    logits = [0.0] * 64
    base = Row(logits, 1.0, seed=5, position=9, step=2)
    rows = [
        base,
        Row(logits, 1.0, seed=6, position=9, step=2),
        Row(logits, 1.0, seed=5, position=10, step=2),
        Row(logits, 1.0, seed=5, position=9, step=3),
        base,
    ]
    tokens = score_rows(rows).tokens.tolist()
    assert tokens[0] == tokens[4]
    assert len(set(tokens)) == 4


def test_logits_are_not_written() -> None:
    """The log-probabilities of the answer are read from them afterwards."""
    logits = torch.tensor([[0.0, NAN, -INF, INF], [1.0, 2.0, 3.0, 4.0]])
    before = logits.clone()
    scoring.score(
        logits,
        SamplingRows(
            torch.ones(2),
            torch.tensor([2, 2]),
            torch.full((2,), 0.5),
            torch.full((2,), 0.1),
            *torch.zeros(3, 2, dtype=torch.int64),
        ),
        sampled=True,
        raw_confidence=torch.tensor([True, False]),
        orders=torch.tensor([1, 2]),
        orders_used=frozenset({1, 2}),
    )
    torch.testing.assert_close(logits, before, equal_nan=True, rtol=0, atol=0)
