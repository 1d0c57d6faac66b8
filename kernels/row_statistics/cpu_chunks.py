# SPDX-License-Identifier: Apache-2.0
"""Loops over one chunk of a row of logits, each of which LLVM makes a vector loop of.

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
# Measured: its float32 are a quarter of a first-level cache. A multiple of 32, the bits
# of a word.
CHUNK = 2048

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
    "Tuple((float32, float32))(float32[::1], float32, float32)",
    # A sum is vectorised only where its terms may be taken in any order.
    fastmath={"nnan", "nsz", "contract", "reassoc"},
)
def absorb(x: Array, peak: Scalar, scale: Scalar) -> tuple[Scalar, Scalar]:
    """Sum of weights ``w = 2 ** (scale * (x - peak))``, and of ``w * log2(w)``."""
    total = doubt = np.float32(0.0)
    for i in range(len(x)):
        power = (x[i] - peak) * scale
        w = weight(power)
        total += w
        # A weight of 0 has no logarithm.
        doubt += w * power if power > _SMALLEST else np.float32(0.0)
    return total, doubt


@compiled("float32(uint32[::1])")
def largest(bits: Array) -> Scalar:
    """The largest of float32 given by their bits.

    As integers, because LLVM makes no vector loop of a maximum of floats.
    """
    signed = bits.view(np.int32)
    top = np.int32(-(2**31))
    for i in range(len(signed)):
        # Orders negative floats, whose bits grow downwards.
        key = signed[i] ^ ((signed[i] >> 31) & np.int32(0x7FFFFFFF))
        top = max(top, np.int32(key))
    return _float_of(np.int32(top ^ ((top >> 31) & np.int32(0x7FFFFFFF))))


@compiled("int64(float32[::1], float32)")
def place_of(x: Array, value: Scalar) -> int:
    """First index of a value that is there."""
    place = 0
    while x[place] != value:
        place += 1
    return place


@compiled("void(uint16[::1], uint32[::1])")
def _widen_bfloat16(words: Array, bits: Array) -> None:
    for i in range(len(words)):
        word = np.uint32(words[i]) << np.uint32(16)
        nan = np.uint32(word) & ~_SIGN > _INFINITE
        bits[i] = _BELOW if nan else word


@compiled("void(uint16[::1], uint32[::1])")
def _widen_float16(words: Array, bits: Array) -> None:
    for i in range(len(words)):
        word = np.int32(words[i])
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


@compiled("void(int32[::1], int32[::1], int64, uint32[::1])")
def _ban(static: Array, mask: Array, start: int, bits: Array) -> None:
    """Ban what either of two bitmasks does not allow, an empty one nothing."""
    for first in range(0, len(bits), 32):
        word = np.int32(-1)
        if len(static) > 0:
            word &= static[(start + first) // 32]
        if len(mask) > 0:
            word &= mask[(start + first) // 32]
        # Most words are all allowed or all banned.
        if word == 0:
            bits[first : first + 32] = _BELOW
        elif word != -1:
            part = bits[first : first + 32]
            for k in range(len(part)):
                part[k] = part[k] if (word >> k) & 1 else _BELOW


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
    part = bits[: stop - start]
    if kind == _BFLOAT16:
        _widen_bfloat16(words[start:stop], part)
    elif kind == _FLOAT16:
        _widen_float16(words[start:stop], part)
    else:
        _copy_float32(words[2 * start : 2 * stop].view(np.uint32), part)
    if len(tokens) > 0:
        x = part.view(np.float32)
        for i in range(len(tokens)):
            if start <= tokens[i] < stop:
                x[tokens[i] - start] += biases[i]
    if len(static) > 0 or len(mask) > 0:
        _ban(static, mask, start, part)
    if start <= mask_id < stop:
        part[mask_id - start] = _BELOW
    return stop - start
