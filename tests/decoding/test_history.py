# SPDX-License-Identifier: Apache-2.0
"""The rules that remember: whole blocks, step by step, one request at a time."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import (
    CONFIDENCE,
    INF,
    ORDER,
    THRESHOLD,
    Batch,
    Row,
    best,
    check,
    check_blind,
    flags,
    where,
)

from vllm_unmask.decoding.acceptance import accept_above, accept_top
from vllm_unmask.decoding.history import (
    Coherence,
    RevealedConfidence,
    Stability,
    accept_adaptive,
    accept_coherent,
    accept_stable,
    update_revealed,
    update_stability,
)

STEPS = st.lists(st.booleans(), min_size=1, max_size=8)


def test_stability_of_random_distributions() -> None:
    """Six steps of three requests, one of which begins a block in the middle."""
    generator = torch.Generator().manual_seed(0)
    rows, length, vocab = 3, 4, 6
    threshold = torch.tensor([0.2, 0.05, 1e-6])
    state: Stability | None = None
    history: list[list[torch.Tensor]] = [[] for _ in range(rows)]
    streak = [[0] * length for _ in range(rows)]
    probs = torch.rand(rows, length, vocab, generator=generator)
    seen = set()
    for now in range(6):
        # A drift that is large for some requests and none for others.
        drift = torch.rand(rows, length, vocab, generator=generator)
        change = (now % 3) * (torch.arange(length) % 3).view(-1, 1) * 0.5
        probs = ((probs + 1e-3) * (1 + change * drift)).softmax(dim=-1)
        step = torch.tensor([now, now, now if now < 3 else now - 3])
        state = update_stability(state, probs, step, threshold)
        assert torch.equal(state.probs, probs)
        for row in range(rows):
            if step[row] == 0:
                history[row] = []
            history[row].append(probs[row].double())
            for column in range(length):
                stable = False
                if len(history[row]) > 1:
                    last, p = history[row][-2][column], history[row][-1][column]
                    kl = sum(
                        a * math.log((a + 1e-12) / (b + 1e-12))
                        for a, b in zip(p.tolist(), last.tolist(), strict=True)
                    )
                    assert abs(kl - float(threshold[row])) > 1e-7, "too close to tell"
                    stable = kl < float(threshold[row])
                streak[row][column] = streak[row][column] + 1 if stable else 0
                seen.add((bool(step[row]), stable))
        assert state.streak.tolist() == streak
        assert state.streak.dtype == torch.int64
    assert seen == {(False, False), (True, False), (True, True)}


def test_a_token_that_was_impossible_is_a_change() -> None:
    """And one that has become impossible is not infinite either."""
    step = torch.tensor([1, 1])
    last = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    now = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])
    state = Stability(last, torch.full((2, 1), 3))
    threshold = torch.tensor([10.0, 0.75])
    # 0.5 log(0.5 / 1e-12) + 0.5 log(0.5) is about 13.1; log(2) about 0.69.
    assert update_stability(state, now, step, threshold).streak.tolist() == [[0], [4]]


@pytest.mark.parametrize("left", [math.nan, 0.2])
def test_stability_does_not_read_what_is_left_of_another_block(left: float) -> None:
    state = Stability(torch.full((2, 3, 5), left), torch.full((2, 3), 7))
    probs = torch.full((2, 3, 5), 0.2)
    step = torch.zeros(2, dtype=torch.int64)
    fresh = update_stability(state, probs, step, torch.ones(2))
    assert not fresh.streak.any()
    assert torch.equal(
        update_stability(None, probs, step, torch.ones(2)).streak, fresh.streak
    )


@given(st.data())
def test_accept_stable(data: st.DataObject) -> None:
    def rule(c: Row, masked: Row, streak: Row, bound: float, history: int) -> Row:
        columns = range(len(masked))
        return [masked[i] and streak[i] >= history and c[i] > bound for i in columns]

    batch = Batch(data)
    confidence, masked = batch.table(CONFIDENCE), batch.masked()
    streak, threshold = batch.table(st.integers(0, 3)), batch.each(THRESHOLD)
    history = batch.each(st.integers(0, 3))
    check(accept_stable, rule, confidence, masked, streak, threshold, history)
    strict = torch.ones(batch.rows, dtype=torch.bool)
    assert torch.equal(
        accept_stable(confidence, masked, streak, threshold, torch.zeros_like(history)),
        accept_above(confidence, masked, threshold, strict),
    )


def adaptive_rule(
    confidence: Row,
    masked: Row,
    total: float,
    count: int,
    step: int,
    low: float,
    high: float,
) -> list[bool]:
    columns = where(masked)
    if step == 0 or count == 0:
        usual = max((confidence[c] for c in columns), default=-INF)
    else:
        usual = total / count
    threshold = min(max(usual, low), high)
    return flags([c for c in columns if confidence[c] >= threshold], masked)


@given(st.data())
def test_adaptive(data: st.DataObject) -> None:
    def rule(c: torch.Tensor, m: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        total, count, step, low, high = rest
        return accept_adaptive(c, m, RevealedConfidence(total, count), step, low, high)

    batch = Batch(data)
    low = batch.each(st.sampled_from([0.0, 0.25, 0.625]))
    check(
        rule,
        adaptive_rule,
        batch.table(CONFIDENCE),
        batch.masked(),
        batch.each(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])),
        batch.each(st.sampled_from([0, 1, 2, 4])),
        batch.each(st.integers(0, 2)),
        low,
        low + batch.each(st.sampled_from([0.0, 0.25, 1.0])),
    )


@given(st.data())
def test_revealed_confidence_over_a_block(data: st.DataObject) -> None:
    """Sums over what each step revealed; a block that begins forgets them."""
    batch = Batch(data)
    state = RevealedConfidence(
        torch.full((batch.rows,), math.nan), torch.full((batch.rows,), 99)
    )
    seen: list[list[float]] = [[] for _ in range(batch.rows)]
    for now, begins in enumerate(data.draw(STEPS)):
        step = torch.full((batch.rows,), 0 if begins or now == 0 else now)
        confidence, accepted = batch.table(CONFIDENCE), batch.masked()
        state = update_revealed(state, confidence, accepted, step)
        for row in range(batch.rows):
            if step[row] == 0:
                seen[row] = []
            seen[row] += confidence[row][accepted[row]].tolist()
        assert state.total.tolist() == [sum(s) for s in seen]
        assert state.count.tolist() == [len(s) for s in seen]
    assert [s.dtype for s in state] == [torch.float32, torch.int64]


@given(st.data())
def test_adaptive_within_one_value_is_a_threshold(data: st.DataObject) -> None:
    batch = Batch(data)
    confidence, masked = batch.table(CONFIDENCE), batch.masked()
    threshold = batch.each(THRESHOLD)
    state = RevealedConfidence(torch.ones(batch.rows), batch.each(st.integers(0, 2)))
    step = batch.each(st.integers(0, 2))
    strict = torch.zeros(batch.rows, dtype=torch.bool)
    assert torch.equal(
        accept_adaptive(confidence, masked, state, step, threshold, threshold),
        accept_above(confidence, masked, threshold, strict),
    )


class CoherentRequest:
    """What the release does, with sets, for one block."""

    def __init__(self) -> None:
        self.watched: list[int] = []
        self.tokens: Row = []
        self.width = 1
        self.sought = False

    def __call__(self, order: Row, tokens: Row, masked: Row, **p: Any) -> list[bool]:
        columns, count = where(masked), p["count"]
        if p["step"] == 0:
            self.watched, self.width = [], 1
        chosen = best(order, columns, count)
        self.sought = False
        if p["step"] >= p["warm_up"] and set(chosen) & set(self.watched):
            agreed = [
                c
                for c in best(order, columns, self.width)
                if c in self.watched and tokens[c] == self.tokens[c]
            ]
            if len(agreed) >= count:
                chosen = agreed
                self.sought = True
        left = [c for c in columns if c not in chosen]
        if p["step"] < p["warm_up"] or 10 * len(left) <= p["num_masks"]:
            self.width = 1
        else:
            limit = math.floor(count * (1 + p["expand"]))
            self.width = max(1, min(self.width + 1, limit))
        self.watched = best(order, left, self.width)
        self.tokens = tokens
        return flags(chosen, masked)


@settings(max_examples=70)
@given(st.data())
def test_coherent_over_blocks(data: st.DataObject) -> None:
    batch = Batch(data, longest=12)
    rows, length = batch.rows, batch.length
    expand = batch.each(st.sampled_from([0.0, 0.5, 1.0, 4.0]))
    warm_up, count = batch.each(st.integers(0, 2)), batch.each(st.integers(1, 2))
    # Rubbish of another block, which must not matter.
    state = Coherence(
        torch.ones(rows, length, dtype=torch.bool),
        torch.ones(rows, length, dtype=torch.int64),
        torch.full((rows,), 9),
    )
    requests = [CoherentRequest() for _ in range(rows)]
    masked = torch.ones(rows, length, dtype=torch.bool)
    step = torch.zeros(rows, dtype=torch.int64)
    order = batch.table(ORDER)
    for now in range(7):
        # Mostly the same order and tokens again, else two steps hardly agree.
        if now % 3 == 2:
            order = batch.table(ORDER)
        tokens = batch.table(st.sampled_from([1, 1, 1, 2]))
        num_masks = torch.full((rows,), length)
        arguments = (step, count, num_masks, expand, warm_up)
        accepted, after = accept_coherent(order, tokens, masked, state, *arguments)
        swapped, _ = accept_coherent(
            order.flip(0),
            tokens.flip(0),
            masked.flip(0),
            Coherence(*(s.flip(0) for s in state)),
            *(a.flip(0) for a in arguments),
        )
        assert torch.equal(swapped.flip(0), accepted)
        assert [s.dtype for s in after] == [torch.bool, torch.int64, torch.int64]
        for row, request in enumerate(requests):
            assert accepted[row].tolist() == request(
                order[row].tolist(),
                tokens[row].tolist(),
                masked[row].tolist(),
                step=int(step[row]),
                count=int(count[row]),
                num_masks=length,
                expand=float(expand[row]),
                warm_up=int(warm_up[row]),
            )
            assert where(after.watched[row].tolist()) == sorted(request.watched)
            assert int(after.width[row]) == request.width
        assert torch.equal(accepted.any(dim=1), masked.any(dim=1))
        state, masked = after, masked & ~accepted
        done = ~masked.any(dim=1)
        masked = masked | done.unsqueeze(1)
        step = torch.where(done, 0, step + 1)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        pytest.param(None, [[0], [1], [2, 3], [4, 5, 6]], id="agrees"),
        pytest.param(3, [[0], [1], [2], [3, 4, 5]], id="one-token-changes"),
    ],
)
def test_coherent_by_hand(changed: int | None, expected: list[list[int]]) -> None:
    """The same order four times: as many as are watched, if they keep their token.

    One position is watched after the step of warm-up, then 2, then 3.
    """
    length = 16
    order = -torch.arange(length).float().unsqueeze(0)
    masked = torch.ones(1, length, dtype=torch.bool)
    one = torch.ones(1, dtype=torch.int64)
    state = Coherence(masked, one.expand(1, length), one)
    accepted_columns = []
    for step in range(len(expected)):
        tokens = torch.zeros(1, length, dtype=torch.int64)
        if step >= 2 and changed is not None:
            tokens[0, changed] = 1
        accepted, state = accept_coherent(
            order,
            tokens,
            masked,
            state,
            one * step,
            one,
            one * length,
            torch.tensor([4.0]),
            one,
        )
        masked = masked & ~accepted
        accepted_columns.append(where(accepted[0].tolist()))
    assert accepted_columns == expected


@given(st.data())
def test_coherent_that_never_warms_up_is_the_schedule(data: st.DataObject) -> None:
    batch = Batch(data)
    order, masked = batch.table(ORDER), batch.masked()
    tokens = batch.table(st.integers(0, 1))
    count = batch.each(st.integers(1, 3))
    state = Coherence(batch.masked(), tokens, count)
    accepted, _ = accept_coherent(
        order,
        tokens,
        masked,
        state,
        batch.each(st.integers(0, 5)),
        count,
        torch.full_like(count, batch.length),
        torch.ones(batch.rows),
        torch.full_like(count, 99),
    )
    assert torch.equal(accepted, accept_top(order, masked, count))


def test_no_update_waits_for_a_value() -> None:
    def stability(probs: torch.Tensor, streak: torch.Tensor, *rest: Any) -> Stability:
        return update_stability(Stability(probs, streak), *rest)

    def revealed(total: torch.Tensor, n: torch.Tensor, *rest: Any) -> Any:
        return update_revealed(RevealedConfidence(total, n), *rest)

    def coherent(o: Any, t: Any, m: Any, w: Any, s: Any, n: Any, *rest: Any) -> Any:
        accepted, state = accept_coherent(o, t, m, Coherence(w, s, n), *rest)
        return (accepted, *state)

    one = torch.ones(2, dtype=torch.int64)
    probs, tokens = torch.rand(2, 3, 4), torch.ones(2, 3, dtype=torch.int64)
    masked = tokens.bool()
    order, level = torch.rand(2, 3), torch.ones(2)
    check_blind(stability, probs, tokens, probs, one, level)
    check_blind(revealed, level, one, order, masked, one)
    check_blind(
        coherent,
        *(order, tokens, masked, masked, tokens, one),
        *(one, one, one, level, one),
    )
