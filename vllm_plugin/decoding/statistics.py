# SPDX-License-Identifier: Apache-2.0
"""What the rules read of a row of logits besides the candidate's probability."""

import math
from typing import NamedTuple

import torch

from vllm_unmask.decoding.scoring import Scores

# Columns that one vectorised maximum covers, and logits that stay in a core's own
# cache, or in the cores' common one, from one operation to the next. None of these
# changes a result; all are measured.
_GROUP = 64
_CACHED = 1 << 18
_SHARED = 1 << 22


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

    A row's result depends neither on the other rows nor on what is left out. Reads
    the logits once, as long as a row fits into the cache.

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
    step = max(len(logits), 1)
    if logits.device.type == "cpu":
        step = max(1, _SHARED // logits.shape[1])
    if unsure is None:
        unsure = torch.ones_like(logits[:, 0], dtype=torch.bool)
    parts = [
        _part(part, entropy, probability or entropy, flags)
        for part, flags in zip(logits.split(step), unsure.split(step), strict=True)
    ]
    return RowStatistics(*map(torch.cat, zip(*parts, strict=True)))


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


def _part(
    logits: torch.Tensor, entropy: bool, probability: bool, unsure: torch.Tensor
) -> RowStatistics:
    """Statistics of some of the rows; arguments are those of ``row_statistics``."""
    on_cpu = logits.device.type == "cpu"
    if not on_cpu:
        logits = _without_nan(logits)
    tokens, peak, second = _top_two(logits)
    # Looking first saves a pass, but off the CPU it would wait for the device.
    if on_cpu and bool(peak.isnan().any()):
        logits = _without_nan(logits)
        tokens, peak, second = _top_two(logits)
    known = peak.isfinite()
    gap = torch.where(known, peak - second, 0.0)
    at = nats = torch.zeros_like(peak)
    if probability:
        at, doubt = _softmax(logits, tokens, peak, unsure if entropy else None)
        if entropy:
            nats = torch.where(known, doubt - at.log(), math.log(logits.shape[1]))
            nats = torch.where(unsure, nats.clamp_(min=0.0), 0.0)
    return RowStatistics(tokens, at, gap, nats)


def _without_nan(logits: torch.Tensor) -> torch.Tensor:
    return logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _softmax(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    peak: torch.Tensor,
    unsure: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read of the softmax, in memory that stays in the cache.

    Args:
        logits: float32 [rows, vocab].
        tokens: int64 [rows], the most likely ones.
        peak: float32 [rows], their logits.
        unsure: bool [rows], for which the second result is asked for; None for none.

    Returns:
        Probability of the most likely token, 0 where there is none, and the sum of
        ``p * (peak - logit)``, each float32 [rows].
    """
    step = max(len(logits), 1)
    on_cpu = logits.device.type == "cpu"
    if on_cpu:
        # As many for each thread.
        step = torch.get_num_threads() * max(1, _CACHED // logits.shape[1])
    probs = torch.empty_like(logits[:step])
    shifted = probs if unsure is None else torch.empty_like(probs)
    at, doubt = torch.empty_like(peak), torch.zeros_like(peak)
    asked = torch.zeros_like(tokens, dtype=torch.bool) if unsure is None else unsure
    for rows, first, token, flags, p_first, mean in zip(
        *(x.split(step) for x in (logits, peak, tokens, asked, at, doubt)), strict=True
    ):
        # Which rows are asked for is known on the CPU without waiting.
        weighed = unsure is not None and (not on_cpu or bool(flags.any()))
        if weighed:
            # Shifting first changes no bit: the softmax does it too.
            rows = torch.sub(rows, first.unsqueeze(1), out=shifted[: len(rows)])
        p = torch.softmax(rows, dim=1, out=probs[: len(rows)])
        torch.gather(p, 1, token.unsqueeze(1), out=p_first.unsqueeze(1))
        if weighed:
            # A banned token adds nothing, whatever its logit.
            rows.clamp_(min=torch.finfo(rows.dtype).min).mul_(p)
            mean.copy_(_row_sums(rows)).neg_()
    return at.nan_to_num_(nan=0.0), doubt


def _top_two(
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The smallest token of the largest logit, this logit and the next, each [rows].

    The largest logit is NaN in a row that has one; the rest then says nothing.
    """
    vocab = logits.shape[1]
    if vocab < _GROUP**2:
        peak, token = logits.max(dim=1, keepdim=True)
        second = logits.scatter(1, token, -torch.inf).amax(dim=1)
        return token.squeeze(1), peak.squeeze(1), second
    # On the CPU torch vectorises a maximum, but not one that also says where: only
    # the groups' maxima and the winning group are searched for the place.
    whole = vocab // _GROUP * _GROUP
    peaks = logits[:, :whole].unflatten(1, (-1, _GROUP)).amax(dim=-1)
    if whole < vocab:
        rest = logits[:, whole:].amax(dim=1, keepdim=True)
        peaks = torch.cat((peaks, rest), dim=1)
    peak, group = peaks.max(dim=1, keepdim=True)
    columns = group * _GROUP + torch.arange(_GROUP, device=logits.device)
    # A last group that is not full repeats its last column, which wins no tie.
    columns.clamp_(max=vocab - 1)
    inside = logits.gather(1, columns)
    token = columns.gather(1, inside.argmax(dim=1, keepdim=True))
    beside = inside.masked_fill(columns == token, -torch.inf).amax(dim=1)
    others = peaks.scatter(1, group, -torch.inf).amax(dim=1)
    return token.squeeze(1), peak.squeeze(1), beside.maximum(others)


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """Sum of each row, float32 [rows].

    In two stages: threads would share a single long row, but not one of several,
    and round it differently.
    """
    whole = values.shape[1] // _GROUP * _GROUP
    sums = values[:, :whole].unflatten(1, (_GROUP, -1)).sum(dim=1).sum(dim=1)
    return sums + values[:, whole:].sum(dim=1)
