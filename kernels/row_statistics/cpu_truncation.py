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


@compiled("uint32(uint32)")
def _key(bits: Scalar) -> Scalar:
    """Orders float32 by their bits: the larger the float, the smaller the key."""
    if bits & np.uint32(0x80000000):
        return bits
    return ~bits & np.uint32(0x7FFFFFFF)


@compiled("void(float32[::1], float32[::1], float64)")
def _cut(x: Array, weights: Array, target: Scalar) -> None:
    """Ban every logit before which the larger ones weigh ``target`` or more.

    Of equal ones the smallest tokens stay; of all at least one stays.

    Args:
        x: float32 [vocab], banned ones -inf.
        weights: float32 [vocab], equal for equal logits, 0 for banned ones.
        target: positive.
    """
    bits = x.view(np.uint32)
    prefix, reached = np.uint32(0), 0.0
    bins = np.empty(2048, np.float64)
    for level in range(3):
        shift = np.uint32(_SHIFTS[level])
        digit = np.uint32(0x3FF) if level == 2 else _DIGIT
        higher = np.uint32(32 if level == 0 else _SHIFTS[level - 1])
        bins[:] = 0.0
        for i in range(len(x)):
            if weights[i] > 0:
                key = np.uint64(_key(bits[i]))
                if key >> np.uint64(higher) == prefix:
                    bins[(key >> np.uint64(shift)) & digit] += weights[i]
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
        key = _key(bits[i])
        if weights[i] == 0 or key > prefix:
            x[i] = -np.inf
        elif key == prefix:
            if reached >= target:
                x[i] = -np.inf
            reached += weights[i]


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
    x = bits.view(np.float32)
    for start in range(0, vocab, CHUNK):
        count = fetch(row, vocab, start, bits)
        part = scaled[start : start + count]
        for i in range(count):
            # Adding 0 makes one zero of two, which must not differ in their bits.
            value = np.float32(x[i] / heat) + np.float32(0.0)
            part[i] = value if value >= floor else np.float32(-np.inf)
    if top_k >= vocab and top_p >= 1:
        return
    weights = np.empty(vocab, np.float32)
    if top_k < vocab:
        for i in range(vocab):
            weights[i] = scaled[i] > -np.inf
        _cut(scaled, weights, np.float64(top_k))
    if top_p < 1:
        total = 0.0
        for i in range(vocab):
            weights[i] = weight((scaled[i] - top) * _LOG2E)
            total += weights[i]
        # The largest logit stays even where top-p has been rounded to 0.
        _cut(scaled, weights, max(np.float64(top_p) * total, 1e-30))
