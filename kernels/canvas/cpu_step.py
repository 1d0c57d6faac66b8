# SPDX-License-Identifier: Apache-2.0
"""The loop behind `vllm_unmask.kernels.canvas.greedy_step`: the others in a row.

Its machine code contains them, and its cache only watches this file: who changes them
touches this one, too (see `row_statistics.cpu_chunks`).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_unmask.kernels.canvas.cpu import accept, close_blocks, open_blocks
from vllm_unmask.kernels.jit import compiled
from vllm_unmask.kernels.row_statistics.cpu import FLOAT, UNIT, survey
from vllm_unmask.kernels.row_statistics.cpu_chunks import CHUNK

Array = npt.NDArray[Any]


@compiled(
    "void(int64[:,::1], boolean[::1], int64[::1], int64[::1], int64[::1], int64[::1],"
    " float32[::1], boolean[::1], int64[::1], int64[::1], uint16[::1], int64, int64,"
    " int64, int64, int64[::1], int64, int64[:,::1], int64[::1])"
)
def greedy_step(
    ids: Array,
    pending: Array,
    num_fixed: Array,
    num_masks: Array,
    step: Array,
    num_steps: Array,
    threshold: Array,
    strict: Array,
    slots: Array,
    width: Array,
    words: Array,
    kind: int,
    stride: int,
    rows: int,
    vocab: int,
    read: Array,
    mask_id: int,
    tokens: Array,
    num_tokens: Array,
) -> None:
    """Up to ``width`` as in the package; then the logits as `describe` takes them."""
    shape = len(slots), tokens.shape[1]
    active, best = np.empty(shape, np.int64), np.zeros(shape, np.int64)
    masked, accepted = np.empty(shape, np.bool_), np.empty(shape, np.bool_)
    sure = np.zeros(shape, np.float32)
    open_blocks(ids, pending, num_fixed, slots, width, mask_id, active, masked)

    chunks = (vocab + CHUNK - 1) // CHUNK
    sums, peaks = np.empty(chunks, np.float64), np.empty(chunks, np.float32)
    no_mask, no_tokens = np.empty(0, np.int32), np.empty(0, np.int64)
    no_biases = np.empty(0, np.float32)
    size = vocab * 2 if kind == FLOAT else vocab
    for r in range(rows):
        line = words[r * stride : r * stride + size]
        row = (line, kind, mask_id, no_mask, no_mask, no_tokens, no_biases)
        token, peak, _, total, _ = survey(row, vocab, UNIT, sums, peaks)
        i, column = divmod(read[r], shape[1])
        # Without a finite logit that is token 0, and a revealed mask never goes away.
        best[i, column] = token if token != mask_id else (token + 1) % vocab
        sure[i, column] = 1.0 / total if np.isfinite(peak) else 0.0

    accept(
        num_fixed,
        num_masks,
        step,
        num_steps,
        threshold,
        strict,
        slots,
        width,
        masked,
        sure,
        sure,
        accepted,
    )
    for i in range(shape[0]):
        for column in range(shape[1]):
            if accepted[i, column]:
                active[i, column] = best[i, column]
    close_blocks(
        ids,
        pending,
        num_fixed,
        num_masks,
        step,
        slots,
        width,
        active,
        mask_id,
        tokens,
        num_tokens,
    )
