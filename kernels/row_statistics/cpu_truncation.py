# SPDX-License-Identifier: Apache-2.0
"""Temperature, min-p, top-k and top-p of one row, without sorting it.

A border is found digit by digit of the logits' bits: the weight of each of 2048 bins
says in which one it lies, and only that bin is looked at again.
"""

import math

import numpy as np

from vllm_unmask.kernels.jit import compiled
from vllm_unmask.kernels.row_statistics.cpu_chunks import (
    CHUNK,
    ROW,
    Array,
    Row,
    Scalar,
    fetch,
    weight,
)

_LOG2E = np.float32(math.log2(math.e))
# Bits to the right of a digit, and what a digit can be.
_SHIFTS = (21, 10, 0)
_DIGIT = np.uint32(0x7FF)
# How far below the largest logit the border is looked for first, and how much more
# than enough must lie above: sums of other orders differ in their last bits.
_DEPTHS = tuple(np.float32(depth) for depth in (2.0, 4.0, 7.0, 11.0, 16.0))
_SAFE = 1.0 + 1e-5
_GROUP = 64


@compiled("uint32(uint32)")
def _key(bits: Scalar) -> Scalar:
    """Orders float32 by their bits: the larger the float, the smaller the key."""
    if bits & np.uint32(0x80000000):
        return bits
    return ~bits & np.uint32(0x7FFFFFFF)


@compiled(
    "float32(float32[::1], float32[::1], float32)",
    # A sum is vectorised only where its terms may be taken in any order.
    fastmath={"nnan", "nsz", "reassoc"},
)
def _mass_above(x: Array, weights: Array, bound: Scalar) -> Scalar:
    """Weight of the logits that are ``bound`` or more."""
    total = np.float32(0.0)
    for i in range(len(x)):
        total += weights[i] if x[i] >= bound else np.float32(0.0)
    return total


@compiled("float64(float32[::1], float32[::1], float32)")
def _mass(x: Array, weights: Array, bound: Scalar) -> float:
    """The same of a whole row, in chunks, so that the sum stays exact enough."""
    total = 0.0
    for start in range(0, len(x), CHUNK):
        stop = min(start + CHUNK, len(x))
        total += _mass_above(x[start:stop], weights[start:stop], bound)
    return total


@compiled("void(float32[::1], float32[::1], float64, float32)")
def _cut(x: Array, weights: Array, target: Scalar, top: Scalar) -> None:
    """Ban every logit before which the larger ones weigh ``target`` or more.

    Of equal ones the smallest tokens stay; of all at least one stays.

    Args:
        x: float32 [vocab], banned ones -inf.
        weights: float32 [vocab], equal for equal logits, 0 for banned ones.
        target: positive.
        top: the largest logit.
    """
    # The border is above one of these in all but flat rows; few logits are then.
    bound = np.float32(-np.inf)
    for depth in _DEPTHS:
        if _mass(x, weights, top - depth) >= target * _SAFE:
            bound = top - depth
            break
    kept = np.empty(len(x), np.int32)
    count = 0
    for start in range(0, len(x), _GROUP):
        stop = min(start + _GROUP, len(x))
        # Most groups have none, which a vectorised sum sees faster than a search.
        if _mass_above(x[start:stop], weights[start:stop], bound) > 0:
            for i in range(start, stop):
                kept[count] = i
                count += x[i] >= bound
    kept = kept[:count]
    bits = x.view(np.uint32)
    prefix, reached = np.uint32(0), 0.0
    bins = np.empty(2048, np.float64)
    for level in range(3):
        shift = np.uint32(_SHIFTS[level])
        digit = np.uint32(0x3FF) if level == 2 else _DIGIT
        higher = np.uint32(32 if level == 0 else _SHIFTS[level - 1])
        bins[:] = 0.0
        for place in kept:
            key = np.uint64(_key(bits[place]))
            if key >> np.uint64(higher) == prefix:
                bins[(key >> np.uint64(shift)) & digit] += weights[place]
        last = chosen = -1
        for k in range(len(bins)):
            if bins[k] > 0:
                last = k
                if reached + bins[k] >= target:
                    chosen = k
                    break
                reached += bins[k]
        if chosen < 0:
            # All together weigh less: rounding, or fewer tokens than top-k asks for.
            chosen = last
            reached -= bins[last]
        width = np.uint64(10 if level == 2 else 11)
        prefix = np.uint32((np.uint64(prefix) << width) | np.uint64(chosen))
    for i in range(len(x)):
        above = x[i] >= bound and weights[i] > 0
        x[i] = x[i] if above else np.float32(-np.inf)
    for place in kept:
        key = _key(bits[place])
        if weights[place] == 0 or key > prefix:
            x[place] = -np.inf
        elif key == prefix:
            if reached >= target:
                x[place] = -np.inf
            reached += weights[place]


@compiled("void(float32[::1], float32, float32[::1])")
def _weigh(x: Array, top: Scalar, weights: Array) -> None:
    """Write ``2 ** ((x - top) * log2(e))``, 0 for what is banned."""
    for i in range(len(x)):
        weights[i] = weight((x[i] - top) * _LOG2E)


@compiled("void(float32[::1], float32, float32, float32[::1])")
def _scale(x: Array, heat: Scalar, floor: Scalar, scaled: Array) -> None:
    """Write ``x / heat``, banned below ``floor``."""
    for i in range(len(x)):
        # Adding 0 makes one zero of two, which must not differ in their bits.
        value = np.float32(x[i] / heat) + np.float32(0.0)
        scaled[i] = value if value >= floor else np.float32(-np.inf)


@compiled(
    f"void({ROW}, int64, float32, float32, int64, float32, float32, float32[::1])"
)
def transform(
    row: Row,
    vocab: int,
    heat: Scalar,
    peak: Scalar,
    top_k: int,
    top_p: Scalar,
    min_p: Scalar,
    scaled: Array,
) -> None:
    """Write the logits of the law that a row is sampled from.

    Args:
        row: see `cpu_chunks`.
        vocab: logits in it.
        heat: temperature.
        peak: largest logit, finite.
        top_k: at least 1.
        top_p: 1 keeps all.
        min_p: 0 keeps all.
        scaled: float32 [vocab], written; -inf where a token is cut.
    """
    top = np.float32(peak / heat)
    floor = np.float32(-np.inf)
    if min_p > 0:
        floor = np.float32(top + np.float32(math.log(min_p)))
    bits = np.empty(CHUNK, np.uint32)
    for start in range(0, vocab, CHUNK):
        count = fetch(row, vocab, start, bits)
        part = bits[:count].view(np.float32)
        _scale(part, heat, floor, scaled[start : start + count])
    if top_k >= vocab and top_p >= 1:
        return
    weights = np.empty(vocab, np.float32)
    if top_k < vocab:
        for i in range(vocab):
            weights[i] = scaled[i] > -np.inf
        _cut(scaled, weights, np.float64(top_k), top)
    if top_p < 1:
        _weigh(scaled, top, weights)
        total = _mass(scaled, weights, np.float32(-np.inf))
        # The largest logit stays even where top-p has been rounded to 0.
        _cut(scaled, weights, max(np.float64(top_p) * total, 1e-30), top)
