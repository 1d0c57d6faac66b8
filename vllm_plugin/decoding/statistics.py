# SPDX-License-Identifier: Apache-2.0
"""What the rules read of a row of logits besides the candidate's probability."""

import math
from typing import NamedTuple

import torch

from vllm_unmask.decoding.scoring import Scores

_GROUP = 64  # parts of a row that are summed first


class RowStatistics(NamedTuple):
    """Of the plain softmax, before temperature and truncation."""

    tokens: torch.Tensor  # int64 [rows], the most likely token, of equals the smallest
    probability: torch.Tensor  # float32 [rows], its probability
    gap: torch.Tensor  # float32 [rows], logit of the first minus that of the second
    entropy: torch.Tensor  # float32 [rows], nats


def row_statistics(
    logits: torch.Tensor,
    entropy: bool = True,
    probability: bool = True,
    unsure: torch.Tensor | None = None,
) -> RowStatistics:
    """Most likely token, its probability and lead, and the entropy of each row.

    A row's result depends neither on the other rows nor on what is left out.

    Args:
        logits: float32 [rows, vocab], at least two columns; NaN counts as -inf.
        entropy: False leaves the entropy at 0.
        probability: False, without ``entropy``, leaves the probability at 0; both
            need the softmax, tokens and gaps do not.
        unsure: bool [rows], whose entropy is asked for, the others' is 0; None for
            all.

    Returns:
        ``RowStatistics``. A row with one finite logit has gap inf and entropy 0; one
        without, or with +inf, has probability 0, gap 0 and the largest entropy.
    """
    logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    peak, token = logits.max(dim=1, keepdim=True)
    second = logits.scatter(1, token, -torch.inf).amax(dim=1, keepdim=True)
    known = peak.isfinite()
    gap = torch.where(known, peak - second, 0.0)
    at = nats = torch.zeros_like(peak)
    if probability or entropy:
        probs = logits.softmax(dim=1)
        at = probs.gather(1, token).nan_to_num(nan=0.0)
    if entropy:
        # A banned token adds nothing, whatever its logit.
        below = (logits - peak).clamp_(min=torch.finfo(logits.dtype).min)
        nats = -_row_sums(below.mul_(probs)).unsqueeze(1) - at.log()
        nats = torch.where(known, nats.clamp(min=0.0), math.log(logits.shape[1]))
        if unsure is not None:
            nats = torch.where(unsure.unsqueeze(1), nats, 0.0)
    return RowStatistics(*(x.squeeze(1) for x in (token, at, gap, nats)))


def greedy_scores(best: RowStatistics, order: torch.Tensor) -> Scores:
    """What ``scoring.score`` gives greedy rows, without reading the logits again.

    Args:
        best: with probability, and with entropy if a row is ordered by it.
        order: int64 [rows], index into ``scoring.ORDERS``, none of them random.

    Returns:
        ``Scores``; a row without a finite logit takes the same places as there.
    """
    margin = best.probability * -(-best.gap).expm1()
    doubt = best.entropy.masked_fill(best.probability == 0, torch.inf)
    by_other = torch.where(order == 1, margin, -doubt)
    return Scores(
        best.tokens,
        best.probability,
        torch.where(order == 0, best.probability, by_other),
    )


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """Sum of each row, float32 [rows].

    In two stages: threads would share a single long row, but not one of several,
    and round it differently.
    """
    whole = values.shape[1] // _GROUP * _GROUP
    sums = values[:, :whole].unflatten(1, (_GROUP, -1)).sum(dim=1).sum(dim=1)
    return sums + values[:, whole:].sum(dim=1)
