# SPDX-License-Identifier: Apache-2.0
"""The loops behind `vllm_unmask.kernels.canvas`, on arrays of numpy."""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_unmask.kernels.jit import compiled

Array = npt.NDArray[Any]

# Stands for -inf, so that a masked position outranks every other one.
_LOWEST = np.finfo(np.float32).min


@compiled(
    "void(int64[:,::1], boolean[::1], int64[::1], int64[::1], int64[::1], int64[::1],"
    " int32[::1], int64[::1], int64[::1], int64[:,::1])"
)
def write_inputs(
    ids: Array,
    pending: Array,
    slots: Array,
    query_start: Array,
    query_len: Array,
    lead: Array,
    input_ids: Array,
    width: Array,
    num_open: Array,
    logits_rows: Array,
) -> None:
    block = logits_rows.shape[1]
    for i in range(len(slots)):
        slot, start, length = slots[i], query_start[i], query_len[i]
        skipped = 0 if pending[slot] else lead[i]
        for column in range(length - skipped):
            input_ids[start + skipped + column] = ids[slot, column]
        first = block if pending[slot] else skipped
        num_open[i] = length - first
        width[i] = min(max(length - first, 0), block)
        for column in range(block):
            logits_rows[i, column] = start + min(first + column, length - 1)


@compiled(
    "void(int64[:,::1], boolean[::1], int64[::1], int64[::1], int64[::1], int64,"
    " int64[:,::1], boolean[:,::1])"
)
def open_blocks(
    ids: Array,
    pending: Array,
    num_fixed: Array,
    slots: Array,
    width: Array,
    mask_id: int,
    active: Array,
    masked: Array,
) -> None:
    block = active.shape[1]
    for i in range(len(slots)):
        slot = slots[i]
        first = block if pending[slot] else 0
        for column in range(block):
            token = ids[slot, first + column]
            active[i, column] = token
            # A mask token in the prompt is the user's: it stays what it is.
            masked[i, column] = (
                token == mask_id and num_fixed[slot] <= column < width[i]
            )


@compiled(
    "void(int64[::1], int64[::1], int64[::1], int64[::1], float32[::1], boolean[::1],"
    " int64[::1], int64[::1], boolean[:,::1], float32[:,::1], float32[:,::1],"
    " boolean[:,::1])"
)
def accept(
    num_fixed: Array,
    num_masks: Array,
    step: Array,
    num_steps: Array,
    threshold: Array,
    strict: Array,
    slots: Array,
    width: Array,
    masked: Array,
    confidence: Array,
    order: Array,
    accepted: Array,
) -> None:
    block = masked.shape[1]
    for i in range(len(slots)):
        slot = slots[i]
        accepted[i, :] = False
        total = min(num_masks[slot], width[i] - num_fixed[slot])
        count = total // num_steps[slot]
        if step[slot] < total % num_steps[slot]:
            count += 1
        for _ in range(max(count, 1)):
            best = -1
            peak = _LOWEST
            for column in range(block):
                if masked[i, column] and not accepted[i, column]:
                    key = max(order[i, column], _LOWEST)
                    if best < 0 or key > peak:
                        best, peak = column, key
            if best < 0:
                break
            accepted[i, best] = True
        bound = threshold[slot]
        for column in range(block):
            sure = confidence[i, column]
            if masked[i, column] and (
                sure > bound or (not strict[slot] and sure == bound)
            ):
                accepted[i, column] = True


@compiled(
    "void(int64[:,::1], boolean[::1], int64[::1], int64[::1], int64[::1], int64[::1],"
    " int64[::1], int64[:,::1], int64, int64[:,::1], int64[::1])"
)
def close_blocks(
    ids: Array,
    pending: Array,
    num_fixed: Array,
    num_masks: Array,
    step: Array,
    slots: Array,
    width: Array,
    active: Array,
    mask_id: int,
    tokens: Array,
    num_tokens: Array,
) -> None:
    block = active.shape[1]
    for i in range(len(slots)):
        slot = slots[i]
        fixed = num_fixed[slot]
        complete = width[i] > 0
        for column in range(block):
            if active[i, column] == mask_id and fixed <= column < width[i]:
                complete = False
            tokens[i, column] = active[i, min(column + fixed, block - 1)]
            ids[slot, column] = active[i, column]
            ids[slot, block + column] = mask_id
        pending[slot] = complete
        if complete:
            num_tokens[i] = width[i] - fixed
            num_fixed[slot] = 0
            num_masks[slot] = block
            step[slot] = 0
        else:
            num_tokens[i] = 0
            if width[i] > 0:
                step[slot] += 1
