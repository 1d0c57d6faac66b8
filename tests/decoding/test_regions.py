# SPDX-License-Identifier: Apache-2.0
"""Which part of a block may be unmasked now."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import CONFIDENCE, THRESHOLD, Batch, Row, check, flags, where

from vllm_unmask.decoding.regions import (
    adaptive_end,
    after_end,
    first_alone,
    forwarded_part,
    sub_block,
)


@given(st.data())
def test_sub_block(data: st.DataObject) -> None:
    def rule(masked: Row, length: int) -> Row:
        for start in range(0, len(masked), length):
            columns = [c for c in where(masked) if start <= c < start + length]
            if columns:
                return flags(columns, masked)
        return flags([], masked)

    batch = Batch(data, longest=12)
    masked = batch.masked()
    check(sub_block, rule, masked, batch.each(st.integers(1, 14)))
    whole = torch.full((batch.rows,), batch.length)
    assert torch.equal(sub_block(masked, whole), masked)


@given(st.data())
def test_sub_blocks_empty_a_block_from_left_to_right(data: st.DataObject) -> None:
    batch = Batch(data, longest=12)
    masked, length = batch.masked(), batch.each(st.integers(1, 5))
    last = torch.full((batch.rows,), -1)
    while masked.any():
        active = sub_block(masked, length)
        assert torch.equal(active.any(dim=1), masked.any(dim=1))
        for row in range(batch.rows):
            parts = {c // int(length[row]) for c in where(active[row].tolist())}
            assert len(parts) <= 1
            assert all(part > int(last[row]) for part in parts)
            last[row] = max(parts, default=int(last[row]))
        masked &= ~active


@pytest.mark.parametrize("shifted", [False, True])
@given(st.data())
def test_forwarded_part(shifted: bool, data: st.DataObject) -> None:
    """The open sub-block alone, where it was open before and its rows say enough."""
    batch = Batch(data, longest=12)
    masked, length = batch.masked(), batch.each(st.integers(1, 14))
    width = batch.each(st.integers(1, batch.length))
    masked &= torch.arange(batch.length) < width.unsqueeze(1)
    visited = batch.each(st.integers(-1, 12))
    found = forwarded_part(visited.unsqueeze(1), masked, length, width, shifted)
    for row, (first, end) in enumerate(torch.stack(found, dim=1).tolist()):
        left = where(masked[row].tolist())[:1]
        size, whole = int(length[row]), (0, int(width[row]))
        part = [left[0] // size] if left else []
        if part != [int(visited[row])] or (shifted and left[0] % size == 0):
            # Nothing masked is a block that no query opens; any of its parts will do.
            assert (first, end) == whole or not left
            continue
        start = part[0] * size
        assert (first, end) == (start, min(start + size, whole[1]))
        # Every position that may be unmasked has its row.
        scored = [column - shifted for column in where(masked[row].tolist())]
        opened = [column for column in scored if column < start + size - shifted]
        assert all(first <= column < end for column in opened)


def adaptive_rule(
    confidence: Row,
    is_delimiter: Row,
    masked: Row,
    end: int,
    step: int,
    threshold: float,
    default: int,
) -> int:
    if step > 0 and any(masked[:end]):
        return end
    columns = where(masked)
    delimiters = [c for c in columns if is_delimiter[c] and confidence[c] >= threshold]
    if delimiters:
        return min(delimiters, key=lambda c: (-confidence[c], c)) + 1
    start = columns[0] if columns else len(masked)
    return min(start + default, len(masked))


@settings(max_examples=120)
@given(st.data())
def test_adaptive_end(data: st.DataObject) -> None:
    batch = Batch(data, longest=10)
    check(
        adaptive_end,
        adaptive_rule,
        batch.table(CONFIDENCE),
        batch.table(st.booleans()),
        batch.masked(),
        batch.each(st.integers(0, batch.length)),
        batch.each(st.integers(0, 2)),
        batch.each(THRESHOLD),
        batch.each(st.integers(1, 12)),
    )


@settings(max_examples=40)
@given(st.data())
def test_adaptive_regions_empty_a_block(data: st.DataObject) -> None:
    """A region always holds a masked position, and does not change before it ends."""
    batch = Batch(data, longest=10)
    masked = torch.ones(batch.rows, batch.length, dtype=torch.bool)
    threshold, default = batch.each(THRESHOLD), batch.each(st.integers(1, 4))
    end = batch.each(st.integers(0, 99))
    column = torch.arange(batch.length)
    for step in range(2 * batch.length):
        before = end
        end = adaptive_end(
            batch.table(CONFIDENCE),
            batch.table(st.booleans()),
            masked,
            end,
            torch.full((batch.rows,), step),
            threshold,
            default,
        )
        active = masked & (column < end.unsqueeze(1))
        assert torch.equal(active.any(dim=1), masked.any(dim=1))
        unfinished = (masked & (column < before.unsqueeze(1))).any(dim=1)
        assert torch.equal(end[unfinished], before[unfinished]) or step == 0
        # Reveal the first or all of the region.
        some = active & (column == active.int().argmax(dim=1, keepdim=True))
        all_of_it = batch.each(st.booleans()).unsqueeze(1)
        masked = masked & ~torch.where(all_of_it, active, some)
    assert not masked.any()


@given(st.data())
def test_without_delimiters_regions_have_their_default_width(
    data: st.DataObject,
) -> None:
    batch = Batch(data)
    default = batch.each(st.integers(1, 9))
    masked = torch.ones(batch.rows, batch.length, dtype=torch.bool)
    end = adaptive_end(
        batch.table(CONFIDENCE),
        torch.zeros_like(masked),
        masked,
        default * 0,
        default * 0,
        batch.each(THRESHOLD),
        default,
    )
    assert end.tolist() == default.clamp(max=batch.length).tolist()


@given(st.data())
def test_after_end(data: st.DataObject) -> None:
    def rule(is_end: Row, masked: Row) -> Row:
        first = min(where(is_end), default=len(masked))
        return flags([c for c in where(masked) if c > first], masked)

    batch = Batch(data)
    masked = batch.masked()
    is_end = batch.table(st.booleans()) & ~masked
    check(after_end, rule, is_end, masked)
    assert not after_end(torch.zeros_like(masked), masked).any()


def test_the_first_position_alone() -> None:
    masked = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0]]).bool()
    alone = first_alone(masked, torch.tensor([0, 1, 0, 0]))
    assert alone.tolist() == [[True, False, False], *[[False] * 3] * 3]
