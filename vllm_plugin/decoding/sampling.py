# SPDX-License-Identifier: Apache-2.0
"""Candidate tokens: temperature, truncation and a stateless sampler.

Randomness is counter based: a draw depends on (seed, position, step) alone, so
a request's output does not depend on what shares its batch.
"""

import torch


def _signed(x: int) -> int:
    """The int64 of the same 64 bits, which is all that torch takes."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


# splitmix64 (Steele, Lea, Flood 2014).
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)

CANDIDATE_STREAM = 0
ORDER_STREAM = 1
REMASK_STREAM = 2


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64, which torch only shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def uniform(
    seeds: torch.Tensor, positions: torch.Tensor, steps: torch.Tensor, stream: int
) -> torch.Tensor:
    """One uniform draw in [0, 1) per row, a pure function of its arguments.

    Args:
        seeds: int64 [rows], the request's seed.
        positions: int64 [rows], absolute position of the row.
        steps: int64 [rows], denoising step within the block.
        stream: separates independent uses of the same (seed, position, step).

    Returns:
        float64 [rows].
    """
    x = _mix(seeds + _signed(_GOLDEN * (stream + 1)))
    x = _mix(x + _GOLDEN * (positions + 1))
    x = _mix(x + _GOLDEN * (steps + 1))
    return _shift_right(x, 11).to(torch.float64) * 2.0**-53


def transform(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    *,
    truncated: bool = True,
) -> torch.Tensor:
    """Temperature, then min-p, top-k and top-p, in vLLM's order.

    A greedy row (temperature 0) is returned as it is: its confidence is the
    plain softmax, which truncation would only inflate. Of equal logits at the
    border of top-k or top-p the smallest token stays; vLLM keeps every token
    that ties with the k-th, and an unspecified one at the border of top-p.

    Args:
        logits: float32 [rows, vocab].
        temperature: float32 [rows], 0 is greedy.
        top_k: int64 [rows], vocab (or more) keeps all.
        top_p: float32 [rows], 1 keeps all.
        min_p: float32 [rows], 0 keeps all.
        truncated: whether any row cuts tokens; False skips the sort.

    Returns:
        float32 [rows, vocab]; -inf where a token is cut.
    """
    greedy = temperature == 0
    scaled = logits / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    if not truncated:
        return scaled
    peak = scaled.amax(dim=-1, keepdim=True)
    floor = peak + torch.where(greedy, 0.0, min_p).log().unsqueeze(1)
    scaled = scaled.masked_fill(scaled < floor, -torch.inf)

    ordered, index = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    cut = rank >= top_k.unsqueeze(1)
    mass = ordered.masked_fill(cut, -torch.inf).softmax(dim=-1)
    # A token stays while the mass before it is below top_p: the token that
    # crosses the bound is kept, so the nucleus is never empty.
    before = mass.cumsum(dim=-1) - mass
    cut |= (before >= top_p.unsqueeze(1)) & (top_p.unsqueeze(1) < 1)
    cut[:, 0] = False
    cut &= ~greedy.unsqueeze(1)
    return scaled.masked_fill(torch.zeros_like(cut).scatter_(1, index, cut), -torch.inf)


def sample(probs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Sample one token per row by inverting the cumulative distribution.

    Args:
        probs: float [rows, vocab], non-negative, need not sum to 1.
        draws: float64 [rows] in [0, 1), multiples of 2**-53.

    Returns:
        int64 [rows]; never a token of probability zero. A row without mass, or
        with NaN, has no token and gives ``vocab``.
    """
    # float64: over 150 000 entries a float32 running sum loses rare tokens.
    cdf = probs.cumsum(dim=-1, dtype=torch.float64)
    # Below the total even after rounding, for draws of at most 1 - 2**-53.
    target = (draws * cdf[:, -1]).unsqueeze(1)
    return torch.searchsorted(cdf, target, right=True).squeeze(1)
