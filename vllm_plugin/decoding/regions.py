# SPDX-License-Identifier: Apache-2.0
"""Slot *schedule*: which part of the block may be unmasked now."""

import torch


def _leftmost(flags: torch.Tensor) -> torch.Tensor:
    """First True column of each row, int64 [requests, 1]; the width if none."""
    length = flags.shape[1]
    column = torch.arange(length, device=flags.device)
    return torch.where(flags, column, length).amin(dim=1, keepdim=True)


def open_sub_block(masked: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """The leftmost sub-block that has a masked position.

    Args:
        masked: bool [requests, block].
        length: int64 [requests], at least 1; sub-blocks are counted from the
            block's first position, the last one may be shorter.

    Returns:
        int64 [requests, 1], one that lies behind the block if nothing is masked.
    """
    return _leftmost(masked) // length.unsqueeze(1)


def sub_block(masked: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Masked positions of the leftmost sub-block that has any.

    Args:
        masked: bool [requests, block].
        length: int64 [requests], as in `open_sub_block`.

    Returns:
        bool [requests, block], a subset of ``masked``.
    """
    column = torch.arange(masked.shape[1], device=masked.device)
    of_column = column // length.unsqueeze(1)
    return masked & (of_column == open_sub_block(masked, length))


def forwarded_part(
    visited: torch.Tensor,
    masked: torch.Tensor,
    length: torch.Tensor,
    width: torch.Tensor,
    shifted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions of a block the next step has to forward (Fast-dLLM v2).

    All of them at the first visit of a sub-block. Afterwards the sub-block's alone,
    which sees the others' keys and values as that step left them. Where the row before
    scores a position, all as long as the sub-block's first one is masked: that row is
    another sub-block's.

    Args:
        visited: int64 [requests, 1], the sub-block that was open in the last step,
            -1 if there was none.
        masked: bool [requests, block], after that step.
        length: int64 [requests], as in `open_sub_block`.
        width: int64 [requests], positions of the block.
        shifted: whether row ``i - 1`` scores position ``i``.

    Returns:
        First position and the one behind the last, int64 [requests] each.
    """
    opened = open_sub_block(masked, length)
    first = opened.squeeze(1) * length
    partial = (opened == visited).squeeze(1)
    if shifted:
        partial = partial & (_leftmost(masked).squeeze(1) > first)
    return (
        torch.where(partial, first, 0),
        torch.where(partial, torch.minimum(first + length, width), width),
    )


def adaptive_end(
    confidence: torch.Tensor,
    is_delimiter: torch.Tensor,
    masked: torch.Tensor,
    end: torch.Tensor,
    step: torch.Tensor,
    threshold: torch.Tensor,
    default: torch.Tensor,
) -> torch.Tensor:
    """Where the active region ends: at the surest delimiter (AdaBlock).

    The region stays while it has a masked position. The next one starts at the
    leftmost masked position. AdaBlock chooses the blocks themselves; inside a block
    that the model was trained on these regions take their part.

    Args:
        confidence: float32 [requests, block].
        is_delimiter: bool [requests, block], the candidate is a delimiter.
        masked: bool [requests, block].
        end: int64 [requests], result of the last step; not read at step 0.
        step: int64 [requests], denoising step within the block.
        threshold: float32 [requests], a delimiter counts with ``>=``.
        default: int64 [requests], at least 1, width of a region without a
            delimiter.

    Returns:
        int64 [requests], exclusive column, at most the block's width.
    """
    length = masked.shape[1]
    column = torch.arange(length, device=masked.device)
    active = (masked & (column < end.unsqueeze(1))).any(dim=1) & (step > 0)
    sure = is_delimiter & masked & (confidence >= threshold.unsqueeze(1))
    score = confidence.masked_fill(~sure, -torch.inf)
    surest = _leftmost(sure & (score == score.amax(dim=1, keepdim=True))).squeeze(1)
    plain = (_leftmost(masked).squeeze(1) + default).clamp(max=length)
    chosen = torch.where(surest < length, surest + 1, plain)
    return torch.where(active, end, chosen)


def after_end(is_end: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Masked positions right of the leftmost stop token.

    Args:
        is_end: bool [requests, block], a revealed position that holds one.
        masked: bool [requests, block].

    Returns:
        bool [requests, block], a subset of ``masked``.
    """
    column = torch.arange(masked.shape[1], device=masked.device)
    return masked & (column > _leftmost(is_end))


def first_alone(masked: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The first position of blocks that have only been opened, where it is masked.

    Where the row before a block scores its first position, that one needs nothing of
    the block; Fast-dLLM v2 has its token before it reads the block at all.

    Args:
        masked: bool [requests, block].
        step: int64 [requests], denoising step within the block.

    Returns:
        bool [requests, block], one position or none: all that these blocks unmask.
    """
    alone = torch.zeros_like(masked)
    alone[:, 0] = masked[:, 0] & (step == 0)
    return alone
