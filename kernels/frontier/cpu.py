# SPDX-License-Identifier: Apache-2.0
"""The loop behind `vllm_unmask.kernels.frontier`, on arrays of numpy."""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_unmask.kernels.jit import compiled

Array = npt.NDArray[Any]


@compiled(
    "void(float32[:,::1], int64[::1], int32[:,::1], int64[::1], int64, int64[:,::1])",
    # A maximum is vectorised only where none of its values is NaN.
    fastmath={"nnan", "nsz"},
)
def constrain_frontier(
    logits: Array, rows: Array, bitmask: Array, silent: Array, block: int, best: Array
) -> None:
    vocab = logits.shape[1]
    count = best.shape[1]
    infinity = np.float32(np.inf)
    values = np.empty(count, np.float32)
    for i in range(len(rows)):
        first = rows[i] // block * block
        for row in range(first, first + block):
            if row != rows[i]:
                for k in range(len(silent)):
                    logits[row, silent[k]] = -infinity
        line = logits[rows[i]]
        values[:] = -infinity
        best[i, :] = -1
        # A word of the bitmask at a time: most are all legal or all banned.
        for word in range((vocab + 31) // 32):
            bits = bitmask[i, word]
            start = 32 * word
            end = min(start + 32, vocab)
            if bits == 0:
                line[start:end] = -infinity
                continue
            if bits != -1:
                for k in range(end - start):
                    legal = (bits >> k) & 1
                    line[start + k] = line[start + k] if legal else -infinity
            peak = -infinity
            for token in range(start, end):
                peak = line[token] if line[token] > peak else peak
            if peak <= values[count - 1]:
                continue
            for token in range(start, end):
                value = line[token]
                place = count - 1
                if value <= values[place]:
                    continue
                while place > 0 and value > values[place - 1]:
                    values[place] = values[place - 1]
                    best[i, place] = best[i, place - 1]
                    place -= 1
                values[place] = value
                best[i, place] = token
