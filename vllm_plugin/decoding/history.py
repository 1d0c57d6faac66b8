# SPDX-License-Identifier: Apache-2.0
"""Slot *accept*: the rules that remember earlier steps of the block.

What a rule remembers is a tuple of tensors, one row a request, that goes in and
comes out. A row at step 0 begins a new block: what it remembers is not read.
"""

from typing import NamedTuple

import torch

from vllm_unmask.decoding.acceptance import accept_top

# KLASS adds it to both probabilities, so that one that fell to 0 has a logarithm.
_TINY = 1e-12
# CCD watches a single position once one in so many of the block's masks is left.
_LAST_PART = 10


class Stability(NamedTuple):
    """How long the distribution of each position has not changed."""

    probs: torch.Tensor  # float32 [requests, block, vocab], of the last step
    streak: torch.Tensor  # int64 [requests, block], steps without a change


def update_stability(
    state: Stability | None,
    probs: torch.Tensor,
    step: torch.Tensor,
    kl_threshold: torch.Tensor,
) -> Stability:
    """Compare with the last step: a position is stable if KL(now, last) is small.

    Args:
        state: of the last step; None if every row begins a block.
        probs: float32 [requests, block, vocab], before any fusing; kept as it is.
        step: int64 [requests], denoising step within the block.
        kl_threshold: float32 [requests], nats; below it nothing has changed.

    Returns:
        The state after this step. The first step compares with nothing, so its
        streak is 0.
    """
    if state is None:
        return Stability(probs, step.new_zeros(probs.shape[:2]))
    ratio = (probs + _TINY).log_().sub_((state.probs + _TINY).log_())
    divergence = ratio.mul_(probs).sum(dim=-1)
    stable = (divergence < kl_threshold.unsqueeze(1)) & (step > 0).unsqueeze(1)
    return Stability(probs, torch.where(stable, state.streak + 1, 0))


def accept_stable(
    confidence: torch.Tensor,
    masked: torch.Tensor,
    streak: torch.Tensor,
    threshold: torch.Tensor,
    history: torch.Tensor,
) -> torch.Tensor:
    """Every position that is sure and has been stable for long enough (KLASS).

    Args:
        confidence: float32 [requests, block].
        masked: bool [requests, block].
        streak: int64 [requests, block], of `update_stability`.
        threshold: float32 [requests], accepts with ``>``.
        history: int64 [requests], steps without a change that are asked for.

    Returns:
        bool [requests, block], a subset of ``masked``.
    """
    sure = confidence > threshold.unsqueeze(1)
    return masked & sure & (streak >= history.unsqueeze(1))


class RevealedConfidence(NamedTuple):
    """Confidence at which the block's tokens were revealed."""

    total: torch.Tensor  # float32 [requests], sum
    count: torch.Tensor  # int64 [requests], tokens in the sum


def accept_adaptive(
    confidence: torch.Tensor,
    masked: torch.Tensor,
    state: RevealedConfidence,
    step: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
) -> torch.Tensor:
    """Every position as sure as those revealed so far were on average (BACD).

    As long as nothing is revealed, the most confident position sets the threshold.

    Args:
        confidence: float32 [requests, block].
        masked: bool [requests, block].
        state: of the last step.
        step: int64 [requests], denoising step within the block.
        low: float32 [requests], the threshold is at least this.
        high: float32 [requests], and at most this, ``low`` or more.

    Returns:
        bool [requests, block], a subset of ``masked``.
    """
    best = confidence.masked_fill(~masked, -torch.inf).amax(dim=1)
    mean = state.total / state.count.clamp(min=1)
    usual = torch.where((step == 0) | (state.count == 0), best, mean)
    threshold = usual.maximum(low).minimum(high)
    return masked & (confidence >= threshold.unsqueeze(1))


def update_revealed(
    state: RevealedConfidence,
    confidence: torch.Tensor,
    accepted: torch.Tensor,
    step: torch.Tensor,
) -> RevealedConfidence:
    """Remember the confidence of what a step revealed.

    Args:
        state: of the last step.
        confidence: float32 [requests, block].
        accepted: bool [requests, block], all that was revealed, whichever rule
            asked for it.
        step: int64 [requests], denoising step within the block.
    """
    later = step > 0
    revealed = torch.where(accepted, confidence, 0).sum(dim=1)
    return RevealedConfidence(
        torch.where(later, state.total, 0) + revealed,
        torch.where(later, state.count, 0) + accepted.sum(dim=1),
    )


class Coherence(NamedTuple):
    """The runners-up of the last step, to be seen again with the same token."""

    watched: torch.Tensor  # bool [requests, block]
    tokens: torch.Tensor  # int64 [requests, block], most likely at the last step
    width: torch.Tensor  # int64 [requests], how many best positions are compared


def accept_coherent(
    order: torch.Tensor,
    tokens: torch.Tensor,
    masked: torch.Tensor,
    state: Coherence,
    step: torch.Tensor,
    count: torch.Tensor,
    num_masks: torch.Tensor,
    expand: torch.Tensor,
    warm_up: torch.Tensor,
) -> tuple[torch.Tensor, Coherence]:
    """A complete rule: reveal more where two steps agree (CCD, as released).

    The next best positions after those revealed are watched. A position agrees if
    it was watched, is among as many best ones again and keeps its token. When the
    schedule's choice reaches into the watched ones and at least ``count``
    positions agree, these are revealed; otherwise the schedule's choice is. The
    watch widens by one position a step and narrows again near the block's end.
    The release ranks the whole sequence, this rule the block.

    Args:
        order: float32 [requests, block], higher first.
        tokens: int64 [requests, block], the most likely ones.
        masked: bool [requests, block].
        state: of the last step.
        step: int64 [requests], denoising step within the block.
        count: int64 [requests], at least 1, what the schedule asks for.
        num_masks: int64 [requests], masks when the block was opened.
        expand: float32 [requests], at least 0; no more than ``count * (1 + expand)``
            positions are watched.
        warm_up: int64 [requests], first steps that follow the schedule alone.

    Returns:
        (accepted, state): bool [requests, block], a subset of ``masked``, at least
        one position of every request that has a mask; the state after this step.
    """
    # With a width of 1, whatever was watched in another block changes nothing:
    # only the best position can agree, and the schedule has chosen it too.
    width = torch.where(step == 0, 1, state.width)
    scheduled = accept_top(order, masked, count)
    compared = accept_top(order, masked, width)
    agreed = compared & state.watched & (tokens == state.tokens)
    reaches = (scheduled & state.watched).any(dim=1)
    warm = step >= warm_up
    seek = warm & reaches & (agreed.sum(dim=1) >= count)
    accepted = torch.where(seek.unsqueeze(1), agreed, scheduled)

    left = masked & ~accepted
    widest = (count * (1 + expand)).long()
    ending = _LAST_PART * left.sum(dim=1) <= num_masks
    width = torch.where(warm & ~ending, (width + 1).minimum(widest), 1)
    return accepted, Coherence(accept_top(order, left, width), tokens, width)
