# SPDX-License-Identifier: Apache-2.0
"""Row statistics on a CPU: one row at a time, chunk by chunk, in compiled loops.

A chunk is widened to float32, biased and banned in a core's own cache, then read twice
there: for its largest logit, and for its sums relative to the largest so far. The
chunks' sums are kept; a draw looks for its chunk among them and reads that one again.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_unmask.kernels.jit import compiled
from vllm_unmask.kernels.row_statistics.cpu_chunks import (
    CHUNK,
    KINDS,
    PART,
    ROW,
    Array,
    Row,
    Scalar,
    absorb,
    fetch,
    largest,
    place_of,
    weight,
)
from vllm_unmask.kernels.row_statistics.cpu_truncation import transform

if TYPE_CHECKING:
    from vllm_unmask.kernels.row_statistics import Constraints, Sampling

_LOG2E = math.log2(math.e)
_LN2 = math.log(2)
# Scale of a row without a temperature.
UNIT = np.float32(_LOG2E)
FLOAT = KINDS.index(torch.float32)
# Logits that are worth the work of another thread: about 0.2 ms.
_GRAIN = 1 << 19


@compiled(
    f"Tuple((int64, float32, float32, float64, float64))({ROW}, int64, float32,"
    " float64[::1], float32[::1])"
)
def survey(
    row: Row, vocab: int, scale: Scalar, sums: Array, peaks: Array
) -> tuple[int, Scalar, Scalar, float, float]:
    """Two largest logits and the sums of a row.

    Args:
        row: see `cpu_chunks`.
        vocab: logits in it.
        scale: log2(e) over the temperature.
        sums: float64 [chunks], written: sum of ``2 ** (scale * (x - peak))``.
        peaks: float32 [chunks], written: what each sum is relative to.

    Returns:
        Token, largest logit, second largest, sum of weights ``w`` and of ``w * log2 w``
        relative to the largest. After +inf the row is not read on.
    """
    bits = np.empty(CHUNK, np.uint32)
    x = bits.view(np.float32)
    low = np.float32(-np.inf)
    token, peak, second = 0, low, low
    total = doubt = 0.0
    for chunk in range(len(sums)):
        start = chunk * CHUNK
        count = fetch(row, vocab, start, bits)
        top = largest(bits, count)
        if top > second:
            place = place_of(x, top)
            x[place] = low
            runner = largest(bits, count)
            x[place] = top
            if top > peak:
                shift = np.float64(peak - top) * scale
                if total > 0:
                    decay = 2.0**shift
                    doubt = (doubt + total * shift) * decay
                    total *= decay
                token, peak, second = start + place, top, max(peak, runner)
            else:
                second = top
            if peak == np.inf:
                break
        sums[chunk], peaks[chunk] = 0.0, peak
        if top > low:
            weights, logs = absorb(x, np.uint64(0), np.uint64(count), peak, scale)
            sums[chunk] = weights
            total += weights
            doubt += logs
    return token, peak, second, total, doubt


@compiled(
    f"Tuple((int64, float32))({ROW}, int64, float32, float32, float64, float64[::1],"
    " float32[::1])"
)
def draw(
    row: Row,
    vocab: int,
    scale: Scalar,
    peak: Scalar,
    uniform: Scalar,
    sums: Array,
    peaks: Array,
) -> tuple[int, Scalar]:
    """The token that inverts the distribution function, and its logit.

    Never one of weight 0. Arguments as `survey` leaves them; ``uniform`` in [0, 1).
    """
    total = 0.0
    for chunk in range(len(sums)):
        sums[chunk] *= 2.0 ** (np.float64(peaks[chunk] - peak) * scale)
        total += sums[chunk]
    target = uniform * total
    chosen, before, reached = 0, 0.0, 0.0
    for chunk in range(len(sums)):
        if sums[chunk] > 0:
            chosen, before = chunk, reached
            reached += sums[chunk]
            if reached > target:
                break
    bits = np.empty(CHUNK, np.uint32)
    x = bits.view(np.float32)
    count = fetch(row, vocab, chosen * CHUNK, bits)
    first, token = 0, 0
    for part in range(0, count - PART, PART):
        share, _ = absorb(x, np.uint64(part), np.uint64(PART), peak, scale)
        if before + share > target:
            break
        before += share
        first = part + PART
    for place in range(first, count):
        share = weight((x[place] - peak) * scale)
        if share > 0:
            token = place
            before += share
            # Rounding may keep the chunk below the target: then its last token.
            if before > target:
                break
    return chosen * CHUNK + token, x[token]


@compiled(
    "void(uint16[::1], int64, int64, int64, int64, int64, int64, float32[::1],"
    " float64[::1], int64[::1], float32[::1], float32[::1], boolean[::1], int64,"
    " int32[::1], int32[:,::1], int64[::1], int64[::1], int64[::1], float32[::1],"
    " int64[:,::1], float32[:,::1])"
)
def describe(
    words: Array,
    kind: int,
    stride: int,
    rows: int,
    vocab: int,
    first: int,
    step: int,
    temperature: Array,
    draws: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    plain: Array,
    mask_id: int,
    static: Array,
    bitmasks: Array,
    bitmask_rows: Array,
    bias_starts: Array,
    bias_tokens: Array,
    bias_values: Array,
    tokens: Array,
    values: Array,
) -> None:
    """Statistics of every ``step``-th row from ``first`` on.

    Args:
        words: the logits' memory in 16 bit words.
        kind: index into `KINDS`.
        stride: words from one row to the next.
        rows: of the logits.
        vocab: of the logits.
        first: row.
        step: rows.
        temperature: this and what follows as in the package; empty for None.
        tokens: int64 [2, rows], written: tokens and candidates.
        values: float32 [6, rows], written: the other fields in order.
    """
    chunks = (vocab + CHUNK - 1) // CHUNK
    sums, peaks = np.empty(chunks, np.float64), np.empty(chunks, np.float32)
    scaled = np.empty(0, np.float32)
    width = vocab * 2 if kind == FLOAT else vocab
    nothing = np.float32(0.0)
    for r in range(first, rows, step):
        mask = bitmasks[0][:0]
        if len(bitmask_rows) > 0 and bitmask_rows[r] >= 0:
            mask = bitmasks[bitmask_rows[r]]
        start = stop = 0
        if len(bias_starts) > 0:
            start, stop = bias_starts[r], bias_starts[r + 1]
        line = words[r * stride : r * stride + width]
        row = (
            line,
            kind,
            mask_id,
            static,
            mask,
            bias_tokens[start:stop],
            bias_values[start:stop],
        )
        sampled = len(temperature) > 0 and temperature[r] > 0
        heat = temperature[r] if sampled else np.float32(1.0)
        keep = top_k[r] if len(top_k) > 0 else vocab
        nucleus = top_p[r] if len(top_p) > 0 else np.float32(1.0)
        least = min_p[r] if len(min_p) > 0 else nothing
        cut = sampled and (keep < vocab or nucleus < 1 or least > 0)
        before = sampled and len(plain) > 0 and plain[r]

        heated = np.float32(_LOG2E / np.float64(heat))
        scale = UNIT if before or cut else heated
        token, peak, second, total, doubt = survey(row, vocab, scale, sums, peaks)
        tokens[0, r] = tokens[1, r] = token
        if not np.isfinite(peak):
            values[:, r] = nothing
            values[3, r] = math.log(vocab)
            values[4, r] = peak
            continue
        source = row
        if cut:
            if len(scaled) == 0:
                scaled = np.empty(vocab, np.float32)
            transform(row, vocab, heat, peak, keep, nucleus, least, scaled)
            # A row of its own, in which nothing is left to be banned.
            source = (
                scaled.view(np.uint16),
                FLOAT,
                -1,
                static[:0],
                mask[:0],
                bias_tokens[:0],
                bias_values[:0],
            )
            if not before:
                _, peak, second, total, doubt = survey(
                    source, vocab, scale, sums, peaks
                )
        values[0, r] = 1.0 / total
        values[1, r] = 2.0 ** (np.float64(second - peak) * scale) / total
        values[2, r] = np.float64(peak - second) * scale * _LN2
        values[3, r] = max(math.log(total) - doubt / total * _LN2, 0.0)
        values[4, r] = np.float64(peak) * scale * _LN2 + math.log(total)
        values[5, r] = values[0, r]
        if not sampled:
            continue
        height = peak
        if before:
            scale = UNIT if cut else heated
            _, height, _, _, _ = survey(source, vocab, scale, sums, peaks)
        candidate, logit = draw(source, vocab, scale, height, draws[r], sums, peaks)
        if before:
            bits = np.empty(CHUNK, np.uint32)
            fetch(row, vocab, candidate // CHUNK * CHUNK, bits)
            logit = bits.view(np.float32)[candidate % CHUNK]
            scale = UNIT
        tokens[1, r] = candidate
        values[5, r] = 2.0 ** (np.float64(logit - peak) * scale) / total


def layout_of(logits: torch.Tensor) -> tuple[Array, int, int, int, int]:
    """The first arguments of `describe`, for at least one row."""
    rows, vocab = logits.shape
    # numpy has no bfloat16; a row may be followed by padding.
    stride = logits.stride(0) if rows > 1 else vocab
    flat = logits.as_strided(((rows - 1) * stride + vocab,), (1,))
    words = flat.view(torch.int16).numpy().view(np.uint16)
    row_words = stride * logits.element_size() // 2
    return words, KINDS.index(logits.dtype), row_words, rows, vocab


@lru_cache(maxsize=1)
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="row_statistics")


def row_statistics(
    logits: torch.Tensor, sampling: "Sampling | None", constraints: "Constraints"
) -> tuple[torch.Tensor, ...]:
    """Documented in the package."""
    rows, vocab = logits.shape
    tokens = torch.empty((2, rows), dtype=torch.int64)
    values = torch.empty((6, rows), dtype=torch.float32)
    if rows:
        shared = (
            *_arrays(sampling, constraints),
            tokens.numpy(),
            values.numpy(),
        )
        layout = layout_of(logits)
        number = min(torch.get_num_threads(), rows, max(1, logits.numel() // _GRAIN))
        if number == 1:
            describe(*layout, 0, 1, *shared)
        else:
            pool = _threads(number - 1)
            jobs = [
                pool.submit(describe, *layout, i, number, *shared)
                for i in range(1, number)
            ]
            describe(*layout, 0, number, *shared)
            for job in jobs:
                job.result()
    return (tokens[0], *values[:5], tokens[1], values[5])


def _arrays(sampling: "Sampling | None", constraints: "Constraints") -> tuple[Any, ...]:
    """Arguments of `describe` from `temperature` to `bias_values`."""

    def array(tensor: torch.Tensor | None, dtype: Any) -> Array:
        if tensor is None:
            return np.empty(0, dtype)
        return tensor.contiguous().numpy().astype(dtype, copy=False)

    temperature, draws, top_k, top_p, min_p, plain = sampling or (None,) * 6
    bitmasks = constraints.bitmasks
    return (
        array(temperature, np.float32),
        array(draws, np.float64),
        array(top_k, np.int64),
        array(top_p, np.float32),
        array(min_p, np.float32),
        array(plain, np.bool_),
        constraints.mask_id,
        array(constraints.static_mask, np.int32),
        np.empty((1, 0), np.int32)
        if bitmasks is None or not len(bitmasks)
        else array(bitmasks, np.int32),
        array(constraints.bitmask_rows, np.int64),
        array(constraints.bias_starts, np.int64),
        array(constraints.bias_tokens, np.int64),
        array(constraints.bias_values, np.float32),
    )
