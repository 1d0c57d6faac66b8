# SPDX-License-Identifier: Apache-2.0
"""Slot *accept*: which masked positions are unmasked in this step."""

import torch


def scheduled_count(
    num_masks: torch.Tensor, num_steps: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    """Positions that the static schedule unmasks at ``step``, at least 1.

    ``num_masks`` are spread over ``num_steps`` as evenly as integers allow,
    the remainder first (LLaDA ``get_num_transfer_tokens``). At least 1 is the
    progress floor: a schedule that ran out of steps still ends the block.

    Args:
        num_masks: int64 [requests], masks when the block was opened.
        num_steps: int64 [requests], at least 1.
        step: int64 [requests], 0 for the block's first denoising step.

    Returns:
        int64 [requests].
    """
    even = num_masks // num_steps
    return (even + (step < num_masks % num_steps)).clamp(min=1)


def accept_top(
    order: torch.Tensor, masked: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """The ``count`` masked positions of highest order score.

    Ties go to the smallest position, so that every device agrees.

    Args:
        order: float32 [requests, block], higher first, not NaN.
        masked: bool [requests, block].
        count: int64 [requests]; all masked positions if there are fewer.

    Returns:
        bool [requests, block], a subset of ``masked``.
    """
    # The lowest finite score stands for -inf, so that a masked position still
    # outranks every other one.
    lowest = torch.finfo(order.dtype).min
    key = order.clamp(min=lowest).masked_fill(~masked, -torch.inf)
    ranking = key.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(order.shape[1], device=order.device)
    first = torch.zeros_like(masked).scatter_(1, ranking, rank < count.unsqueeze(1))
    return masked & first


def accept_above(
    confidence: torch.Tensor,
    masked: torch.Tensor,
    threshold: torch.Tensor,
    strict: torch.Tensor,
) -> torch.Tensor:
    """Every masked position whose confidence passes the threshold.

    The comparison is part of the rule: ``>`` in SDAR and LLaDA2, ``>=`` in
    Fast-dLLM.

    Args:
        confidence: float32 [requests, block].
        masked: bool [requests, block].
        threshold: float32 [requests]; above 1 accepts nothing.
        strict: bool [requests], True for ``>``, False for ``>=``.

    Returns:
        bool [requests, block], a subset of ``masked``.
    """
    bound = threshold.unsqueeze(1)
    passed = torch.where(strict.unsqueeze(1), confidence > bound, confidence >= bound)
    return masked & passed
