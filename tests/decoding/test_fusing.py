# SPDX-License-Identifier: Apache-2.0
"""Credit of leading tokens, and stop tokens that come too early."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import CONFIDENCE, Batch, Row, check, check_blind

from vllm_unmask.decoding.fusing import (
    Credit,
    fuse_credit,
    reject_early_end,
    update_credit,
)

VOCAB = 5


def empty(rows: int, length: int, entries: int) -> Credit:
    shape = (rows, length, entries)
    return Credit(torch.full(shape, -1), torch.zeros(shape))


def dense_credit(state: Credit) -> torch.Tensor:
    """The number of each token, [requests, block, vocab]."""
    held = state.tokens.clamp(min=0)
    dense = torch.zeros(*held.shape[:2], VOCAB)
    return dense.scatter_add(2, held, torch.where(state.tokens >= 0, state.credit, 0))


@settings(max_examples=100)
@given(st.data())
def test_sparse_is_dense_over_steps(data: st.DataObject) -> None:
    """Blocks begin, positions are revealed and masked again, tokens take turns."""
    batch = Batch(data, longest=4)
    rows, length = batch.rows, batch.length
    number = data.draw(st.integers(1, 7))
    # As many entries as steps, or as there are tokens, hold everything.
    state = empty(rows, length, min(number, VOCAB))
    # Of a request that was here before.
    state.tokens[:, :, 0] = 2
    state.credit[:, :, 0] = 50
    decay = batch.each(st.sampled_from([0.0, 0.5, 0.75, 1.0]))
    power = batch.each(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    weight = batch.each(st.sampled_from([0.0, 0.5, 2.0]))
    dense = torch.zeros(rows, length, VOCAB)
    for now in range(number):
        step = torch.where(batch.each(st.sampled_from([True, False, False])), 0, now)
        tokens = batch.table(st.integers(0, VOCAB - 1))
        probability, masked = batch.table(CONFIDENCE), batch.masked()
        old = Credit(*(field.clone() for field in state))
        arguments = (tokens, probability, masked, step)
        state = update_credit(old, *arguments, decay, power)
        for row in range(rows):
            for column in range(length):
                here = dense[row, column]
                if step[row] == 0 or not masked[row, column]:
                    here.zero_()
                here *= decay[row]
                if masked[row, column]:
                    gain = probability[row, column] ** power[row]
                    here[tokens[row, column]] += gain
        torch.testing.assert_close(dense_credit(state), dense, rtol=1e-6, atol=0)
        assert [f.dtype for f in state] == [torch.int64, torch.float32]
        assert not state.credit[state.tokens < 0].any()
        assert torch.equal((state.tokens >= 0).any(dim=2), masked)

        backwards = update_credit(
            Credit(*(field.flip(0) for field in old)),
            *(argument.flip(0) for argument in arguments),
            decay.flip(0),
            power.flip(0),
        )
        for field, other in zip(state, backwards, strict=True):
            assert torch.equal(other.flip(0), field)

        logits = torch.linspace(-3, 3, rows * length * VOCAB).view(dense.shape)
        expected = logits + weight.view(-1, 1, 1) * (1 + dense).log()
        fused = fuse_credit(logits, state, weight)
        assert fused.data_ptr() == logits.data_ptr()
        torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6)


@given(st.data())
def test_without_weight_or_credit_nothing_changes(data: st.DataObject) -> None:
    batch = Batch(data, longest=4)
    logit = st.sampled_from([-math.inf, -1.0, 0.5, 3.0])
    logits = torch.stack([batch.table(logit) for _ in range(VOCAB)], dim=2)
    state = empty(batch.rows, batch.length, 3)
    weight = batch.each(st.sampled_from([0.5, 2.0]))
    assert torch.equal(fuse_credit(logits.clone(), state, weight), logits)
    state.tokens.fill_(1)
    state.credit.fill_(0)
    state.tokens[:, :, 1:] = -1
    assert torch.equal(fuse_credit(logits.clone(), state, weight), logits)
    state.credit[:, :, 0] = 4
    assert torch.equal(fuse_credit(logits.clone(), state, weight * 0), logits)


def test_a_banned_token_stays_banned() -> None:
    state = Credit(torch.tensor([[[1]]]), torch.tensor([[[9.0]]]))
    fused = fuse_credit(torch.tensor([[[0.0, -math.inf]]]), state, torch.ones(1))
    assert fused.tolist() == [[[0.0, -math.inf]]]


def test_a_full_list_forgets_the_smallest_credit() -> None:
    state = Credit(torch.tensor([[[4, 7, 9]]]), torch.tensor([[[3.0, 1.0, 2.0]]]))

    def credit(token: int) -> Credit:
        return update_credit(
            state,
            torch.tensor([[token]]),
            torch.tensor([[0.25]]),
            torch.tensor([[True]]),
            torch.tensor([1]),
            torch.tensor([0.5]),
            torch.tensor([0.5]),
        )

    new = credit(2)
    assert new.tokens.tolist() == [[[4, 2, 9]]]
    assert new.credit.tolist() == [[[1.5, 0.5, 1.0]]]
    own = credit(9)
    assert own.tokens.tolist() == [[[4, 7, 9]]]
    assert own.credit.tolist() == [[[1.5, 0.5, 1.5]]]


def test_credit_waits_for_no_value() -> None:
    def update(*fields: torch.Tensor) -> Credit:
        return update_credit(Credit(*fields[:2]), *fields[2:])

    def fuse(logits: torch.Tensor, *fields: torch.Tensor) -> torch.Tensor:
        return fuse_credit(logits, Credit(*fields[:2]), fields[2])

    state, one = empty(2, 3, 4), torch.ones(2)
    tokens, masked = torch.zeros(2, 3).long(), torch.ones(2, 3).bool()
    check_blind(update, *state, tokens, torch.ones(2, 3), masked, one.long(), one, one)
    check_blind(fuse, torch.zeros(2, 3, VOCAB), *state, one)


def early_end_rule(
    confidence: Row, is_end: Row, step: int, num_steps: int, floor: float
) -> list[float]:
    progress = min(step, num_steps - 1) / (num_steps - 1) if num_steps > 1 else 1.0
    factor = floor + (1 - floor) * progress
    return [c * factor if end else c for c, end in zip(confidence, is_end, strict=True)]


@given(st.data())
def test_reject_early_end(data: st.DataObject) -> None:
    batch = Batch(data)
    # One less than each is a power of two: the factors are exact.
    check(
        reject_early_end,
        early_end_rule,
        batch.table(CONFIDENCE),
        batch.masked(),
        batch.each(st.sampled_from([0, 1, 2, 3, 16, 40])),
        batch.each(st.sampled_from([1, 2, 3, 5, 33])),
        batch.each(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    )


@pytest.mark.parametrize("floor", [0.4, 0.01, 0.1, 0.7])
def test_the_last_step_rejects_nothing(floor: float) -> None:
    """Exactly: a threshold may lie next to the confidence."""
    confidence = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    result = reject_early_end(
        confidence,
        torch.ones(3, 50, dtype=torch.bool),
        torch.tensor([6, 9, 0]),
        torch.tensor([7, 7, 1]),
        torch.full((3,), floor),
    )
    assert torch.equal(result, confidence)
