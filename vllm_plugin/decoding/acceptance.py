# SPDX-License-Identifier: Apache-2.0
"""Slot *accept*: which masked positions are unmasked in this step.

The rules here look at one forward pass; those that remember are in ``history``.
A rule may choose nothing unless it is called complete: the caller adds the
schedule's count, so that every step unmasks something.
"""

import math

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


def cosine_count(
    num_masks: torch.Tensor, num_steps: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    """Positions that the cosine schedule unmasks at ``step``, at least 1.

    Few at first, many at the end: ``floor(num_masks * cos(pi/2 * s/num_steps))``
    masks are left after ``s`` steps (MaskGIT). Arguments and result are those of
    `scheduled_count`.
    """

    def left(steps: torch.Tensor) -> torch.Tensor:
        quarter_turn = steps.double().div(num_steps).clamp(max=1) * (math.pi / 2)
        # cos(pi/3) is a half, but no float says so: without the margin a device's
        # last bit would decide.
        return (num_masks * quarter_turn.cos() + 1e-9).floor().long()

    return (left(step) - left(step + 1)).clamp(min=1)


def ascending_count(num_masks: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Positions that steps of ascending size unmask: 1, 2, 4, ... (EOSER-ASS).

    At most ``num_masks``. Arguments and result are those of `scheduled_count`.
    """
    # 2**62 is the largest power of two in an int64.
    doubled = torch.ones_like(step) << step.clamp(max=62)
    return doubled.minimum(num_masks).clamp(min=1)


def ranking(order: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Positions by descending order score, masked ones first.

    Ties go to the smallest position, so that every device agrees.

    Args:
        order: float32 [requests, block], higher first, not NaN.
        masked: bool [requests, block].

    Returns:
        int64 [requests, block], a permutation of each row's positions.
    """
    # The lowest finite score stands for -inf, so that a masked position still
    # outranks every other one.
    lowest = torch.finfo(order.dtype).min
    key = order.clamp(min=lowest).masked_fill(~masked, -torch.inf)
    return key.argsort(dim=-1, descending=True, stable=True)


def _unranked(
    chosen: torch.Tensor, ranked: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    """Which masked positions are chosen, given that in the order of ``ranked``."""
    return masked & torch.zeros_like(masked).scatter_(1, ranked, chosen)


def accept_top(
    order: torch.Tensor, masked: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """The ``count`` masked positions of highest order score.

    Args:
        order: float32 [requests, block], higher first, not NaN; ties go to the
            smallest position.
        masked: bool [requests, block].
        count: int64 [requests]; all masked positions if there are fewer.

    Returns:
        bool [requests, block], a subset of ``masked``.
    """
    rank = torch.arange(order.shape[1], device=order.device)
    return _unranked(rank < count.unsqueeze(1), ranking(order, masked), masked)


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


def accept_factor(
    confidence: torch.Tensor, masked: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """The most confident positions whose doubts are small for their number.

    With the confidences sorted, the n-th is accepted if all before it are and
    ``(n + 1) * (1 - confidence) <= factor`` (Fast-dLLM).

    Args:
        confidence: float32 [requests, block].
        masked: bool [requests, block].
        factor: float32 [requests]; the larger, the more.

    Returns:
        bool [requests, block], a subset of ``masked``, possibly empty.
    """
    ranked = ranking(confidence, masked)
    doubt = 1 - confidence.gather(1, ranked)
    number = torch.arange(1, masked.shape[1] + 1, device=masked.device)
    # Number and doubt grow: nothing passes after the first that fails.
    passed = (number + 1) * doubt <= factor.unsqueeze(1)
    return _unranked(passed, ranked, masked)


def accept_entropy_bounded(
    order: torch.Tensor,
    entropy: torch.Tensor,
    masked: torch.Tensor,
    bound: torch.Tensor,
    whole_sum: torch.Tensor,
) -> torch.Tensor:
    """As many of the best positions as an entropy budget pays for.

    The largest prefix of the order with ``sum(H) - max(H) <= bound``, which bounds
    what its tokens can say about each other (EB-Sampler), or with
    ``sum(H) < bound`` (SDAR ``entropy_bounded``).

    Args:
        order: float32 [requests, block], higher first.
        entropy: float32 [requests, block], nats, at least 0.
        masked: bool [requests, block].
        bound: float32 [requests], nats.
        whole_sum: bool [requests], True for SDAR's stricter form.

    Returns:
        bool [requests, block], a subset of ``masked``; with ``whole_sum`` possibly
        empty.
    """
    ranked = ranking(order, masked)
    spent = entropy.gather(1, ranked)
    total = spent.cumsum(dim=1)
    shared = total - spent.cummax(dim=1).values
    limit = bound.unsqueeze(1)
    passed = torch.where(whole_sum.unsqueeze(1), total < limit, shared <= limit)
    # Both sums grow, but a difference that is rounded might fall by its last bit.
    prefix = passed.long().cumprod(dim=1).bool()
    return _unranked(prefix, ranked, masked)


def accept_entropy_below(
    entropy: torch.Tensor, masked: torch.Tensor, bound: torch.Tensor
) -> torch.Tensor:
    """Every masked position of at most ``bound`` entropy (dParallel).

    Args:
        entropy: float32 [requests, block], nats.
        masked: bool [requests, block].
        bound: float32 [requests], nats.

    Returns:
        bool [requests, block], a subset of ``masked``.
    """
    return masked & (entropy <= bound.unsqueeze(1))


def accept_local_leap(
    confidence: torch.Tensor,
    masked: torch.Tensor,
    threshold: torch.Tensor,
    relaxed_threshold: torch.Tensor,
    radius: torch.Tensor,
    strict: torch.Tensor,
) -> torch.Tensor:
    """A threshold that is lower around positions that pass it (LocalLeap).

    Args:
        confidence: float32 [requests, block].
        masked: bool [requests, block].
        threshold: float32 [requests], makes an anchor of a position.
        relaxed_threshold: float32 [requests], for the anchors' neighbours.
        radius: int64 [requests], positions that an anchor reaches to either side.
        strict: bool [requests], True for ``>``, False for ``>=``.

    Returns:
        bool [requests, block], a subset of ``masked``; contains the anchors.
    """
    anchors = accept_above(confidence, masked, threshold, strict)
    length = masked.shape[1]
    # anchors_before[:, i] counts the anchors left of i, i up to the block's end.
    anchors_before = torch.nn.functional.pad(anchors.long().cumsum(dim=1), (1, 0))
    column = torch.arange(length, device=masked.device)
    reach = radius.unsqueeze(1).clamp(max=length)
    start = (column - reach).clamp(min=0)
    stop = (column + reach + 1).clamp(max=length)
    near = anchors_before.gather(1, stop) > anchors_before.gather(1, start)
    relaxed = accept_above(confidence, masked, relaxed_threshold, strict)
    return anchors | (near & relaxed)


def accept_runs(
    confidence: torch.Tensor,
    masked: torch.Tensor,
    threshold: torch.Tensor,
    low_threshold: torch.Tensor,
) -> torch.Tensor:
    """Everything sure, and the best of each run of masked positions.

    One position inside each run halves it, which keeps the positions unmasked
    together apart (dInfer's hierarchical decoder).

    Args:
        confidence: float32 [requests, block].
        masked: bool [requests, block].
        threshold: float32 [requests], accepts on its own with ``>``.
        low_threshold: float32 [requests], what the best of a run has to exceed;
            of equally good ones each is accepted.

    Returns:
        bool [requests, block], a subset of ``masked``.
    """
    rows, length = masked.shape
    # Positions of one run have as many unmasked positions on their left.
    run = (~masked).long().cumsum(dim=1)
    score = confidence.masked_fill(~masked, -torch.inf)
    peak = score.new_full((rows, length + 1), -torch.inf)
    peak.scatter_reduce_(1, run, score, "amax")
    best = (score == peak.gather(1, run)) & (confidence > low_threshold.unsqueeze(1))
    return masked & (best | (confidence > threshold.unsqueeze(1)))


def accept_capped(
    confidence: torch.Tensor,
    masked: torch.Tensor,
    barred: torch.Tensor,
    threshold: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
) -> torch.Tensor:
    """A complete rule: what passes the threshold, but neither too few nor too many.

    Confidence-aware decoding of CD4LM. Barred positions wait,
    unless there is no other.

    Args:
        confidence: float32 [requests, block].
        masked: bool [requests, block].
        barred: bool [requests, block], positions that may not be accepted yet.
        threshold: float32 [requests], counts with ``>=``.
        least: int64 [requests], at least 1.
        most: int64 [requests], at least ``least``.

    Returns:
        bool [requests, block], a subset of ``masked``; at least one position of
        every request that has a mask.
    """
    valid = masked & ~barred
    passed = (valid & (confidence >= threshold.unsqueeze(1))).sum(dim=1)
    choice = torch.where(valid.any(dim=1, keepdim=True), valid, masked)
    return accept_top(confidence, choice, passed.maximum(least).minimum(most))


def accept_confident(
    sureness: torch.Tensor,
    masked: torch.Tensor,
    threshold: torch.Tensor,
    num_masks: torch.Tensor,
    num_steps: torch.Tensor,
    step: torch.Tensor,
) -> torch.Tensor:
    """A complete rule: all that is sure, otherwise the next step that does anything.

    Confident decoding of Dimple. At time ``j`` of its schedule
    a share ``1 - 0.999 * j / num_steps`` of the block is to be masked. Rounded
    down, many a time unmasks nothing; the first from ``step + 1`` on that does is
    taken, and if there is none, all that is left.

    Args:
        sureness: float32 [requests, block], higher first; may be negative.
        masked: bool [requests, block].
        threshold: float32 [requests], accepts with ``>``.
        num_masks: int64 [requests], masks when the block was opened.
        num_steps: int64 [requests], at least 1.
        step: int64 [requests], denoising step within the block.

    Returns:
        bool [requests, block], a subset of ``masked``; at least one position of
        every request that has a mask.
    """
    sure = masked & (sureness > threshold.unsqueeze(1))
    # In integers, where no rounding can decide: 0.999 * j * num_masks / num_steps
    # positions are unmasked by time j.
    left = masked.sum(dim=1)
    done = num_masks - left
    per_time = 999 * num_masks.clamp(min=1)
    whole = 1000 * num_steps
    # Rounded up: the first time by which done + 1 positions are unmasked.
    time = -(-(done + 1) * whole // per_time)
    time = time.maximum(step + 1)
    count = torch.where(time > num_steps, left, time * per_time // whole - done)
    return torch.where(
        sure.any(dim=1, keepdim=True), sure, accept_top(sureness, masked, count)
    )
