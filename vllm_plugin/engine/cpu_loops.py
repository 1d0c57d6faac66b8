# SPDX-License-Identifier: Apache-2.0
"""Compiled loops on the host that run in every step.

`cut_rows` serves every device, the others are the CPU kernels: their arrays are flat
views of what the Triton kernels see behind their pointers, and the functions in
`cpu_kernels` say what is in them. The signatures are those of vLLM's runner; other
integer types compile when they are first met.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_unmask.kernels.jit import compiled

Array = npt.NDArray[Any]


@compiled(
    "Tuple((int64[::1], int32[::1], int32[::1], int32[::1]))"
    "(int32[::1], int64, int64[::1], int64[::1])"
)
def cut_rows(
    lengths: Array, block: int, parts: Array, long: Array
) -> tuple[Array, Array, Array, Array]:
    """The fields of `attention.RowPlan` for queries of these lengths.

    Blocks from `long` on, a multiple of the block, are cut into parts.
    """
    num_rows = 0
    for i in range(len(lengths)):
        whole = min(lengths[i], long[i])
        num_rows += (whole + block - 1) // block
        num_rows += (lengths[i] - whole + parts[i] - 1) // parts[i]
    request = np.empty(num_rows, dtype=np.int64)
    query_start = np.zeros(num_rows + 1, dtype=np.int32)
    after = np.empty(num_rows, dtype=np.int32)
    after_block = np.empty(num_rows, dtype=np.int32)
    row = 0
    for i in range(len(lengths)):
        done = 0
        while done < lengths[i]:
            block_end = min((done // block + 1) * block, lengths[i])
            width = block if done < long[i] else parts[i]
            taken = min(width, block_end - done)
            done += taken
            request[row] = i
            query_start[row + 1] = query_start[row] + taken
            after[row] = lengths[i] - done
            after_block[row] = lengths[i] - block_end
            row += 1
    return request, query_start, after, after_block


@compiled(
    "void(int64[::1], int32[::1], int64[::1], int32[::1], int64, int64, boolean,"
    " int64, int64, int64, int64, int64[::1])",
    others=True,
)
def slot_mappings(
    requests: Array,
    bounds: Array,
    positions: Array,
    table: Array,
    stride: int,
    size: int,
    sharded: bool,
    rank: int,
    num_ranks: int,
    interleave: int,
    pad: int,
    slots: Array,
) -> None:
    """Slots of one group; `slots` starts at its first token."""
    for i in range(len(requests)):
        request = requests[i]
        for token in range(bounds[i], bounds[i + 1]):
            local = np.int64(positions[token])
            mine = request >= 0
            if sharded:
                # Ranks own interleaved chunks of a virtual block of all ranks'.
                block = local // (size * num_ranks)
                local -= block * size * num_ranks
                chunk = local // interleave
                mine &= chunk % num_ranks == rank
                local = (
                    block * size + chunk // num_ranks * interleave + local % interleave
                )
            if mine:
                block = local // size
                # The kernel multiplies in int32.
                first = np.int32(table[request * stride + block] * size)
                slots[token] = first + local - block * size
            else:
                slots[token] = pad
    slots[bounds[len(requests)] :] = pad


@compiled(
    "void(int64[::1], int32[::1], int32[::1], int64[::1], int32[::1])", others=True
)
def pos_seq_lens(
    requests: Array, bounds: Array, computed: Array, positions: Array, seq_lens: Array
) -> None:
    """Positions of all tokens and the length of every row; 0 beyond the batch."""
    seq_lens[len(requests) :] = 0
    for i in range(len(requests)):
        before = computed[requests[i]]
        seq_lens[i] = before + bounds[i + 1] - bounds[i]
        for token in range(bounds[i], bounds[i + 1]):
            positions[token] = before + token - bounds[i]


@compiled(
    "void(int32[::1], int64[::1], int64[::1], int32[::1], int32[::1], int32[::1],"
    " int64[::1], int64, int32[::1], int64[::1], int64)",
    others=True,
)
def sampled_and_drafts(
    input_ids: Array,
    requests: Array,
    last_sampled: Array,
    bounds: Array,
    seq_lens: Array,
    prefill_lens: Array,
    drafts: Array,
    drafts_stride: int,
    logit_bounds: Array,
    logits_indices: Array,
    num_new: int,
) -> None:
    """The last tokens of every query and the rows of their logits."""
    for i in range(len(requests)):
        request = requests[i]
        end = bounds[i + 1]
        num_logits = logit_bounds[i + 1] - logit_bounds[i]
        for j in range(num_logits):
            logits_indices[logit_bounds[i] + j] = end - num_logits + j
        if seq_lens[i] <= prefill_lens[request]:
            continue
        # A row that still holds prompt tokens keeps them.
        if num_new > 0 and seq_lens[i] - num_logits >= prefill_lens[request]:
            input_ids[end - num_logits] = last_sampled[request]
        num_drafts = num_logits - num_new
        for j in range(num_drafts):
            draft = drafts[request * drafts_stride + j]
            input_ids[end - num_drafts + j] = draft


@compiled(
    "void(int64[::1], int32[::1], int64[::1], int32[::1], int64, int64[::1], int64,"
    " int32[::1], int32[::1], int32[::1], int32[::1], int64, int32[::1])",
    others=True,
)
def post_update(
    requests: Array,
    computed: Array,
    last_sampled: Array,
    bin_counts: Array,
    bins_stride: int,
    sampled: Array,
    sampled_stride: int,
    num_sampled: Array,
    num_rejected: Array,
    bounds: Array,
    all_token_ids: Array,
    all_stride: int,
    total_lens: Array,
) -> None:
    """Append what was sampled; empty `bin_counts` and `bounds` are left out."""
    for i in range(len(requests)):
        request = requests[i]
        if request < 0:
            continue
        if len(bounds) > 0:
            computed[request] += bounds[i + 1] - bounds[i]
        computed[request] -= num_rejected[i]
        count = num_sampled[i]
        if count <= 0:
            continue
        first = i * sampled_stride
        last_sampled[request] = sampled[first + count - 1]
        target = request * all_stride + total_lens[request]
        for j in range(count):
            token = sampled[first + j]
            all_token_ids[target + j] = token
            if len(bin_counts) > 0:
                bin_counts[request * bins_stride + token] += 1
        total_lens[request] += count


@compiled("void(int64[::1], int64[::1], int32[::1], int32[::1])", others=True)
def expand_idx_mapping(
    requests: Array, expanded: Array, local_pos: Array, bounds: Array
) -> None:
    """The request of every logit and its place among the request's logits."""
    for i in range(len(requests)):
        for row in range(bounds[i], bounds[i + 1]):
            expanded[row] = requests[i]
            local_pos[row] = row - bounds[i]
