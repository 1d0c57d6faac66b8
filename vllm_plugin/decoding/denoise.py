# SPDX-License-Identifier: Apache-2.0
"""One denoising step over a batch of blocks: score, accept, write."""

from typing import NamedTuple

import torch

from vllm_unmask.decoding.acceptance import accept_above, accept_top, scheduled_count
from vllm_unmask.decoding.scoring import Scores

# Confidence is at most 1, so this threshold accepts nothing: the static
# strategy is the threshold strategy without its threshold.
NEVER = 2.0


class Strategy(NamedTuple):
    """The acceptance rule of each request.

    ``static``: the schedule alone. ``threshold``: everything above the
    threshold, and at least what the schedule asks for (SDAR
    ``low_confidence_dynamic``; Fast-dLLM with one position as the floor).
    """

    num_steps: torch.Tensor  # int64 [requests], steps of the schedule
    threshold: torch.Tensor  # float32 [requests], NEVER for static
    strict: torch.Tensor  # bool [requests], > or >=


def accept(
    scores: Scores,
    masked: torch.Tensor,
    num_masks: torch.Tensor,
    step: torch.Tensor,
    strategy: Strategy,
) -> torch.Tensor:
    """Positions to unmask: the threshold's choice and the schedule's floor.

    Args:
        scores: each tensor [requests, block].
        masked: bool [requests, block].
        num_masks: int64 [requests], masks when the block was opened.
        step: int64 [requests], denoising step within the block.
        strategy: the rule of each request.

    Returns:
        bool [requests, block], a subset of ``masked``; at least one position of
        every request that has a mask.
    """
    count = scheduled_count(num_masks, strategy.num_steps, step)
    chosen = accept_top(scores.order, masked, count)
    return chosen | accept_above(
        scores.confidence, masked, strategy.threshold, strategy.strict
    )
