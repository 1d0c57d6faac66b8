# SPDX-License-Identifier: Apache-2.0
"""Slot *fuse*: what changes logits and confidence before positions are chosen."""

from typing import NamedTuple

import torch


class Credit(NamedTuple):
    """How often and how surely each token has led at a position, sparsely.

    CreditDecoding keeps a number for each token of the vocabulary. A step credits
    one token a position, so a list as long as the block has steps holds them all.
    """

    tokens: torch.Tensor  # int64 [requests, block, entries], -1 for no entry
    credit: torch.Tensor  # float32 [requests, block, entries]


def update_credit(
    state: Credit,
    tokens: torch.Tensor,
    probability: torch.Tensor,
    masked: torch.Tensor,
    step: torch.Tensor,
    decay: torch.Tensor,
    power: torch.Tensor,
) -> Credit:
    """Let old credit decay and credit the token that leads now.

    Args:
        state: of the last step; not read where ``step`` is 0.
        tokens: int64 [requests, block], the most likely ones, at least 0.
        probability: float32 [requests, block], theirs, before fusing.
        masked: bool [requests, block]; the others lose their credit.
        step: int64 [requests], denoising step within the block.
        decay: float32 [requests], from 0 to 1.
        power: float32 [requests], a token gains ``probability ** power``.

    Returns:
        The state after this step. In a full list the new token takes the place of
        the smallest credit.
    """
    cleared = (~masked | (step == 0).unsqueeze(1)).unsqueeze(2)
    old_tokens = state.tokens.masked_fill(cleared, -1)
    old_credit = (state.credit * decay.view(-1, 1, 1)).masked_fill(cleared, 0)

    leader = tokens.unsqueeze(2)
    known = old_tokens == leader
    # The token's own entry, else the smallest credit: an empty entry has none.
    entry = old_credit.masked_fill(known, -1).argmin(dim=2, keepdim=True)
    kept = torch.where(known, old_credit, 0).gather(2, entry)
    gained = kept + probability.pow(power.unsqueeze(1)).unsqueeze(2)
    here = masked.unsqueeze(2)
    return Credit(
        old_tokens.scatter(2, entry, torch.where(here, leader, -1)),
        old_credit.scatter(2, entry, torch.where(here, gained, 0)),
    )


def fuse_credit(
    logits: torch.Tensor, state: Credit, weight: torch.Tensor
) -> torch.Tensor:
    """Add ``weight * log(1 + credit)`` to the logits, in place.

    Args:
        logits: float32 [requests, block, vocab], written to.
        state: after this step's `update_credit`.
        weight: float32 [requests].

    Returns:
        ``logits``.
    """
    held = state.tokens >= 0
    bonus = torch.where(held, weight.view(-1, 1, 1) * state.credit.log1p(), 0)
    return logits.scatter_add_(2, state.tokens.clamp(min=0), bonus)


def reject_early_end(
    confidence: torch.Tensor,
    is_end: torch.Tensor,
    step: torch.Tensor,
    num_steps: torch.Tensor,
    floor: torch.Tensor,
) -> torch.Tensor:
    """Lower the confidence of stop tokens, least in the last step (EOSER).

    Args:
        confidence: float32 [requests, block].
        is_end: bool [requests, block], the candidate is a stop token.
        step: int64 [requests], denoising step within the block.
        num_steps: int64 [requests], steps of the block, at least 1.
        floor: float32 [requests], the factor in the first step; it rises linearly
            to 1 in the last.

    Returns:
        float32 [requests, block].
    """
    last = num_steps - 1
    progress = torch.where(last > 0, step.minimum(last) / last.clamp(min=1), 1.0)
    factor = floor + (1 - floor) * progress
    return torch.where(is_end, confidence * factor.unsqueeze(1), confidence)
