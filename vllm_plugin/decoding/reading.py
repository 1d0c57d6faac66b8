# SPDX-License-Identifier: Apache-2.0
"""`scoring.score` and `statistics.row_statistics`, in one pass where a kernel has it.

On CPUs and GPUs `kernels.row_statistics` reads the logits once, in their own type; on
other devices the torch functions do, which define the results.
"""

import torch

from vllm_unmask.decoding import scoring, statistics
from vllm_unmask.decoding.sampling import CANDIDATE_STREAM, ORDER_STREAM, uniform
from vllm_unmask.decoding.scoring import ORDERS, SamplingRows, Scores
from vllm_unmask.decoding.statistics import RowStatistics, greedy_scores
from vllm_unmask.kernels import row_statistics as kernel

_RANDOM = ORDERS.index("random")


def row_statistics(
    logits: torch.Tensor,
    entropy: bool = True,
    probability: bool = True,
    unsure: torch.Tensor | None = None,
) -> RowStatistics:
    """As `statistics.row_statistics`; what is not asked for may be there anyway."""
    if not kernel.has_kernel(logits.device):
        return statistics.row_statistics(logits, entropy, probability, unsure)
    found = kernel.row_statistics(logits)
    return RowStatistics(found.tokens, found.probability, found.gap, found.entropy)


def orders_read(
    logits: torch.Tensor, entropy: bool, probability: bool
) -> frozenset[int]:
    """Indices into ``ORDERS`` that `row_statistics` of these is enough for."""
    if entropy or kernel.has_kernel(logits.device):
        return frozenset((0, 1, 2))
    return frozenset((0, 1)) if probability else frozenset()


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
    constraints: kernel.Constraints = kernel.NO_CONSTRAINTS,
) -> Scores:
    """As `scoring.score`; a kernel takes logits of any type, and constraints."""
    if not kernel.has_kernel(logits.device):
        return scoring.score(
            logits.float(),
            rows,
            sampled=sampled,
            raw_confidence=raw_confidence,
            orders=orders,
            orders_used=orders_used,
            truncated=truncated,
            raw_used=raw_used,
        )
    sampling = None
    if sampled:
        assert rows is not None
        draws = uniform(rows.seeds, rows.positions, rows.steps, CANDIDATE_STREAM)
        sampling = kernel.Sampling(
            rows.temperature, draws, plain=raw_confidence if raw_used else None
        )
        if truncated:
            sampling = sampling._replace(
                top_k=rows.top_k, top_p=rows.top_p, min_p=rows.min_p
            )
    found = kernel.row_statistics(logits, sampling, constraints)
    best = RowStatistics(found.tokens, found.probability, found.gap, found.entropy)
    order = found.confidence
    if orders_used - {0}:
        assert orders is not None
        order = torch.where(orders == 0, order, greedy_scores(best, orders).order)
    if _RANDOM in orders_used:
        assert rows is not None and orders is not None
        noise = uniform(rows.seeds, rows.positions, rows.steps, ORDER_STREAM).float()
        order = torch.where(orders == _RANDOM, noise, order)
    return Scores(found.candidates, found.confidence, order)
