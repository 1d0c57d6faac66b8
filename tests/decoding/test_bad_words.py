# SPDX-License-Identifier: Apache-2.0
"""Bad words never appear, in whatever order a canvas is revealed."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_unmask.decoding.bad_words import banned_tokens, conflicts

MASK = 9
ALPHABET = range(3)
WORDS = st.lists(
    st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=5), min_size=1, max_size=4
)


def appears(ids: list[int], word: list[int]) -> bool:
    """Whether ``word`` stands somewhere in ``ids``, masks matching nothing."""
    n = len(word)
    return any(ids[i : i + n] == word for i in range(len(ids) - n + 1))


def any_appears(ids: list[int], words: list[list[int]]) -> bool:
    return any(appears(ids, word) for word in words)


def brute_force_banned(
    context: list[int], block: list[int], words: list[list[int]]
) -> set[tuple[int, int]]:
    """Write each token into each masked column and look."""
    banned = set()
    for column, present in enumerate(block):
        for token in ALPHABET if present == MASK else ():
            written = [*block[:column], token, *block[column + 1 :]]
            if any_appears([*context, *written], words):
                banned.add((column, token))
    return banned


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from(ALPHABET), max_size=5),
    st.lists(st.sampled_from([*ALPHABET, MASK]), max_size=6),
    WORDS,
)
def test_banned_tokens_are_those_that_complete_a_word(
    context: list[int], block: list[int], words: list[list[int]]
) -> None:
    assume(not any_appears([*context, *block], words))
    expected = brute_force_banned(context, block, words)
    assert banned_tokens(context, block, words, MASK) == expected


@settings(max_examples=120)
@given(st.data())
def test_no_word_in_any_order_of_revealing(data: st.DataObject) -> None:
    """Blocks filled by random candidates and random accepted sets.

    A column whose every token is banned may take any: from there on a word may
    stand, but the block still gets done.
    """
    words = data.draw(WORDS, label="words")
    length = data.draw(st.integers(1, 6), label="block")
    one_by_one = data.draw(st.booleans(), label="one by one")
    context: list[int] = []
    possible = True
    for _ in range(data.draw(st.integers(1, 3), label="blocks")):
        block = [MASK] * length
        while MASK in block:
            masked = [c for c in range(length) if block[c] == MASK]
            banned = banned_tokens(context, block, words, MASK)
            if possible:
                assert banned == brute_force_banned(context, block, words)
            candidates = list(block)
            for column in masked:
                allowed = [t for t in ALPHABET if (column, t) not in banned]
                candidates[column] = data.draw(st.sampled_from(allowed or ALPHABET))
            size = 1 if one_by_one else None
            chosen = data.draw(
                st.sets(st.sampled_from(masked), min_size=1, max_size=size)
            )
            accepted = [c in chosen for c in range(length)]
            written = [
                candidates[c] if accepted[c] else block[c] for c in range(length)
            ]
            confidence = data.draw(
                st.lists(
                    st.sampled_from([0.1, 0.5, 0.9]),
                    min_size=length,
                    max_size=length,
                )
            )
            back = conflicts(context, written, accepted, confidence, words, MASK)
            assert back < chosen, "nothing is left: the canvas would stand still"
            for column in chosen - back:
                block[column] = candidates[column]
                possible &= (column, candidates[column]) not in banned
            if possible:
                assert not any_appears([*context, *block], words)
                assert not back or len(chosen) > 1
        context += block


@given(st.data())
def test_nothing_is_taken_back_without_a_word(data: st.DataObject) -> None:
    words = data.draw(WORDS)
    block = data.draw(
        st.lists(st.sampled_from([*ALPHABET, MASK]), min_size=1, max_size=6)
    )
    assume(not any_appears(block, words))
    accepted = [token != MASK for token in block]
    assert not conflicts([], block, accepted, [0.5] * len(block), words, MASK)


@pytest.mark.parametrize(
    ("context", "block", "words", "banned"),
    [
        pytest.param([], [MASK, 1], [[0]], {(0, 0)}, id="one-token"),
        pytest.param([0], [MASK, MASK], [[0, 1]], {(0, 1)}, id="across-the-border"),
        pytest.param([], [MASK, 1], [[0, 1]], {(0, 0)}, id="first-token-comes-last"),
        pytest.param(
            [], [0, MASK, 2], [[0, 1, 2]], {(1, 1)}, id="middle-token-comes-last"
        ),
        pytest.param([], [MASK, MASK], [[0, 1]], set(), id="two-missing"),
        pytest.param([], [MASK, MASK], [[0, 1, 2]], set(), id="longer-than-the-block"),
        pytest.param(
            [0, 1, 2], [MASK], [[0, 1, 2, 0]], {(0, 0)}, id="mostly-in-the-context"
        ),
        pytest.param([2, 0, 0], [MASK], [[0, 0, 0]], {(0, 0)}, id="repeated-token"),
        pytest.param([0], [1, MASK], [[0, 2]], set(), id="broken-in-the-block"),
        pytest.param([0, 1], [], [[0, 1, 2]], set(), id="empty-block"),
        pytest.param([], [0, MASK], [[0, MASK]], set(), id="a-word-with-the-mask"),
    ],
)
def test_banned_tokens_by_hand(
    context: list[int],
    block: list[int],
    words: list[list[int]],
    banned: set[tuple[int, int]],
) -> None:
    assert banned_tokens(context, block, words, MASK) == banned


@pytest.mark.parametrize(
    ("context", "block", "confidence", "words", "expected"),
    [
        pytest.param([], [0, 1], [0.9, 0.5], [[0, 1]], {1}, id="the-least-sure"),
        pytest.param([], [0, 1], [0.5, 0.5], [[0, 1]], {1}, id="rightmost-of-a-tie"),
        pytest.param([], [0, 1], [0.4, 0.5], [[0, 1]], {0}, id="first-column"),
        pytest.param([2], [0, 1], [0.4, 0.5], [[2, 0, 1]], {0}, id="across-the-border"),
        pytest.param(
            [],
            [0, 1, 2],
            [0.9, 0.1, 0.8],
            [[0, 1], [1, 2]],
            {1},
            id="one-column-breaks-two-words",
        ),
        pytest.param(
            [],
            [0, 1, 2, 3],
            [0.9, 0.1, 0.8, 0.7],
            [[0, 1], [1, 2, 3]],
            {1},
            id="a-broken-word-costs-no-more",
        ),
        pytest.param(
            [],
            [0, 0, 0, 0],
            [0.5, 0.6, 0.7, 0.8],
            [[0, 0]],
            {0, 1, 2},
            id="all-but-one",
        ),
        pytest.param([], [0, 1], [0.9, 0.5], [[1], [0, 1]], {1}, id="after-a-lost-one"),
        pytest.param(
            [],
            [MASK, 0, 1],
            [0.0, 0.9, 0.5],
            [[MASK], [0, 1]],
            {2},
            id="mask-in-a-word",
        ),
    ],
)
def test_conflicts_by_hand(
    context: list[int],
    block: list[int],
    confidence: list[float],
    words: list[list[int]],
    expected: set[int],
) -> None:
    accepted = [token != MASK for token in block]
    back = conflicts(context, block, accepted, confidence, words, MASK)
    assert back == expected


def test_a_column_without_a_good_token_does_not_stop_the_canvas() -> None:
    """Only token 0 is allowed, and it is a bad word: it must come out all the same."""
    assert banned_tokens([], [MASK], [[0]], MASK) == {(0, 0)}
    assert conflicts([], [0], [True], [0.0], [[0]], MASK) == set()


def test_columns_of_earlier_steps_stay() -> None:
    """Column 0 is less sure, but it is not of this step."""
    accepted = [False, True, True]
    back = conflicts([], [0, 1, 2], accepted, [0.1, 0.9, 0.8], [[0, 1, 2]], MASK)
    assert back == {2}
