# SPDX-License-Identifier: Apache-2.0
"""Loops over one chunk of a row of logits, each of which LLVM makes a vector loop of.

They take whole arrays and a count: a part of an array costs what it counts its users
with, and a chunk has few cycles.

A row is what the fields of `ROW` are: its 16 bit words, the index of their type in
`KINDS`, the banned token or -1, a bitmask of all rows and one of its own, either of
them possibly empty, the biased tokens and their biases.

The callers' machine code contains these loops, and its cache only watches the callers'
own files: who changes this one touches those.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from numba.core import types
from numba.extending import intrinsic

from vllm_unmask.kernels.jit import compiled

Array = npt.NDArray[Any]
# A number of the type that a signature says.
Scalar: TypeAlias = Any
Row: TypeAlias = tuple[Array, int, int, Array, Array, Array, Array]

KINDS = (torch.bfloat16, torch.float16, torch.float32)
ROW = (
    "Tuple((uint16[::1], int64, int64, int32[::1], int32[::1], int64[::1],"
    " float32[::1]))"
)
# Measured: its float32 are a half or a third of a first-level cache. A multiple of 32,
# the bits of a word, and of `PART`.
CHUNK = 4096
# What a search reads one by one.
PART = 128

_BFLOAT16, _FLOAT16, _FLOAT32 = range(3)
_BELOW = np.uint32(0xFF800000)  # -inf
_INFINITE = np.uint32(0x7F800000)
_SIGN = np.uint32(0x80000000)

# 2 ** x on [-1/2, 1/2] is 1 + x * (C1 + x * (C2 + ...)) to a relative error of 9.2e-8:
# minimax, but for the constant, which gives the largest logit weight 1.
_C1 = np.float32(0.69314698)
_C2 = np.float32(0.24022242)
_C3 = np.float32(0.05550734)
_C4 = np.float32(0.00967151)
_C5 = np.float32(0.00132647)
# Weights below 2 ** -126 are 0: they would be denormal.
_SMALLEST = np.float32(-126)
# 1.5 * 2 ** 23: between its neighbours lies 1.
_ROUND = np.float32(12582912.0)


def _bitcast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    kind = context.get_value_type(signature.return_type)
    return builder.bitcast(arguments[0], kind)


@intrinsic
def _float_of(_: Any, bits: Any) -> Any:
    """float32 of the bits of an int32."""
    return types.float32(types.int32), _bitcast


@intrinsic
def _bits_of(_: Any, value: Any) -> Any:
    """int32 of the bits of a float32."""
    return types.int32(types.float32), _bitcast


@compiled("float32(float32)", fastmath={"nnan", "nsz", "contract"})
def weight(power: Scalar) -> Scalar:
    """``2 ** power`` for a power of at most 0; exactly 0 below 2 ** -126."""
    # The sum has the nearest integer in its last bits, and is it when moved back.
    moved = power + _ROUND
    x = power - (moved - _ROUND)
    series = _C1 + x * (_C2 + x * (_C3 + x * (_C4 + x * _C5)))
    bits = _bits_of(np.float32(1.0) + x * series) + (_bits_of(moved) << 23)
    return _float_of(np.int32(bits)) if power > _SMALLEST else np.float32(0.0)


@compiled(
    "Tuple((float32, float32))(float32[::1], uint64, uint64, float32, float32)",
    # A sum is vectorised only where its terms may be taken in any order.
    fastmath={"nnan", "nsz", "contract", "reassoc"},
)
def absorb(
    x: Array, start: Scalar, count: Scalar, peak: Scalar, scale: Scalar
) -> tuple[Scalar, Scalar]:
    """Sum of weights ``w = 2 ** (scale * (x - peak))``, and of ``w * log2(w)``."""
    total = doubt = np.float32(0.0)
    for i in range(count):
        power = (x[start + i] - peak) * scale
        w = weight(power)
        total += w
        # A weight of 0 has no logarithm.
        doubt += w * power if power > _SMALLEST else np.float32(0.0)
    return total, doubt


@compiled("float32(uint32[::1], int64)")
def largest(bits: Array, count: int) -> Scalar:
    """The largest of float32 given by their bits.

    As integers, because LLVM makes no vector loop of a maximum of floats.
    """
    top = np.int32(-(2**31))
    for i in range(count):
        signed = np.int32(bits[i])
        # Orders negative floats, whose bits grow downwards.
        key = signed ^ ((signed >> 31) & np.int32(0x7FFFFFFF))
        top = max(top, np.int32(key))
    return _float_of(np.int32(top ^ ((top >> 31) & np.int32(0x7FFFFFFF))))


@compiled("int64(float32[::1], float32)")
def place_of(x: Array, value: Scalar) -> int:
    """First index of a value that is there."""
    place = 0
    while place + PART <= len(x):
        # As a sum, which is a vector loop; a search is none.
        found = 0
        for i in range(place, place + PART):
            found += x[i] == value
        if found > 0:
            break
        place += PART
    while x[place] != value:
        place += 1
    return place


@compiled("void(uint16[::1], uint64, uint64, uint32[::1])")
def _widen_bfloat16(words: Array, start: Scalar, count: Scalar, bits: Array) -> None:
    for i in range(count):
        word = np.uint32(words[start + i]) << np.uint32(16)
        nan = np.uint32(word) & ~_SIGN > _INFINITE
        bits[i] = _BELOW if nan else word


@compiled("void(uint16[::1], uint64, uint64, uint32[::1])")
def _widen_float16(words: Array, start: Scalar, count: Scalar, bits: Array) -> None:
    for i in range(count):
        word = np.int32(words[start + i])
        # Its exponent starts 112 lower. Multiplying also widens denormals.
        size = np.int32(word & 0x7FFF)
        value = _float_of(np.int32(size << 13)) * np.float32(2.0**112)
        wide = np.uint32(_bits_of(value)) if size < 0x7C00 else _INFINITE
        signed = wide | np.uint32((word & 0x8000) << 16)
        bits[i] = _BELOW if size > 0x7C00 else signed


@compiled("void(uint32[::1], uint32[::1])")
def _copy_float32(words: Array, bits: Array) -> None:
    for i in range(len(words)):
        nan = np.uint32(words[i]) & ~_SIGN > _INFINITE
        bits[i] = _BELOW if nan else words[i]


@compiled("void(int32[::1], int64, int64, uint32[::1])")
def _ban(mask: Array, start: int, count: int, bits: Array) -> None:
    """Ban what a bitmask does not allow."""
    begin, end = start // 32, (start + count + 31) // 32
    everything = np.int32(-1)
    for i in range(begin, end):
        everything &= mask[i]
    if everything == -1:
        return
    for i in range(begin, end):
        word = mask[i]
        # Most words are all allowed or all banned.
        if word == -1:
            continue
        first = i * 32 - start
        stop = min(first + 32, count)
        if word == 0:
            for place in range(first, stop):
                bits[place] = _BELOW
        else:
            for place in range(first, stop):
                allowed = (word >> (place - first)) & 1
                bits[place] = bits[place] if allowed else _BELOW


@compiled(f"int64({ROW}, int64, int64, uint32[::1])")
def fetch(row: Row, vocab: int, start: int, bits: Array) -> int:
    """Write a chunk's logits, biased and banned, as bits of float32; NaN is -inf.

    Args:
        row: see above.
        vocab: logits in it.
        start: first logit, a multiple of `CHUNK`.
        bits: uint32 [CHUNK].

    Returns:
        Logits written.
    """
    words, kind, mask_id, static, mask, tokens, biases = row
    stop = min(start + CHUNK, vocab)
    count = stop - start
    if kind == _BFLOAT16:
        _widen_bfloat16(words, np.uint64(start), np.uint64(count), bits)
    elif kind == _FLOAT16:
        _widen_float16(words, np.uint64(start), np.uint64(count), bits)
    else:
        _copy_float32(words[2 * start : 2 * stop].view(np.uint32), bits)
    if len(tokens) > 0:
        x = bits.view(np.float32)
        for i in range(len(tokens)):
            if start <= tokens[i] < stop:
                x[tokens[i] - start] += biases[i]
    if len(static) > 0:
        _ban(static, start, count, bits)
    if len(mask) > 0:
        _ban(mask, start, count, bits)
    if start <= mask_id < stop:
        bits[mask_id - start] = _BELOW
    return count
