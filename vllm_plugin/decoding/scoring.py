# SPDX-License-Identifier: Apache-2.0
"""Slot *score*: which token a masked position would take, and how sure it is."""

from typing import NamedTuple

import torch

from vllm_unmask.decoding.sampling import (
    CANDIDATE_STREAM,
    ORDER_STREAM,
    sample,
    transform,
    uniform,
)

# Columns that one vectorised maximum covers, and logits whose softmax stays in a
# cache. Neither changes a result; both are measured.
_GROUP = 64
_CACHED = 1 << 18

ORDERS = ("confidence", "margin", "entropy", "random")


class SamplingRows(NamedTuple):
    """Sampling parameters, one entry a logits row."""

    temperature: torch.Tensor  # float32 [rows], 0 is greedy
    top_k: torch.Tensor  # int64 [rows]
    top_p: torch.Tensor  # float32 [rows]
    min_p: torch.Tensor  # float32 [rows]
    seeds: torch.Tensor  # int64 [rows]
    positions: torch.Tensor  # int64 [rows], absolute
    steps: torch.Tensor  # int64 [rows], denoising step within the block


class Scores(NamedTuple):
    """What a masked position would take, and how sure the model is."""

    tokens: torch.Tensor  # int64 [rows], the candidate
    confidence: torch.Tensor  # float32 [rows], its probability
    order: torch.Tensor  # float32 [rows], higher is unmasked first


def _top(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest logit and the smallest token that has it, each [rows].

    The value is NaN in a row that has one; the token then says nothing.
    """
    vocab = logits.shape[1]
    if vocab < _GROUP**2:
        peak, token = logits.max(dim=-1)
        return peak, token
    # On the CPU torch vectorises a maximum, but not one that also says where.
    # So only the groups' maxima and the winning group are searched for the place.
    whole = vocab // _GROUP * _GROUP
    peaks = logits[:, :whole].unflatten(1, (-1, _GROUP)).amax(dim=-1)
    if whole < vocab:
        rest = logits[:, whole:].amax(dim=-1, keepdim=True)
        peaks = torch.cat((peaks, rest), dim=1)
    peak, group = peaks.max(dim=-1, keepdim=True)
    columns = group * _GROUP + torch.arange(_GROUP, device=logits.device)
    # A last group that is not full repeats its last column, which wins no tie.
    columns.clamp_(max=vocab - 1)
    place = logits.gather(1, columns).argmax(dim=-1, keepdim=True)
    return peak.squeeze(1), columns.gather(1, place).squeeze(1)


def _top_finite(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``logits`` with NaN as -inf, and the most likely token of each row.

    NaN must never win an argmax, which torch would let it.
    """
    # Looking for NaN first saves a pass over all logits, but off the CPU it would
    # wait for the device.
    if logits.device.type == "cpu":
        peak, tokens = _top(logits)
        if not bool(peak.isnan().any()):
            return logits, tokens
    logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return logits, _top(logits)[1]


def _softmax_at(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Probability of one token a row, float32 [rows]."""
    index = tokens.unsqueeze(1)
    if logits.device.type == "cpu" and logits.numel() > _CACHED:
        # Nothing else reads these probabilities: a few rows at a time, so that
        # they are not written out to memory.
        step = max(1, _CACHED // logits.shape[1])
        parts = zip(logits.split(step), index.split(step), strict=True)
        at = torch.cat([rows.softmax(dim=-1).gather(1, i) for rows, i in parts])
    else:
        at = logits.softmax(dim=-1).gather(1, index)
    return at.squeeze(1).nan_to_num_(nan=0.0)


def _order_score(
    name: str, probs: torch.Tensor, rows: SamplingRows | None
) -> torch.Tensor:
    """Order score other than confidence, float32 [rows], never NaN."""
    if name == "random":
        assert rows is not None
        return uniform(rows.seeds, rows.positions, rows.steps, ORDER_STREAM).float()
    if name == "margin":
        top2 = probs.topk(2, dim=-1).values
        return (top2[:, 0] - top2[:, 1]).nan_to_num_(nan=0.0)
    return torch.special.entr(probs).sum(dim=-1).neg_().nan_to_num_(nan=-torch.inf)


def score(
    logits: torch.Tensor,
    rows: SamplingRows | None,
    *,
    sampled: bool,
    raw_confidence: torch.Tensor | None,
    orders: torch.Tensor | None,
    orders_used: frozenset[int],
    truncated: bool = True,
    raw_used: bool = True,
) -> Scores:
    """Candidate, confidence and order score of each row.

    Confidence is the probability of the candidate, as in LLaDA, SDAR and
    Fast-dLLM; for a sampled candidate it is read after temperature and
    truncation (SDAR, Dream) or from the plain softmax (LLaDA). So are the margin
    and the entropy that a row is ordered by.

    What a row gets does not depend on the other rows, so neither on the three
    flags: they only say which work no row needs.

    Args:
        logits: float32 [rows, vocab], banned tokens at -inf.
        rows: sampling parameters of each row; None if nothing is drawn, neither
            candidates nor a random order.
        sampled: whether any row has a temperature above 0; False skips the
            whole sampling path.
        raw_confidence: bool [rows], read before the transform; only read if
            ``sampled``.
        orders: int64 [rows], index into ``ORDERS``; only read if ``orders_used``
            has more than confidence.
        orders_used: the values that occur in ``orders``.
        truncated: whether any row with a temperature cuts tokens.
        raw_used: whether any row reads before the transform.

    Returns:
        ``Scores``. A row without a finite logit takes token 0, one with +inf the
        first such token, and both have confidence 0, margin 0 and an order score
        of -inf by entropy.
    """
    logits, tokens = _top_finite(logits)
    probs: torch.Tensor | None = None
    if sampled:
        assert rows is not None and raw_confidence is not None
        probs = transform(
            logits,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
            truncated=truncated,
        ).softmax(dim=-1)
        draws = uniform(rows.seeds, rows.positions, rows.steps, CANDIDATE_STREAM)
        drawn = sample(probs, draws)
        greedy = rows.temperature == 0
        # A row that has no distribution has no draw either.
        tokens = torch.where(greedy | (drawn == logits.shape[1]), tokens, drawn)
        confidence = torch.where(
            raw_confidence | greedy,
            _softmax_at(logits, tokens),
            probs.gather(1, tokens.unsqueeze(1)).squeeze(1).nan_to_num_(nan=0.0),
        )
    else:
        confidence = _softmax_at(logits, tokens)

    order = confidence
    if others := orders_used - {0}:
        assert orders is not None
        if probs is None:
            probs = logits.softmax(dim=-1)
        for index in sorted(others):
            value = _order_score(ORDERS[index], probs, rows)
            if sampled and raw_used:
                assert raw_confidence is not None
                plain = _order_score(ORDERS[index], logits.softmax(dim=-1), rows)
                value = torch.where(raw_confidence, plain, value)
            order = torch.where(orders == index, value, order)
    return Scores(tokens, confidence, order)
