# SPDX-License-Identifier: Apache-2.0
"""Where min-p, top-k and top-p cut a row, without sorting it.

Bit by bit the largest border is found at which enough is kept, in count (top-k) or in
mass (top-p). Each bit reads the row once, from the cache as far as it fits.
"""

import triton
import triton.language as tl

from vllm_unmask.kernels.row_statistics.triton_tiles import (
    is_kept,
    load_tile,
    order_key,
)

_LOG2E = tl.constexpr(1.4426950408889634)
# Below every key, above every key and every token.
_LOW = tl.constexpr(-(1 << 31))
_HIGH = tl.constexpr((1 << 31) - 1)


@triton.jit
def _weigh(
    batch: tl.tuple,
    row: tl.tensor,
    law: tl.tuple,
    low: tl.tensor,
    high: tl.tensor,
    stop: tl.tensor,
    BY_MASS: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Count or mass of the kept tokens below ``stop`` whose keys are in [low, high].

    Args:
        batch: see `triton_tiles`.
        row: int64.
        law: temperature, largest logit, and the cut so far, as `is_kept` takes it.
        low: int32.
        high: int32.
        stop: int32.
        BY_MASS: sum ``2 ** ((x - peak) * log2(e) / heat)``, otherwise 1.
        TILE: logits of a tile.

    Returns:
        float64.
    """
    heat, peak, border, last = law
    total = tl.zeros([], tl.float64)
    for start in range(0, batch[2], TILE):
        token = start + tl.arange(0, TILE)
        x = load_tile(batch, row, token)
        key = order_key(tl.div_rn(x, tl.zeros_like(x) + heat))
        chosen = is_kept(x, token, heat, border, last) & (token < stop)
        chosen = chosen & (key >= low) & (key <= high)
        part = tl.zeros_like(x) + 1.0
        if BY_MASS:
            part = tl.exp2((x - peak) * (_LOG2E / heat))
        total += tl.sum(tl.where(chosen, part, 0.0)).to(tl.float64)
    return total


@triton.jit
def _cut(
    batch: tl.tuple,
    row: tl.tensor,
    law: tl.tuple,
    target: tl.tensor,
    BY_MASS: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The cut before which the larger logits weigh less than ``target``.

    Of equal ones the smallest tokens stay. Arguments are those of `_weigh`.

    Returns:
        Border and last token, each int32, as `is_kept` takes them.
    """
    top = tl.full([], _HIGH, tl.int32)
    border = tl.full([], _LOW, tl.int32)
    for i in range(32):
        # From the lowest key up, half the way that is left at a time.
        higher = (border + (tl.full([], 1, tl.int64) << (31 - i))).to(tl.int32)
        if _weigh(batch, row, law, higher, top, top, BY_MASS, TILE) >= target:
            border = higher
    left = target - _weigh(batch, row, law, border + 1, top, top, BY_MASS, TILE)
    # The largest token with less than what is left before it is the last that stays.
    last = tl.full([], 0, tl.int32)
    for i in range(31):
        later = last + (tl.full([], 1, tl.int32) << (30 - i))
        if later < batch[2]:
            before = _weigh(batch, row, law, border, border, later, BY_MASS, TILE)
            if before < left:
                last = later
    return border, last


@triton.jit
def truncation_kernel(
    borders: tl.tensor,
    lasts: tl.tensor,
    batch: tl.tuple,
    options: tl.tuple,
    TILE: tl.constexpr,
) -> None:
    """The cut of one row: grid (rows,).

    Args:
        borders: int32 [rows], written: what `is_kept` takes.
        lasts: int32 [rows], written.
        batch: see `triton_tiles`.
        options: float32 [rows] temperatures; int64 [rows] top-k, float32 [rows] top-p
            and float32 [rows] min-p, each or None.
        TILE: logits of a tile.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k, top_p, min_p = options
    vocab = batch[2]
    heat = tl.load(temperature + row)
    border = tl.full([], _LOW, tl.int32)
    last = tl.full([], _HIGH, tl.int32)
    keep = row * 0 + vocab
    nucleus = heat * 0 + 1.0
    least = heat * 0
    if top_k is not None:
        keep = tl.load(top_k + row)
    if top_p is not None:
        nucleus = tl.load(top_p + row)
    if min_p is not None:
        least = tl.load(min_p + row)
    if (heat > 0.0) & ((keep < vocab) | (nucleus < 1.0) | (least > 0.0)):
        peak = heat * 0 + float("-inf")
        for start in range(0, vocab, TILE):
            x = load_tile(batch, row, start + tl.arange(0, TILE))
            peak = tl.maximum(peak, tl.max(x, 0))
        # Without a finite logit there is no law to cut.
        if (peak > float("-inf")) & (peak < float("inf")):
            if least > 0.0:
                border = order_key(tl.div_rn(peak, heat) + tl.log(least))
            if keep < vocab:
                law = (heat, peak, border, last)
                found, token = _cut(batch, row, law, keep.to(tl.float64), False, TILE)
                # Below it, there are fewer tokens than are asked for.
                if found >= border:
                    border = found
                    last = token
            if nucleus < 1.0:
                law = (heat, peak, border, last)
                top = tl.full([], _HIGH, tl.int32)
                total = _weigh(batch, row, law, border, top, top, True, TILE)
                # The largest logit stays even where top-p has been rounded to 0.
                target = tl.maximum(nucleus.to(tl.float64) * total, 1e-30)
                found, token = _cut(batch, row, law, target, True, TILE)
                if found >= border:
                    border = found
                    last = token
    tl.store(borders + row, border)
    tl.store(lasts + row, last)
