# SPDX-License-Identifier: Apache-2.0
"""The definition of `vllm_unmask.kernels.row_statistics`, in torch."""

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_unmask.kernels.row_statistics import Constraints, Sampling


def row_statistics(
    logits: torch.Tensor, sampling: "Sampling | None", constraints: "Constraints"
) -> tuple[torch.Tensor, ...]:
    """Documented in the package; float32 [rows, vocab] several times over."""
    logits = constrain(logits, constraints)
    peak, tokens = logits.max(dim=1)
    law = drawn_from = logits
    known = peak.isfinite()
    if sampling is not None:
        drawn_from = transform(logits, sampling)
        plain = sampling.temperature == 0
        if sampling.plain is not None:
            plain = plain | sampling.plain
        law = torch.where(plain.unsqueeze(1), logits, drawn_from)

    top = torch.nn.functional.pad(law, (0, 1), value=-torch.inf).topk(2).values
    probs = law.softmax(dim=1)
    first = probs.amax(dim=1)
    second = first * (top[:, 1] - top[:, 0]).exp()
    largest = math.log(logits.shape[1])
    entropy = torch.special.entr(probs).sum(dim=1).clamp(min=0)
    candidates = tokens
    if sampling is not None:
        cdf = drawn_from.softmax(dim=1).cumsum(dim=1, dtype=torch.float64)
        target = (sampling.draws * cdf[:, -1]).unsqueeze(1)
        drawn = torch.searchsorted(cdf, target, right=True).squeeze(1)
        sampled = (sampling.temperature > 0) & known
        candidates = torch.where(sampled, drawn, tokens)
    confidence = probs.gather(1, candidates.unsqueeze(1)).squeeze(1)
    return (
        tokens,
        torch.where(known, first, 0.0),
        torch.where(known, second, 0.0),
        torch.where(known, top[:, 0] - top[:, 1], 0.0),
        torch.where(known, entropy, largest),
        torch.where(known, law.logsumexp(dim=1), peak),
        candidates,
        torch.where(known, confidence, 0.0),
    )


def constrain(logits: torch.Tensor, constraints: "Constraints") -> torch.Tensor:
    """Biased and banned logits, float32 [rows, vocab], without NaN."""
    rows, vocab = logits.shape
    logits = torch.nan_to_num(logits.float(), -torch.inf, torch.inf, -torch.inf)
    if constraints.bias_starts is not None:
        assert constraints.bias_tokens is not None
        assert constraints.bias_values is not None
        row = torch.arange(rows, device=logits.device)
        row = row.repeat_interleave(constraints.bias_starts.diff())
        place = (row, constraints.bias_tokens)
        logits.index_put_(place, constraints.bias_values, accumulate=True)
    if constraints.static_mask is not None:
        logits.masked_fill_(~allowed(constraints.static_mask, vocab), -torch.inf)
    if constraints.bitmasks is not None:
        assert constraints.bitmask_rows is not None
        free = constraints.bitmask_rows < 0
        # A mask more, for rows without one.
        bitmasks = torch.nn.functional.pad(constraints.bitmasks, (0, 0, 0, 1))
        legal = allowed(bitmasks, vocab)[constraints.bitmask_rows]
        logits.masked_fill_(~(legal | free.unsqueeze(1)), -torch.inf)
    if constraints.mask_id >= 0:
        logits[:, constraints.mask_id] = -torch.inf
    return logits


def allowed(bitmask: torch.Tensor, vocab: int) -> torch.Tensor:
    """bool [..., vocab] of int32 [..., words]."""
    bit = torch.arange(32, dtype=torch.int32, device=bitmask.device)
    return ((bitmask.unsqueeze(-1) >> bit) & 1).flatten(-2)[..., :vocab].bool()


def transform(logits: torch.Tensor, sampling: "Sampling") -> torch.Tensor:
    """Temperature, min-p, top-k and top-p; greedy rows stay as they are.

    Of equal logits at a border the smallest tokens stay; the token that crosses the
    border of top-p stays too.
    """
    greedy = (sampling.temperature == 0).unsqueeze(1)
    scaled = logits / torch.where(greedy, 1.0, sampling.temperature.unsqueeze(1))
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if sampling.min_p is not None:
        floor = scaled.amax(dim=1, keepdim=True) + sampling.min_p.log().unsqueeze(1)
        kept &= scaled >= floor
    ordered, index = scaled.masked_fill(~kept, -torch.inf).sort(
        dim=1, descending=True, stable=True
    )
    rank = torch.arange(logits.shape[1], device=logits.device)
    cut = torch.zeros_like(kept)
    if sampling.top_k is not None:
        cut |= rank >= sampling.top_k.unsqueeze(1)
    if sampling.top_p is not None:
        mass = ordered.masked_fill(cut, -torch.inf).softmax(dim=1).double()
        top_p = sampling.top_p.unsqueeze(1)
        cut |= (mass.cumsum(dim=1) - mass >= top_p) & (top_p < 1)
    # The nucleus is never empty.
    cut[:, 0] = False
    kept &= ~torch.zeros_like(cut).scatter_(1, index, cut)
    return torch.where(kept | greedy, scaled, -torch.inf)
