# SPDX-License-Identifier: Apache-2.0
"""Candidates: the sets that are drafted, against a plain search, and their finding."""

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unmask.decoding import drafting
from vllm_unmask.decoding.drafting import Candidates, draft, find
from vllm_unmask.decoding.scoring import ORDERS

MASK = 99
DEPTH = 7


def ways(
    left: list[int], sure: list[float], count: int
) -> list[tuple[tuple[int, ...], float]]:
    """Where a step may lead, by sureness: sets of positions and their chances."""
    left = sorted(left, key=lambda place: (-sure[place], place))
    confidence = {place: min(sure[place], 1 - 1e-6) for place in left}
    found = []
    for way in range(6):
        if count:
            size = min(count, len(left))
            if size + way > len(left):
                break
            chosen = [*left[: size - 1], left[size - 1 + way]]
            odds = (1 - confidence[chosen[-1]]) ** -1.2
        else:
            if way == min(len(left), 3):
                break
            size = way + 1 if way + 1 < min(len(left), 3) else len(left)
            chosen, odds = left[:size], 1.0
        kept = np.prod([max(confidence[place], 1e-3) ** 0.3 for place in chosen])
        found.append((tuple(chosen), odds, kept))
    total = sum(odds for _, odds, _ in found)
    return [(chosen, odds * kept / total) for chosen, odds, kept in found]


def searched(
    masked: list[bool], sure: list[float], counts: list[int], limit: int, opens: bool
) -> list[frozenset[int] | str]:
    """The likely sets by a search over dictionaries."""
    places = [place for place, free in enumerate(masked) if free]
    chances: dict[frozenset[int] | str, tuple[float, int]] = {}
    chosen: list[frozenset[int] | str] = []
    parent: frozenset[int] | str = frozenset()
    reached, taken = 1.0, 0
    while len(chosen) < limit:
        if parent == frozenset(places):
            if opens:
                chances["opening"] = (reached, 0)
        elif not isinstance(parent, str):
            left = [place for place in places if place not in parent]
            count = counts[min(taken, len(counts) - 1)]
            for more, chance in ways(left, sure, count):
                child = parent | frozenset(more)
                if child in chosen:
                    continue
                before, steps = chances.get(child, (0.0, taken + 1))
                chances[child] = (before + reached * chance, steps)
        if not chances:
            break
        parent = max(chances, key=lambda child: chances[child][0])
        reached, taken = chances.pop(parent)
        # Nothing is read of a complete block, unless the next one follows it.
        if opens or parent != frozenset(places):
            chosen.append(parent)
    return chosen


@settings(deadline=None, max_examples=150)
@given(
    data=st.data(),
    length=st.integers(1, 8),
    limit=st.integers(0, DEPTH),
    opens=st.booleans(),
    count=st.integers(0, 3),
)
def test_sets_are_those_of_a_plain_search(
    data: st.DataObject, length: int, limit: int, opens: bool, count: int
) -> None:
    masked = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    # Apart, so that no two sets are reached with the same chance.
    noise = np.random.default_rng(data.draw(st.integers(0, 1000)))
    sure = noise.uniform(0.05, 0.999, length).astype(np.float32)
    tokens = torch.arange(length) + 10
    ids = torch.where(torch.tensor(masked), MASK, torch.arange(length))
    got = draft(
        ids.unsqueeze(0),
        torch.tensor([masked]),
        tokens.unsqueeze(0),
        torch.from_numpy(sure).unsqueeze(0),
        torch.full((1, DEPTH), count),
        torch.tensor([limit]),
        torch.tensor([opens]),
        MASK,
        DEPTH,
    )
    expected = searched(masked, sure.tolist(), [count] * DEPTH, limit, opens)
    assert got.count.tolist() == [len(expected)]
    for place, guess in enumerate(expected):
        if guess == "opening":
            assert got.opening.tolist() == [place]
            want = torch.full((length,), MASK)
            whole = frozenset(p for p in range(length) if masked[p])
            leader = expected.index(whole) if whole else -1
            assert got.leader.tolist() == [leader]
        else:
            mine = torch.tensor([p in guess for p in range(length)])
            want = torch.where(mine, tokens, ids)
        assert got.ids[0, place].tolist() == want.tolist()
    if "opening" not in expected:
        assert got.opening.tolist() == [-1]


def test_a_sure_order_gives_a_chain() -> None:
    """As in the papers: the surest position, the two surest, and so on."""
    sure = torch.tensor([[0.9, 0.999999, 0.99, 0.9999]])
    ids = torch.full((1, 4), MASK)
    got = draft(
        ids,
        ids == MASK,
        torch.tensor([[1, 2, 3, 4]]),
        sure,
        torch.ones((1, 5), dtype=torch.int64),
        torch.tensor([5]),
        torch.tensor([True]),
        MASK,
        5,
    )
    assert got.ids[0].tolist() == [
        [MASK, 2, MASK, MASK],
        [MASK, 2, MASK, 4],
        [MASK, 2, 3, 4],
        [1, 2, 3, 4],
        [MASK] * 4,
    ]
    assert (got.opening.item(), got.leader.item()) == (4, 3)


def test_long_blocks() -> None:
    """Positions past the 62 surest are in no set, so none is the whole block."""
    length = 100
    ids = torch.full((1, length), MASK)
    got = draft(
        ids,
        ids == MASK,
        torch.zeros_like(ids),
        torch.linspace(0.2, 0.9, length).unsqueeze(0),
        torch.full((1, 3), 60),
        torch.tensor([3]),
        torch.tensor([True]),
        MASK,
        3,
    )
    assert got.opening.item() == -1
    assert (got.ids[0, :, :38] == MASK).all()
    assert (got.ids[0, 0, 40:] == 0).sum() == 60


def test_counts_of_the_schedule() -> None:
    counts = drafting.schedule_counts(
        torch.tensor([8, 5]), torch.tensor([3, 5]), torch.tensor([1, 0]), 3
    )
    # 8 masks in 3 steps are 3 + 3 + 2; a schedule that has run out takes one more.
    assert counts.tolist() == [[3, 2, 2], [1, 1, 1]]


def test_sureness_of_every_order() -> None:
    order = torch.tensor([[0.25], [0.25], [-0.5], [0.25], [float("nan")]])
    kinds = [*map(ORDERS.index, ("confidence", "margin", "entropy", "random")), 0]
    sure = drafting.sureness(order, torch.tensor(kinds))
    assert sure[:, 0].tolist() == [0.25, 0.25, float(np.exp(np.float32(-0.5))), 0.5, 0]


def candidates(opening: int, leader: int, count: int = 3) -> Candidates:
    ids = torch.tensor([[[1, MASK], [1, 2], [MASK, MASK]]])
    return Candidates(
        ids, torch.tensor([count]), torch.tensor([opening]), torch.tensor([leader])
    )


def test_find() -> None:
    none = torch.zeros((1, 3), dtype=torch.bool)
    other, same = torch.tensor([[7, 8]]), torch.tensor([[1, 2]])

    def place(
        of: Candidates, ids: list[int], reported: torch.Tensor, opened: bool
    ) -> int:
        return int(
            find(of, none, torch.tensor([ids]), reported, torch.tensor([opened]))
        )

    led = candidates(opening=2, leader=1)
    assert place(led, [1, MASK], other, False) == 0
    assert place(led, [1, 2], other, False) == 1
    assert place(led, [2, 1], other, False) == -1
    # The next block's logits are for the block that was guessed in front of it.
    assert place(led, [MASK, MASK], same, True) == 2
    assert place(led, [MASK, MASK], other, True) == -1
    # A block of masks is no guess at this block, and a guess at it is no next block.
    assert place(led, [MASK, MASK], same, False) == -1
    assert place(led, [1, 2], same, True) == -1
    alone = candidates(opening=2, leader=-1)
    assert place(alone, [MASK, MASK], other, True) == 2
    assert place(candidates(2, 1, count=2), [MASK, MASK], same, True) == -1


def test_find_uses_a_candidate_once() -> None:
    ids = torch.tensor([[[1, 2], [1, 2]]])
    one = torch.tensor([1])
    twice = Candidates(ids, one * 2, -one, -one)
    for used in itertools.product([False, True], repeat=2):
        found = find(
            twice,
            torch.tensor([used]),
            torch.tensor([[1, 2]]),
            torch.tensor([[0, 0]]),
            torch.tensor([False]),
        )
        expected = used.index(False) if False in used else -1
        assert found.item() == expected


def test_room() -> None:
    led = candidates(opening=2, leader=1)
    assert led.up_to(torch.tensor([3])).opening.item() == 2
    cut = led.up_to(torch.tensor([2]))
    assert (cut.count.item(), cut.opening.item()) == (2, -1)
