# SPDX-License-Identifier: Apache-2.0
"""Which masked positions a step unmasks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unmask.decoding.acceptance import accept_above, accept_top, scheduled_count
from vllm_unmask.decoding.denoise import NEVER, Strategy, accept
from vllm_unmask.decoding.scoring import Scores

INF = math.inf
# Few values, so that ties are common; all are exact in float32.
SCORE = st.sampled_from([-INF, -2.0, -0.0, 0.0, 0.25, 0.5, 0.75, 1.0])
CONFIDENCE = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


def top(order: list[float], masked: list[bool], count: int) -> set[int]:
    columns = [c for c in range(len(order)) if masked[c]]
    return set(sorted(columns, key=lambda c: (-order[c], c))[: max(count, 0)])


def above(
    confidence: list[float], masked: list[bool], threshold: float, strict: bool
) -> set[int]:
    return {
        c
        for c, value in enumerate(confidence)
        if masked[c] and (value > threshold if strict else value >= threshold)
    }


def columns(accepted: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in accepted]


@st.composite
def blocks(
    draw: st.DrawFn, score: st.SearchStrategy[float]
) -> tuple[list[list[float]], list[list[bool]]]:
    """A score and a mask flag for every position of a few blocks."""
    length = draw(st.integers(1, 8))
    number = draw(st.integers(1, 4))

    def table(values: st.SearchStrategy) -> st.SearchStrategy:
        row = st.lists(values, min_size=length, max_size=length)
        return st.lists(row, min_size=number, max_size=number)

    return draw(table(score)), draw(table(st.booleans()))


@settings(max_examples=100)
@given(blocks(SCORE), st.data())
def test_accept_top(
    block: tuple[list[list[float]], list[list[bool]]], data: st.DataObject
) -> None:
    order, masked = block
    # Counts from none to more than there are positions.
    count = [data.draw(st.integers(0, len(order[0]) + 2)) for _ in order]
    accepted = accept_top(
        torch.tensor(order), torch.tensor(masked), torch.tensor(count)
    )
    assert columns(accepted) == [
        top(*row) for row in zip(order, masked, count, strict=True)
    ]


def test_accept_top_of_one_score_takes_the_smallest_positions() -> None:
    length = 4096
    masked = torch.arange(length) % 3 > 0
    accepted = accept_top(
        torch.zeros(2, length), masked.expand(2, -1), torch.tensor([7, length])
    )
    assert columns(accepted)[0] == {1, 2, 4, 5, 7, 8, 10}
    assert torch.equal(accepted[1], masked)


@settings(max_examples=100)
@given(blocks(CONFIDENCE), st.data())
def test_accept_above(
    block: tuple[list[list[float]], list[list[bool]]], data: st.DataObject
) -> None:
    confidence, masked = block
    bound = st.sampled_from([0.0, 0.25, 0.5, 1.0, NEVER])
    threshold = [data.draw(bound) for _ in masked]
    strict = [data.draw(st.booleans()) for _ in masked]
    accepted = accept_above(
        torch.tensor(confidence),
        torch.tensor(masked),
        torch.tensor(threshold),
        torch.tensor(strict),
    )
    assert columns(accepted) == [
        above(*row) for row in zip(confidence, masked, threshold, strict, strict=True)
    ]


@pytest.mark.parametrize(
    ("threshold", "strict", "expected"),
    [
        (0.5, True, {3}),
        (0.5, False, {2, 3}),
        (0.0, True, {1, 2, 3}),
        (0.0, False, {0, 1, 2, 3}),
        (1.0, True, set()),
        (1.0, False, {3}),
        (NEVER, True, set()),
        (NEVER, False, set()),
    ],
)
def test_the_comparison_is_part_of_the_rule(
    threshold: float, strict: bool, expected: set[int]
) -> None:
    accepted = accept_above(
        torch.tensor([[0.0, 0.25, 0.5, 1.0, 1.0]]),
        torch.tensor([[True, True, True, True, False]]),
        torch.tensor([threshold]),
        torch.tensor([strict]),
    )
    assert columns(accepted) == [expected]


@given(st.integers(1, 70), st.integers(1, 70))
def test_schedule_spreads_the_masks(num_masks: int, num_steps: int) -> None:
    steps = torch.arange(num_steps)
    counts = scheduled_count(
        torch.full_like(steps, num_masks), torch.full_like(steps, num_steps), steps
    ).tolist()
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)
    if num_steps <= num_masks:
        assert sum(counts) == num_masks
    else:
        # Fewer masks than steps: one a step, and the block ends early.
        assert set(counts) == {1}


@given(st.integers(-3, 70), st.integers(1, 70), st.integers(0, 200))
def test_schedule_never_stands_still(num_masks: int, num_steps: int, step: int) -> None:
    """Past its end, and without a mask to count, it still asks for one."""
    count = scheduled_count(*torch.tensor([[num_masks], [num_steps], [step]]))
    assert int(count) >= 1


@settings(max_examples=100)
@given(blocks(CONFIDENCE), st.data())
def test_a_step_is_the_thresholds_choice_and_the_schedules_floor(
    block: tuple[list[list[float]], list[list[bool]]], data: st.DataObject
) -> None:
    confidence, masked = block
    rows = len(masked)
    length = len(masked[0])

    def draw(values: st.SearchStrategy) -> list:
        return data.draw(st.lists(values, min_size=rows, max_size=rows))

    # The order may rank quite differently from confidence.
    order = draw(st.lists(SCORE, min_size=length, max_size=length))
    num_masks = draw(st.integers(1, length))
    num_steps = draw(st.integers(1, length))
    step = draw(st.integers(0, length + 1))
    threshold = draw(st.sampled_from([0.0, 0.5, 1.0, NEVER]))
    strict = draw(st.booleans())
    accepted = accept(
        Scores(
            torch.zeros(rows, length, dtype=torch.int64),
            torch.tensor(confidence),
            torch.tensor(order),
        ),
        torch.tensor(masked),
        torch.tensor(num_masks),
        torch.tensor(step),
        Strategy(
            torch.tensor(num_steps), torch.tensor(threshold), torch.tensor(strict)
        ),
    )
    for row, chosen in enumerate(columns(accepted)):
        n, s = num_masks[row], num_steps[row]
        floor = max(1, n // s + (1 if step[row] < n % s else 0))
        static = top(order[row], masked[row], floor)
        passed = above(confidence[row], masked[row], threshold[row], strict[row])
        assert chosen == static | passed
        assert chosen <= {c for c in range(length) if masked[row][c]}
        assert chosen or not any(masked[row])
        # One rule inside the other.
        if threshold[row] > 1:
            assert chosen == static
        if threshold[row] == 0 and not strict[row]:
            assert len(chosen) == sum(masked[row])


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_static_steps_empty_a_block_on_schedule(
    length: int, num_steps: int, data: st.DataObject
) -> None:
    fixed = data.draw(st.integers(0, length - 1))
    masked = (torch.arange(length) >= fixed).unsqueeze(0)
    num_masks = torch.tensor([length - fixed])
    strategy = Strategy(
        torch.tensor([num_steps]), torch.tensor([NEVER]), torch.tensor([True])
    )
    steps = 0
    while bool(masked.any()):
        confidence = torch.rand(
            1, length, generator=torch.Generator().manual_seed(steps)
        )
        scores = Scores(torch.zeros(1, length).long(), confidence, confidence)
        chosen = accept(scores, masked, num_masks, torch.tensor([steps]), strategy)
        assert bool(chosen.any())
        masked = masked & ~chosen
        steps += 1
    assert steps == min(num_steps, length - fixed)
