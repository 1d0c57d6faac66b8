# SPDX-License-Identifier: Apache-2.0
"""When a draft is worth a forward that verifies it: the routing policies of S2D2.

A policy decides for every request whether the first span of its block is verified,
from statistics of the draft's rows. What it remembers goes in and comes out. Follows
the authors' code (phymhan/S2D2, SDAR/generate_ssd_policy.py) where its README or the
paper (arXiv 2603.25702) differ:

* hysteresis switches on above its upper score, not at it;
* the conservative configuration for LLaDA2.1, said to verify rarely, verifies
  whenever there is a span: the score is at least -4 and -5 is asked for.

The sixth estimate of the code, the sum of squared probabilities, is left out: it needs
another pass over the logits.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

POLICIES = ("span_length", "score_threshold", "score_hysteresis", "contextual_bandit")

# Estimates of a draft's acceptance and the authors' default of each one's parameter.
# m: probability of the first token less that of the second; c: the candidate's; H:
# entropy over the largest there can be.
ESTIMATES: Mapping[str, float] = {
    "margin_threshold": 0.05,  # 1 if m > x else 0
    "entropy_threshold": 0.5,  # 1 if H < x else 0
    "confidence_power": 1.0,  # c ** x
    "margin_linear": 1.0,  # min(x * m, 1)
    "entropy_decay": 1.0,  # exp(-x * H)
}

# Bins of each of the bandit's three features.
_BINS = 2
BUCKETS = _BINS**3


class Configuration(NamedTuple):
    """Numbers of one experiment; of a policy only those that it reads count."""

    policy: str
    block: int
    threshold: float  # of the rule that accepts what is not verified
    estimate: str = "entropy_decay"
    cost: float = 0.0
    dynamic: bool = False
    min_score: float = 0.0
    on_above: float = 0.0
    off_below: float = -1.0
    min_span: int = 1


# From the README of phymhan/S2D2. SDAR ran with its token-causal cache and temperature
# 1, Fast-dLLM v2 (here: its sub-blocks) and LLaDA2.1 greedily and without.
PUBLISHED: Mapping[str, Configuration] = {
    "sdar_4": Configuration("score_threshold", 4, 0.85, cost=1),
    "sdar_16": Configuration("score_threshold", 16, 0.85),
    "fast_dllm_v2_4": Configuration(
        "score_hysteresis", 4, 0.9, cost=1, dynamic=True, on_above=1, off_below=-5
    ),
    "fast_dllm_v2_16": Configuration(
        "score_hysteresis", 16, 0.9, cost=1, dynamic=True, on_above=1, off_below=-5
    ),
    "fast_dllm_v2_32": Configuration("span_length", 32, 0.9, min_span=8),
    "llada2_conservative": Configuration(
        "score_threshold", 32, 0.95, cost=4, min_score=-5
    ),
    "llada2_quality": Configuration("score_threshold", 32, 0.7, cost=4),
}


def normalised_entropy(entropy: torch.Tensor, vocab: int) -> torch.Tensor:
    """Entropy in nats, of any shape, as a share of the largest, ``ln(vocab)``."""
    return entropy / math.log(max(vocab, 2))


def estimate_acceptance(
    estimate: torch.Tensor,
    parameter: torch.Tensor,
    confidence: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    entropy: torch.Tensor,
    vocab: int,
) -> torch.Tensor:
    """How likely each draft is to be accepted.

    Args:
        estimate: int64 [requests], index into ``ESTIMATES``.
        parameter: float32 [requests], its parameter.
        confidence: float32 [requests, block], probability of the draft.
        first: float32 [requests, block], largest probability.
        second: float32 [requests, block], second largest.
        entropy: float32 [requests, block], nats.
        vocab: tokens that there are.

    Returns:
        float32 [requests, block] in [0, 1].
    """
    x, kind = parameter.unsqueeze(1), estimate.unsqueeze(1)
    margin = first - second
    doubt = normalised_entropy(entropy, vocab)
    estimates = (
        (margin > x).float(),
        (doubt < x).float(),
        confidence.clamp(0, 1) ** x,
        x * margin,
        (-x * doubt).exp(),
    )
    chosen = estimates[0]
    for index, values in enumerate(estimates):
        chosen = torch.where(kind == index, values, chosen)
    return chosen.clamp(0, 1)


def expected_accepted(acceptance: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """Drafts that a verification is expected to accept before its first correction.

    ``sum over k of the product of the span's first k acceptances``.

    Args:
        acceptance: float32 [requests, block] in [0, 1].
        span: bool [requests, block], one run of each request or nothing.

    Returns:
        float32 [requests]; 0 without a span.
    """
    # Nothing lies between the span's positions; what lies before them is skipped.
    prefix = acceptance.masked_fill(~span, 1.0).cumprod(dim=1)
    return prefix.masked_fill(~span, 0.0).sum(dim=1)


def score(
    expected: torch.Tensor,
    span: torch.Tensor,
    confidence: torch.Tensor,
    masked: torch.Tensor,
    threshold: torch.Tensor,
    cost: torch.Tensor,
    dynamic: torch.Tensor,
) -> torch.Tensor:
    """What a verification is expected to gain over unmasking by confidence.

    Args:
        expected: float32 [requests], of `expected_accepted`.
        span: bool [requests, block].
        confidence: float32 [requests, block].
        masked: bool [requests, block], all masks of the block.
        threshold: float32 [requests], unmasks with ``>`` what is not verified.
        cost: float32 [requests], drafts that a verification has to pay for.
        dynamic: bool [requests], cost for each mask that passes the threshold, not
            once.

    Returns:
        float32 [requests]; -inf without a span.
    """
    sure = (masked & (confidence > threshold.unsqueeze(1))).sum(dim=1)
    gain = expected - cost * torch.where(dynamic, sure, 1)
    return gain.masked_fill(~span.any(dim=1), -torch.inf)


def route_span_length(span: torch.Tensor, min_span: torch.Tensor) -> torch.Tensor:
    """Verify spans of at least ``min_span``.

    Args:
        span: bool [requests, block].
        min_span: int64 [requests], at least 1.

    Returns:
        bool [requests].
    """
    return span.sum(dim=1) >= min_span


def route_threshold(score: torch.Tensor, min_score: torch.Tensor) -> torch.Tensor:
    """Verify where ``score``, float32 [requests], is at least ``min_score``."""
    return score >= min_score


def route_hysteresis(
    verified: torch.Tensor,
    score: torch.Tensor,
    on_above: torch.Tensor,
    off_below: torch.Tensor,
) -> torch.Tensor:
    """Verify above one score, then until the score falls below another.

    Args:
        verified: bool [requests], the last decision; False for a new request.
        score: float32 [requests].
        on_above: float32 [requests].
        off_below: float32 [requests], less than ``on_above``.

    Returns:
        bool [requests], also the state for the next decision.
    """
    return torch.where(verified, score >= off_below, score > on_above)


class Bandit(NamedTuple):
    """What each action has been worth in each situation; a new request has zeros."""

    counts: torch.Tensor  # int64 [requests, 2, BUCKETS], action 1 verifies
    rewards: torch.Tensor  # float32 [requests, 2, BUCKETS], their sum
    decisions: torch.Tensor  # int64 [requests]


def new_bandit(requests: int, device: torch.device | None = None) -> Bandit:
    """The state of so many new requests."""
    counts = torch.zeros((requests, 2, BUCKETS), dtype=torch.int64, device=device)
    return Bandit(counts, counts.float(), counts[:, 0, 0].clone())


def situation(
    span: torch.Tensor, masked: torch.Tensor, entropy: torch.Tensor, vocab: int
) -> torch.Tensor:
    """The bandit's bucket: span length, progress and entropy, halved each.

    Args:
        span: bool [requests, block].
        masked: bool [requests, block], all masks of the block.
        entropy: float32 [requests, block], nats; its mean over the span counts.
        vocab: tokens that there are.

    Returns:
        int64 [requests], below ``BUCKETS``.
    """
    block = span.shape[1]
    length = span.sum(dim=1).clamp(min=1)
    doubt = normalised_entropy(entropy, vocab).masked_fill(~span, 0.0).sum(dim=1)
    features = (
        (length - 1) / max(block - 1, 1),
        1 - masked.sum(dim=1) / block,
        doubt / length,
    )
    bucket = torch.zeros_like(length)
    for feature in features:
        bin_ = (feature * _BINS).long().clamp(0, _BINS - 1)
        bucket = bucket * _BINS + bin_
    return bucket


def route_bandit(
    bandit: Bandit, bucket: torch.Tensor, exploration: torch.Tensor
) -> tuple[torch.Tensor, Bandit]:
    """Verify if that has the higher upper confidence bound (UCB1), or an equal one.

    ``mean reward + exploration * sqrt(ln(decisions) / count)``, infinite for an action
    that was never taken.

    Args:
        bandit: before the decision.
        bucket: int64 [requests], of `situation`.
        exploration: float32 [requests]; the authors' default is 1.

    Returns:
        bool [requests] and the state, in which the decision is counted but not yet
        rewarded.
    """
    row = torch.arange(len(bucket), device=bucket.device)
    count = bandit.counts[row, :, bucket]
    tried = count.clamp(min=1)
    decisions = bandit.decisions + 1
    spread = (decisions.float().log().unsqueeze(1) / tried).sqrt()
    bound = bandit.rewards[row, :, bucket] / tried + exploration.unsqueeze(1) * spread
    bound = bound.masked_fill(count == 0, torch.inf)
    return bound[:, 1] >= bound[:, 0], bandit._replace(decisions=decisions)


def reward_bandit(
    bandit: Bandit,
    bucket: torch.Tensor,
    verified: torch.Tensor,
    num_tokens: torch.Tensor,
) -> Bandit:
    """Reward a decision with the tokens that each of its forwards gave.

    Args:
        bandit: after the decision.
        bucket: int64 [requests], that it was made in.
        verified: bool [requests], the decision: two forwards if True, otherwise one.
        num_tokens: int64 [requests], unmasked by the step.
    """
    row = torch.arange(len(bucket), device=bucket.device)
    place = (row, verified.long(), bucket)
    reward = num_tokens / (1.0 + verified)
    counts = bandit.counts.index_put(place, torch.ones_like(bucket), accumulate=True)
    rewards = bandit.rewards.index_put(place, reward, accumulate=True)
    return bandit._replace(counts=counts, rewards=rewards)
