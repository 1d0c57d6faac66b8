# SPDX-License-Identifier: Apache-2.0
"""The canvas against a model of it that knows one request and plain lists."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unmask.decoding.canvas import Canvas, Commit, active_ids, advance

MASK = 99


@dataclass
class Request:
    """One request: its ids from the first block that is not final.

    ``start`` is the first position of the block being denoised, ``final`` the
    number of positions whose KV is final.
    """

    block: int
    ids: list[int]  # of the block being denoised
    fixed: int
    final: int = 0
    start: int = 0
    step: int = 0
    opened: int = 0
    output: list[int] = field(default_factory=list)

    @classmethod
    def after_prefill(cls, block: int, tail: list[int]) -> "Request":
        masks = block - len(tail)
        return cls(block, [*tail, *[MASK] * masks], len(tail), opened=masks)

    def close_step(self, ids: list[int], width: int) -> tuple[list[int], int]:
        """One forward pass that saw everything up to here: (reported, final)."""
        newly_final = self.start - self.final
        self.final = self.start
        self.ids = ids
        if width == 0:
            return [], newly_final
        if MASK in ids[:width]:
            self.step += 1
            return [], newly_final
        reported = ids[self.fixed : width]
        self.output += reported
        self.start += self.block
        self.ids = [MASK] * self.block
        self.fixed, self.step, self.opened = 0, 0, self.block
        return reported, newly_final

    @property
    def pending(self) -> bool:
        return self.start > self.final


def open_canvas(block: int, tails: list[list[int]]) -> Canvas:
    ids = [[*tail, *[MASK] * (2 * block - len(tail))] for tail in tails]
    fixed = torch.tensor([len(tail) for tail in tails])
    return Canvas(
        ids=torch.tensor(ids),
        pending=torch.zeros(len(tails), dtype=torch.bool),
        num_fixed=fixed,
        num_masks=block - fixed,
        step=torch.zeros_like(fixed),
    )


def reported(commit: Commit, row: int) -> list[int]:
    return commit.tokens[row, : int(commit.num_tokens[row])].tolist()


def check_state(canvas: Canvas, requests: list[Request]) -> None:
    for row, request in enumerate(requests):
        assert active_ids(canvas)[row].tolist() == request.ids
        assert bool(canvas.pending[row]) == request.pending
        assert int(canvas.num_fixed[row]) == request.fixed
        assert int(canvas.num_masks[row]) == request.opened
        assert int(canvas.step[row]) == request.step


@settings(max_examples=60)
@given(st.data())
def test_random_histories_follow_the_model(data: st.DataObject) -> None:
    block = data.draw(st.integers(1, 5), label="block")
    tails = data.draw(
        st.lists(
            st.lists(st.integers(0, 9), max_size=block - 1), min_size=1, max_size=4
        ),
        label="prompt tails",
    )
    canvas = open_canvas(block, tails)
    requests = [Request.after_prefill(block, tail) for tail in tails]
    revealed: list[list[int]] = [[] for _ in tails]
    num_final = [0] * len(tails)
    fresh = 100
    for _ in range(data.draw(st.integers(1, 12), label="steps")):
        active, widths, outcomes = active_ids(canvas).clone(), [], []
        for row, request in enumerate(requests):
            # No row for the active block only while the first one is pending;
            # else at least one position that is not the prompt's.
            width = data.draw(
                st.sampled_from([0] * request.pending + [block] * 3)
                | st.integers(request.fixed + 1, block)
            )
            masked = [c for c in range(width) if request.ids[c] == MASK]
            chosen = data.draw(
                st.sets(st.sampled_from(masked)) if masked else st.just(set())
            )
            if data.draw(st.booleans()):
                chosen = set(masked)
            ids = list(request.ids)
            for column in sorted(chosen):
                ids[column] = fresh
                fresh += 1
            active[row] = torch.tensor(ids)
            widths.append(width)
            outcomes.append(request.close_step(ids, width))
        canvas, commit = advance(canvas, active, torch.tensor(widths), MASK)
        for row, (tokens, newly_final) in enumerate(outcomes):
            assert reported(commit, row) == tokens
            assert int(commit.advance[row]) == newly_final
            revealed[row] += tokens
            num_final[row] += newly_final
        check_state(canvas, requests)
        for row, request in enumerate(requests):
            assert num_final[row] == request.final
            assert request.start - request.final in (0, block)
            if request.pending:
                assert canvas.ids[row, :block].tolist() == active[row].tolist()
    for row, request in enumerate(requests):
        assert revealed[row] == request.output
        assert len(set(request.output)) == len(request.output)
        assert MASK not in request.output


@given(st.integers(1, 6), st.data())
def test_a_whole_request(block: int, data: st.DataObject) -> None:
    """Without cuts: prompt kept, tokens once and in order, all becomes final."""
    tail = data.draw(st.lists(st.integers(0, 9), max_size=block - 1))
    blocks = data.draw(st.integers(1, 4))
    canvas = open_canvas(block, [tail])
    truth = [*tail, *range(100, 100 + blocks * block - len(tail))]
    width = torch.tensor([block])
    output: list[int] = []
    num_final = step = done = 0
    while len(output) < len(truth) - len(tail):
        active = active_ids(canvas).clone()
        masked = [c for c in range(block) if active[0, c] == MASK]
        for column in data.draw(st.sets(st.sampled_from(masked), min_size=1)):
            active[0, column] = truth[done * block + column]
        assert int(canvas.step[0]) == step
        canvas, commit = advance(canvas, active, width, MASK)
        output += reported(commit, 0)
        num_final += int(commit.advance[0])
        complete = int(commit.num_tokens[0]) > 0
        done, step = done + complete, 0 if complete else step + 1
        # The KV of what was reported in this step is final one step later.
        assert num_final == (done - complete) * block
    assert output == truth[len(tail) :]
    # The step in which a block is pending may have no row for the next one.
    canvas, commit = advance(canvas, active_ids(canvas), torch.tensor([0]), MASK)
    assert num_final + int(commit.advance[0]) == blocks * block
    assert reported(commit, 0) == []
    assert not canvas.pending[0]


@given(st.data())
def test_neighbours_make_no_difference(data: st.DataObject) -> None:
    block = data.draw(st.integers(1, 4))
    num = data.draw(st.integers(2, 4))
    ints = st.integers(0, 3)

    def rows(values: st.SearchStrategy[int], columns: int) -> torch.Tensor:
        flat = st.lists(values, min_size=num * columns, max_size=num * columns)
        return torch.tensor(data.draw(flat)).view(num, columns)

    token = st.sampled_from([MASK, 1, 2])
    canvas = Canvas(
        ids=rows(token, 2 * block),
        pending=rows(ints, 1).squeeze(1) > 1,
        num_fixed=rows(st.integers(0, block - 1), 1).squeeze(1),
        num_masks=rows(ints, 1).squeeze(1),
        step=rows(ints, 1).squeeze(1),
    )
    active = rows(token, block)
    width = torch.maximum(rows(st.integers(0, block), 1).squeeze(1), canvas.num_fixed)
    state, commit = advance(canvas, active, width, MASK)
    for row in range(num):
        one = slice(row, row + 1)
        alone, commit_alone = advance(
            Canvas(*(f[one] for f in canvas)), active[one], width[one], MASK
        )
        for left, right in zip((*state, *commit), (*alone, *commit_alone), strict=True):
            assert torch.equal(left[one], right)


def test_block_completed_while_the_first_one_is_pending() -> None:
    """Two blocks complete in two steps running: each step makes one final."""
    canvas = open_canvas(2, [[7]])
    canvas, commit = advance(canvas, torch.tensor([[7, 1]]), torch.tensor([2]), MASK)
    assert (reported(commit, 0), int(commit.advance[0])) == ([1], 0)
    assert canvas.ids.tolist() == [[7, 1, MASK, MASK]]
    canvas, commit = advance(canvas, torch.tensor([[2, 3]]), torch.tensor([2]), MASK)
    assert (reported(commit, 0), int(commit.advance[0])) == ([2, 3], 2)
    assert canvas.ids.tolist() == [[2, 3, MASK, MASK]]
    assert bool(canvas.pending[0])


@pytest.mark.parametrize("pending", [False, True])
def test_what_lies_past_the_width_is_neither_awaited_nor_reported(
    pending: bool,
) -> None:
    canvas = open_canvas(4, [[]])._replace(pending=torch.tensor([pending]))
    active = torch.tensor([[1, 2, 3, MASK]])
    _, commit = advance(canvas, active, torch.tensor([3]), MASK)
    assert reported(commit, 0) == [1, 2, 3]
    assert int(commit.advance[0]) == 4 * pending
    _, commit = advance(canvas, active, torch.tensor([4]), MASK)
    assert reported(commit, 0) == []


def test_no_row_for_the_active_block_leaves_it_as_it_is() -> None:
    first = torch.tensor([[1, 2, MASK, MASK]])
    canvas = open_canvas(2, [[]])._replace(ids=first, pending=torch.tensor([True]))
    state, commit = advance(canvas, active_ids(canvas), torch.tensor([0]), MASK)
    assert (reported(commit, 0), int(commit.advance[0])) == ([], 2)
    assert state.ids.tolist() == [[MASK, MASK, MASK, MASK]]
    assert (bool(state.pending[0]), int(state.step[0])) == (False, 0)
