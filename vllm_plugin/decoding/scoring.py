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


def _top_finite(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``logits`` with NaN as -inf, and the most likely token of each row.

    NaN must never win an argmax, which torch would let it. Of equal logits the
    smallest token wins.
    """
    logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return logits, logits.max(dim=-1).indices


def _softmax_at(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Probability of one token a row, float32 [rows]."""
    at = logits.softmax(dim=-1).gather(1, tokens.unsqueeze(1))
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
