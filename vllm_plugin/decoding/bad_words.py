# SPDX-License-Identifier: Apache-2.0
"""Bad words on a canvas: a sequence is forbidden in whatever order it appears.

Left-to-right decoding only has to watch a word's last token. On a canvas any of
its tokens may come last, and several may come in one step.
"""

from collections.abc import Iterator, Sequence


def _windows(
    context: Sequence[int], block: Sequence[int], word: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """Places where ``word`` could stand and touch the block.

    Yields:
        (first column, ids): the column is negative inside the context. The block
        is read when a window is asked for, so it may change in between.
    """
    reach = min(len(word) - 1, len(context))
    for first in range(-reach, len(block) - len(word) + 1):
        columns = range(first, first + len(word))
        yield first, [context[c] if c < 0 else block[c] for c in columns]


def banned_tokens(
    context: Sequence[int],
    block: Sequence[int],
    words: Sequence[Sequence[int]],
    mask_id: int,
) -> set[tuple[int, int]]:
    """(column, token) pairs that would complete a bad word on their own.

    Args:
        context: output tokens left of the block.
        block: ids of the block, ``mask_id`` where not unmasked.
        words: forbidden token sequences; one with ``mask_id`` never appears.
        mask_id: the mask token.
    """
    banned = set()
    for word in words:
        if mask_id in word:
            continue
        for first, ids in _windows(context, block, word):
            missing = [i for i, token in enumerate(ids) if token != word[i]]
            if len(missing) == 1 and ids[missing[0]] == mask_id:
                banned.add((first + missing[0], word[missing[0]]))
    return banned


def conflicts(
    context: Sequence[int],
    block: Sequence[int],
    accepted: Sequence[bool],
    confidence: Sequence[float],
    words: Sequence[Sequence[int]],
    mask_id: int,
) -> set[int]:
    """Columns to take back so that no bad word appears in this step.

    Of the columns accepted in this step that form a word together, the least
    sure goes, the rightmost on a tie. The last one of a word is never taken
    back: ``banned_tokens`` keeps a single column from completing a word, and
    where it could not (every token of that column is banned) the canvas has to
    move on all the same. So at least one accepted column stays.

    Args:
        context: output tokens left of the block.
        block: ids of the block with this step's candidates written in.
        accepted: columns that this step unmasks.
        confidence: confidence of each column's candidate.
        words: forbidden token sequences; one with ``mask_id`` never appears.
        mask_id: the mask token.
    """
    ids = list(block)
    withdrawn: set[int] = set()
    for word in words:
        if mask_id in word:
            continue
        # Taking a column back never forms a word: one pass finds them all.
        for first, window in _windows(context, ids, word):
            if window != list(word):
                continue
            columns = range(max(first, 0), first + len(word))
            fresh = [c for c in columns if accepted[c] and c not in withdrawn]
            if len(fresh) > 1:
                column = min(fresh, key=lambda c: (confidence[c], -c))
                withdrawn.add(column)
                ids[column] = mask_id
    return withdrawn
