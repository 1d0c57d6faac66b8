# SPDX-License-Identifier: Apache-2.0
"""Which live rows of a request see which, for each way of verifying a draft.

A mask is bool [W, W]: row ``i`` sees the key of live row ``j`` where ``mask[i, j]``.
In the pictures a line is a row, a column a key, ``#`` seen and ``.`` not. What the
rows hold (ids, positions) is the caller's matter; every row sees the whole prefix.
"""

from collections.abc import Sequence

import torch


def causal_mask(width: int) -> torch.Tensor:
    """Every row sees itself and the rows before it.

    Verifies a draft in families whose row ``i - 1`` predicts token ``i``. Width 3::

        # . .
        # # .
        # # #
    """
    return torch.ones(width, width, dtype=torch.bool).tril()


def s2d2_mask(block: int, span: range | None = None) -> torch.Tensor:
    """The block as drafted, then a MASK row for each position to be verified.

    Verifies a draft in families whose row ``i`` predicts token ``i`` (S2D2, the "2L"
    mask): a MASK row at position ``i`` sees the drafted rows left of ``i`` and itself,
    which is what a model with blocks of one position sees when it predicts ``i``.
    The draft of three tokens and its span 1..2::

        # . . | . .     draft 0
        # # . | . .     draft 1
        # # # | . .     draft 2
        # . . | # .     MASK at 1
        # # . | . #     MASK at 2

    Args:
        block: drafted positions.
        span: positions in ``range(block)`` to verify; all of them if None. MASK rows
            do not see each other, so a row is the same in every span that has it.

    Returns:
        bool [block + len(span), block + len(span)].
    """
    positions = torch.tensor(list(range(block) if span is None else span))
    mask = torch.eye(block + len(positions), dtype=torch.bool)
    mask[:block, :block] = causal_mask(block)
    mask[block:, :block] = torch.arange(block) < positions.unsqueeze(1)
    return mask


def candidates_mask(block: int, count: int) -> torch.Tensor:
    """Candidate canvases that see themselves, both ways, and no other.

    Verifies and drafts at once (FreeDave). Two canvases of two positions::

        # # | . .
        # # | . .
        . . | # #
        . . | # #

    Returns:
        bool [count * block, count * block].
    """
    canvas = torch.arange(count).repeat_interleave(block)
    return canvas.unsqueeze(1) == canvas


def tidar_mask(draft: int, groups: int) -> torch.Tensor:
    """A causal draft, then the next draft for each number of accepted tokens.

    Group ``a`` has ``draft`` MASK rows, which see each other and the first ``a``
    drafted rows, as if exactly these had been accepted (TiDAR). Draft 2, groups 3::

        # . | . . | . . | . .     draft 0
        # # | . . | . . | . .     draft 1
        . . | # # | . . | . .     group 0: nothing accepted
        . . | # # | . . | . .
        # . | . . | # # | . .     group 1
        # . | . . | # # | . .
        # # | . . | . . | # #     group 2: all accepted
        # # | . . | . . | # #

    Args:
        draft: drafted tokens.
        groups: ``draft + 1`` for every outcome; fewer leave out the last ones.

    Returns:
        bool [draft * (1 + groups), draft * (1 + groups)].
    """
    mask = torch.zeros(draft * (1 + groups), draft * (1 + groups), dtype=torch.bool)
    mask[:draft, :draft] = causal_mask(draft)
    accepted = torch.arange(groups).repeat_interleave(draft)
    mask[draft:, :draft] = torch.arange(draft) < accepted.unsqueeze(1)
    mask[draft:, draft:] = candidates_mask(draft, groups)
    return mask


def pack_masks(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Masks of the requests of a batch, in the form that the operator reads.

    Bits instead of bytes: a kernel reads one word a row for 32 keys, a row's words lie
    where its query lies, and requests of different widths need no offsets. Words are
    int32, as those of a grammar's bitmask, because GPUs shift 64 bits in two halves.

    Args:
        masks: bool [W, W] for each request, in the order of their rows.

    Returns:
        int32 [rows, ceil(max W / 32)]: key ``j`` of a row's own request is bit
        ``j % 32`` of word ``j // 32``.
    """
    words = -(-max((len(mask) for mask in masks), default=0) // 32)
    if not words:
        return torch.zeros(0, 0, dtype=torch.int32)
    bits = torch.cat(
        [torch.nn.functional.pad(mask, (0, 32 * words - len(mask))) for mask in masks]
    )
    bit = torch.arange(32, dtype=torch.int32, device=bits.device)
    shifted = bits.view(-1, words, 32).to(torch.int32) << bit
    return shifted.sum(2, dtype=torch.int32)


def unpack_mask(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The first ``width`` keys of rows packed by `pack_masks`: bool [rows, width]."""
    bit = torch.arange(32, dtype=torch.int32, device=packed.device)
    return (packed.unsqueeze(2) >> bit & 1).flatten(1)[:, :width].bool()
