# SPDX-License-Identifier: Apache-2.0
"""A window that is read decided positions first, and moves behind what it reports."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_cases import Batch, Row, best, check, flags, where

from vllm_unmask.decoding.canvas import Canvas
from vllm_unmask.decoding.streaming import (
    accept_near,
    close_windows,
    row_order,
    write_windows,
)

MASK = 99
ENTROPY = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])
PENALTY = st.sampled_from([0.0, 0.25, 8.0])


def order_of_one(masked: Row, width: int) -> list[int]:
    read = range(width)
    decided = [c for c in read if not masked[c]]
    return decided + [c for c in read if masked[c]] + [*range(width, len(masked))]


def accept_one(entropy: Row, masked: Row, bound: float, penalty: float) -> list[bool]:
    open_ = where(masked)
    doubt = [
        e + penalty * (c - open_[0] if open_ else 0) for c, e in enumerate(entropy)
    ]
    sure = [c for c in open_ if doubt[c] < bound]
    return flags(sure or best([-d for d in doubt], open_, 1), masked)


@given(st.data())
def test_decided_positions_are_read_first(data: st.DataObject) -> None:
    batch = Batch(data)
    width = batch.each(st.integers(0, batch.length))
    check(row_order, order_of_one, batch.masked(), width)


@given(st.data())
def test_low_entropy_near_the_first_mask(data: st.DataObject) -> None:
    batch = Batch(data)
    check(
        accept_near,
        accept_one,
        batch.table(ENTROPY),
        batch.masked(),
        batch.each(ENTROPY),
        batch.each(PENALTY),
    )


def test_numbers_of_the_release() -> None:
    """0.4 nats next to the first mask, 0.02 less for each position behind it."""
    entropy = torch.tensor([[0.0, 0.39, 0.39, 0.37, 0.33, 0.3]])
    masked = torch.tensor([[False, True, True, True, True, True]])
    accepted = accept_near(entropy, masked, torch.tensor([0.4]), torch.tensor([0.02]))
    assert accepted.tolist() == [[False, True, False, False, True, True]]


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_a_batch(seed: int) -> None:
    """Every position has its own row, and rows outside of the windows stay."""
    rng = random.Random(seed)
    length = rng.randint(1, 6)
    windows, first_row, width, start = [], [], [], []
    rows = rng.randint(0, 3)
    for _ in range(rng.randint(1, 4)):
        windows.append([rng.choice([MASK, 1, 2, 3]) for _ in range(length)])
        first_row.append(rows)
        width.append(rng.randint(1, length))
        start.append(rng.randint(0, 50))
        rows += width[-1] + rng.randint(0, 3)
    input_ids = torch.full((rows,), -1, dtype=torch.int32)
    positions = torch.full((rows,), -1)
    logits_rows = write_windows(
        torch.tensor(windows),
        MASK,
        torch.tensor(first_row),
        torch.tensor(width),
        torch.tensor(start),
        input_ids,
        positions,
    )
    written = set()
    for i, window in enumerate(windows):
        masked = [token == MASK for token in window]
        order = order_of_one(masked, width[i])[: width[i]]
        own = range(first_row[i], first_row[i] + width[i])
        written |= set(own)
        assert [int(input_ids[row]) for row in own] == [window[c] for c in order]
        assert [int(positions[row]) for row in own] == [start[i] + c for c in order]
        expected = [
            own[order.index(c)] if c in order else own[-1] for c in range(length)
        ]
        assert logits_rows.view(-1, length)[i].tolist() == expected
    others = [row for row in range(rows) if row not in written]
    assert bool((input_ids[others] == -1).all() and (positions[others] == -1).all())


def test_window_moves_behind_its_leading_run() -> None:
    slots = torch.tensor([3, 0, 2, 1])
    canvas = Canvas(
        ids=torch.full((4, 6), MASK),
        pending=torch.zeros(4, dtype=torch.bool),
        num_fixed=torch.zeros(4, dtype=torch.int64),
        num_masks=torch.full((4,), 3),
        step=torch.tensor([5, 6, 7, 8]),
    )
    active = torch.tensor([[1, 2, MASK], [MASK, 4, 5], [7, 8, 9], [1, 2, 3]])
    width = torch.tensor([3, 3, 3, 2])
    tokens, num_tokens = close_windows(canvas, slots, width, active, MASK)
    assert num_tokens.tolist() == [2, 0, 3, 2]
    assert tokens[0, :2].tolist() == [1, 2] and tokens[2].tolist() == [7, 8, 9]
    windows = canvas.ids[slots, :3].tolist()
    assert windows[:3] == [[MASK] * 3, [MASK, 4, 5], [MASK] * 3]
    assert bool((canvas.ids[:, 3:] == MASK).all())
    assert canvas.step.tolist() == [6, 7, 8, 9]


def test_window_without_a_row_stays() -> None:
    canvas = Canvas(
        ids=torch.tensor([[MASK, 4, MASK, MASK]]),
        pending=torch.zeros(1, dtype=torch.bool),
        num_fixed=torch.zeros(1, dtype=torch.int64),
        num_masks=torch.full((1,), 2),
        step=torch.tensor([5]),
    )
    active = canvas.ids[:, :2].clone()
    zero = torch.zeros(1, dtype=torch.int64)
    _, num_tokens = close_windows(canvas, zero, zero, active, MASK)
    assert num_tokens.tolist() == [0] and canvas.step.tolist() == [5]
    assert canvas.ids.tolist() == [[MASK, 4, MASK, MASK]]
