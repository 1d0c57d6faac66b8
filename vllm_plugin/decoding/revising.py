# SPDX-License-Identifier: Apache-2.0
"""Slot *revise*: which revealed tokens are replaced or masked again.

Only inside the block being denoised: a token whose KV is final stays.
"""

import torch

from vllm_unmask.decoding.acceptance import accept_top


def edited(
    tokens: torch.Tensor,
    confidence: torch.Tensor,
    ids: torch.Tensor,
    editable: torch.Tensor,
    threshold: torch.Tensor,
) -> torch.Tensor:
    """Revealed positions that take another token (LLaDA2.1 token editing).

    Args:
        tokens: int64 [requests, block], the most likely ones: drawn ones would
            never settle.
        confidence: float32 [requests, block], of ``tokens``.
        ids: int64 [requests, block], what the block holds.
        editable: bool [requests, block], revealed and not of the prompt.
        threshold: float32 [requests], accepts with ``>``.

    Returns:
        bool [requests, block], a subset of ``editable``.
    """
    return editable & (tokens != ids) & (confidence > threshold.unsqueeze(1))


def remasked_at_random(
    revealed: torch.Tensor,
    confidence: torch.Tensor,
    num_masks: torch.Tensor,
    num_revealed_next: torch.Tensor,
    rate: torch.Tensor,
    variant: torch.Tensor,
    draws: torch.Tensor,
) -> torch.Tensor:
    """Revealed positions that are masked again, each by its own draw (ReMDM).

    A position goes back with probability ``sigma``, at most the ``sigma_max`` with
    which the next step can still reach its share of revealed positions.

    Args:
        revealed: bool [requests, block], those that may go back.
        confidence: float32 [requests, block], when each was revealed.
        num_masks: int64 [requests], masks when the block was opened.
        num_revealed_next: int64 [requests], how many of them the schedule wants
            revealed after this step.
        rate: float32 [requests], from 0 to 1.
        variant: int64 [requests], 0 for ``min(rate, sigma_max)``, 1 for ``rate *
            sigma_max``, 2 for ``sigma_max`` shared out among the revealed
            positions by the softmax of minus their confidence.
        draws: float64 [requests, block], uniform in [0, 1).

    Returns:
        bool [requests, block], a subset of ``revealed``.
    """
    # (1 - alpha_s) / alpha_t of the paper, both shares times num_masks. Negative
    # when the schedule has run out, which masks nothing.
    still_masked = (num_masks - num_revealed_next).double()
    limit = (still_masked / revealed.sum(dim=1).clamp(min=1)).clamp(max=1)
    sigma = torch.where(variant == 0, limit.minimum(rate.double()), rate * limit)
    # NaN in a row without a revealed position, which has none to return either.
    doubt = (-confidence.double()).masked_fill(~revealed, -torch.inf).softmax(dim=1)
    sigma = torch.where(
        (variant == 2).unsqueeze(1), doubt * limit.unsqueeze(1), sigma.unsqueeze(1)
    )
    return revealed & (draws < sigma)


def remasked_by_rank(
    confidence: torch.Tensor, live: torch.Tensor, num_masked_next: torch.Tensor
) -> torch.Tensor:
    """The least confident positions, which are masked again (RCR of MDPO).

    Args:
        confidence: float32 [requests, block], when each was filled.
        live: bool [requests, block], positions of the block that hold a token for
            now and are not of the prompt.
        num_masked_next: int64 [requests], how many of them go back; all if there
            are fewer. Of equally confident ones the smallest position stays.

    Returns:
        bool [requests, block], a subset of ``live``.
    """
    return live & ~accept_top(confidence, live, live.sum(dim=1) - num_masked_next)


def doubted(
    probability: torch.Tensor, injected: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    """Injected tokens that the model finds unlikely (context-aware initialisation).

    Args:
        probability: float32 [requests, block], of the token that was injected.
        injected: bool [requests, block].
        threshold: float32 [requests]; below it, the token is masked.

    Returns:
        bool [requests, block], a subset of ``injected``.
    """
    return injected & (probability < threshold.unsqueeze(1))
