# SPDX-License-Identifier: Apache-2.0
"""Slot *schedule*: when the rest of a block is filled at once.

The sign is the gap between the two largest logits: once it is wide everywhere,
further steps hardly change a token. The less is left to do, the less it has to be.
"""

import math

import torch

# Prophet: up to which share of the steps each of its first two thresholds holds.
_EARLY, _MIDDLE = 0.33, 0.67
# SchED: how fast its exponential threshold falls.
_FALL = 2.0


def mean_gap(gap: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Mean logit gap of the masked positions.

    Args:
        gap: float32 [requests, block], largest logit minus the second largest.
        masked: bool [requests, block].

    Returns:
        float32 [requests], 0 where nothing is masked.
    """
    return torch.where(masked, gap, 0).sum(dim=1) / masked.sum(dim=1).clamp(min=1)


def prophet(
    gap_mean: torch.Tensor,
    progress: torch.Tensor,
    high: torch.Tensor,
    low: torch.Tensor,
) -> torch.Tensor:
    """Whether to fill the block now, by a threshold in three stages (Prophet).

    Args:
        gap_mean: float32 [requests], of `mean_gap`.
        progress: float32 [requests], share of the block's steps that is done.
        high: float32 [requests], threshold of the first stage, reached with
            ``>=``; the second has the mean of both.
        low: float32 [requests], threshold of the last stage.

    Returns:
        bool [requests].
    """
    later = torch.where(progress < _MIDDLE, (high + low) / 2, low)
    return gap_mean >= torch.where(progress < _EARLY, high, later)


def sched(
    gap_mean: torch.Tensor,
    progress: torch.Tensor,
    high: torch.Tensor,
    low: torch.Tensor,
    shape: torch.Tensor,
) -> torch.Tensor:
    """Whether to fill the block now, by a threshold that falls smoothly (SchED).

    Args:
        gap_mean: float32 [requests], of `mean_gap`.
        progress: float32 [requests], share of the block's steps that is done; a
            block that takes longer than planned stays at the last threshold.
        high: float32 [requests], threshold at the start, reached with ``>=``.
        low: float32 [requests], threshold at the end, which the exponential one
            does not quite reach.
        shape: int64 [requests], 0 linear, 1 cosine, 2 exponential.

    Returns:
        bool [requests].
    """
    progress = progress.clamp(max=1)
    linear = 1 - progress
    cosine = (1 + (math.pi * progress).cos()) / 2
    exponential = (-_FALL * progress).exp()
    share = torch.where(
        shape == 0, linear, torch.where(shape == 1, cosine, exponential)
    )
    return gap_mean >= low + (high - low) * share


def agreeing(
    tokens: torch.Tensor,
    previous: torch.Tensor,
    masked: torch.Tensor,
    step: torch.Tensor,
) -> torch.Tensor:
    """Whether no masked position's most likely token changed in this step.

    SchED, as released, also waits for this.

    Args:
        tokens: int64 [requests, block], the most likely ones.
        previous: int64 [requests, block], of the last step; not read at step 0.
        masked: bool [requests, block].
        step: int64 [requests], denoising step within the block.

    Returns:
        bool [requests], False at step 0.
    """
    return ((tokens == previous) | ~masked).all(dim=1) & (step > 0)
