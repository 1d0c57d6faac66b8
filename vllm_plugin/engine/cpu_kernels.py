# SPDX-License-Identifier: Apache-2.0
"""CPU implementations of the small Triton kernels of vLLM's Model Runner V2.

The V2 runner prepares every step with Triton kernels, and vLLM's CPU wheel
has no Triton. vLLM lets a platform replace kernels by name
(`vllm.triton_utils.dispatcher`); the functions here are such replacements.

Conventions shared by all of them:

* They are launched as `kernel[grid](*args, **constexprs)`, so the names of
  the constexpr parameters are those of the Triton kernel. Block sizes only
  tile the work and are ignored.
* vLLM's override drops the grid. One program runs per entry of
  `idx_mapping` (or per output row), so the batch size is read from shapes.
  `gather_block_tables` is the exception, see `register_cpu_kernels`.
* They run on a few dozen numbers, where one torch op costs more than the work:
  integers go through zero-copy numpy views, and what runs in every engine step
  through the compiled loops of `cpu_loops`. Only the kernels that scan the
  vocabulary use torch.
"""

import ctypes
import functools
import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_unmask.engine import cpu_loops

_INT32_BYTES = 4
_GATHER_BLOCK_TABLES = "vllm.v1.worker.gpu.block_table._gather_block_tables_kernel"
_LLVM_BINDING = "llvmlite.binding.ffi"
# Bounds the float32 temporary of the log-softmax to 16 MiB.
_MAX_CHUNK_ELEMENTS = 1 << 22

Array = npt.NDArray[Any]
# Stands for an absent array.
_NONE = np.empty(0, dtype=np.int32)


def _flat(tensor: torch.Tensor) -> Array:
    """What a kernel sees behind a pointer: unit-stride elements from data_ptr on."""
    if tensor.is_contiguous():
        return tensor.numpy().reshape(-1)
    offset = tensor.storage_offset()
    room = tensor.untyped_storage().nbytes() // tensor.element_size() - offset
    return tensor.as_strided((room,), (1,)).numpy()


def _int32_memory(address: int, size: int) -> Array:
    """View `size` int32 at `address`; the caller keeps the memory alive.

    vLLM passes one tensor per KV cache group as a uint64 tensor of data_ptr
    values, so the only handle on a block table is its address. numpy's array
    interface makes a view of it in about a microsecond, without building a
    ctypes array type per size.
    """
    interface = {
        "data": (address, False),
        "shape": (size,),
        "typestr": "<i4",
        "version": 3,
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def _lengths(cumulative: Array, count: int) -> Array:
    """Segment lengths of `count` segments given their cumulative bounds."""
    return cumulative[1 : count + 1] - cumulative[:count]


def apply_write(
    output_ptr: torch.Tensor,
    output_stride: int | torch.Tensor,
    write_indices_ptr: torch.Tensor,  # [num_writes] row of the output
    write_starts_ptr: torch.Tensor,  # [num_writes] first column
    write_contents_ptr: torch.Tensor,  # [sum of lengths]
    write_cu_lens_ptr: torch.Tensor,  # [num_writes] inclusive cumulative lengths
    write_group_ids_ptr: torch.Tensor | None,  # [num_writes] write -> output
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    """Replace `buffer_utils._apply_write_kernel`."""
    rows = write_indices_ptr.tolist()
    starts = write_starts_ptr.tolist()
    ends = write_cu_lens_ptr.tolist()
    begin = 0
    if not MULTI_GROUP:
        output = _flat(output_ptr)
        contents = _flat(write_contents_ptr)
        for row, start, end in zip(rows, starts, ends, strict=True):
            first = row * output_stride + start
            output[first : first + end - begin] = contents[begin:end]
            begin = end
        return

    assert isinstance(output_stride, torch.Tensor)
    assert write_group_ids_ptr is not None
    bases = output_ptr.tolist()
    strides = output_stride.tolist()
    source = write_contents_ptr.data_ptr()
    groups = write_group_ids_ptr.tolist()
    for group, row, start, end in zip(groups, rows, starts, ends, strict=True):
        first = row * strides[group] + start
        ctypes.memmove(
            bases[group] + first * _INT32_BYTES,
            source + begin * _INT32_BYTES,
            (end - begin) * _INT32_BYTES,
        )
        begin = end


def gather_block_tables(
    batch_idx_to_req_idx: torch.Tensor,  # [num_reqs] batch row -> request slot
    src_block_table_ptrs: torch.Tensor,  # [num_groups] uint64 addresses
    dst_block_table_ptrs: torch.Tensor,  # [num_groups] uint64 addresses
    block_table_strides: torch.Tensor,  # [num_groups] blocks per row
    num_blocks_ptr: torch.Tensor,  # [num_groups, max_num_reqs]
    num_blocks_stride: int,
    num_reqs: int,
    BLOCK_SIZE: int,
    *,
    grid: tuple[int, int],
) -> None:
    """Replace `block_table._gather_block_tables_kernel`.

    `grid` is `(num_groups, num_reqs_padded)` and has no substitute among
    the arguments: rows from `num_reqs` up to the padded count must be
    zeroed, and zeroing further is unsafe because the destination may have
    fewer rows than the source (prefill context parallelism passes local
    tables with their own row count).
    """
    num_groups, num_rows = grid
    num_real = min(num_reqs, num_rows)
    requests = batch_idx_to_req_idx.numpy()[:num_real]
    sources = src_block_table_ptrs.tolist()
    targets = dst_block_table_ptrs.tolist()
    strides = block_table_strides.tolist()
    num_blocks = _flat(num_blocks_ptr)
    for group in range(num_groups):
        row_bytes = strides[group] * _INT32_BYTES
        source, target = sources[group], targets[group]
        counts = num_blocks[group * num_blocks_stride + requests]
        for request, count in zip(requests.tolist(), counts.tolist(), strict=True):
            row = source + request * row_bytes
            ctypes.memmove(target, row, count * _INT32_BYTES)
            target += row_bytes
        if num_real < num_rows:
            ctypes.memset(target, 0, (num_rows - num_real) * row_bytes)


def compute_slot_mappings(
    max_num_tokens: int,
    idx_mapping: torch.Tensor,  # [num_reqs] batch row -> request slot, -1: dummy
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    pos: torch.Tensor,  # [num_tokens]
    block_table_ptrs: torch.Tensor,  # [num_groups] uint64 addresses
    block_table_strides: torch.Tensor,  # [num_groups]
    block_sizes: torch.Tensor,  # [num_groups]
    slot_mapping_enabled: torch.Tensor,  # [num_groups]
    dcp_sharded: torch.Tensor,  # [num_groups]
    slot_mappings_ptr: torch.Tensor,  # [num_groups, max_num_tokens]
    slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """Replace `block_table._compute_slot_mappings_kernel`."""
    requests = idx_mapping.numpy()
    bounds = query_start_loc.numpy()[: len(requests) + 1]
    positions = _flat(pos)
    slots = _flat(slot_mappings_ptr)
    num_table_rows = int(requests.max(initial=-1)) + 1
    addresses = block_table_ptrs.tolist()
    strides = block_table_strides.tolist()
    sizes = block_sizes.tolist()
    enabled = slot_mapping_enabled.tolist()
    sharded = dcp_sharded.tolist()
    for group, size in enumerate(sizes):
        base = group * slot_mappings_stride
        target = slots[base : base + max_num_tokens]
        if not enabled[group]:
            target[bounds[0] :] = PAD_ID
            continue
        cpu_loops.slot_mappings(
            requests,
            bounds,
            positions,
            _int32_memory(addresses[group], num_table_rows * strides[group]),
            strides[group],
            size,
            CP_SIZE != 1 and sharded[group],
            cp_rank,
            CP_SIZE,
            CP_INTERLEAVE,
            PAD_ID,
            target,
        )


def prepare_prefill_inputs(
    input_ids_ptr: torch.Tensor,  # [max_num_tokens]
    next_prefill_tokens_ptr: torch.Tensor,  # [num_lookahead, max_num_reqs]
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping_ptr: torch.Tensor,  # [num_reqs] batch row -> request slot
    query_start_loc_ptr: torch.Tensor,  # [num_reqs + 1]
    all_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_model_len]
    all_token_ids_stride: int,
    prefill_lens_ptr: torch.Tensor,  # [max_num_reqs]
    num_computed_tokens_ptr: torch.Tensor,  # [max_num_reqs]
    BLOCK_SIZE: int,
    LOOKAHEAD_BLOCK: int,
) -> None:
    """Replace `input_batch._prepare_prefill_inputs_kernel`."""
    requests = idx_mapping_ptr.numpy()
    prefill_lens = prefill_lens_ptr.numpy()[requests]
    computed = num_computed_tokens_ptr.numpy()[requests]
    prefilling = np.flatnonzero(computed < prefill_lens)
    if prefilling.size == 0:
        return
    bounds = query_start_loc_ptr.numpy()
    starts, ends = bounds[prefilling], bounds[prefilling + 1]
    requests = requests[prefilling].astype(np.int64, copy=False)
    rows = requests * all_token_ids_stride
    # First column behind the tokens of this step.
    after = computed[prefilling] + (ends - starts)

    input_ids = _flat(input_ids_ptr)
    all_token_ids = _flat(all_token_ids_ptr)
    # A copy per row beats index arithmetic: prompts are long, rows are few.
    for start, end, source in zip(
        starts.tolist(), ends.tolist(), (rows + after).tolist(), strict=True
    ):
        input_ids[start:end] = all_token_ids[source - (end - start) : source]

    next_tokens = _flat(next_prefill_tokens_ptr)
    last = prefill_lens[prefilling] - 1
    for ahead in range(num_lookahead):
        column = after + ahead
        tokens = all_token_ids[rows + np.minimum(column, last)]
        tokens[column > last] = 0
        next_tokens[ahead * next_prefill_tokens_stride + requests] = tokens


def prepare_pos_seq_lens(
    pos_ptr: torch.Tensor,  # [max_num_tokens]
    seq_lens_ptr: torch.Tensor,  # [max_num_reqs]
    idx_mapping_ptr: torch.Tensor,  # [num_reqs] batch row -> request slot
    query_start_loc_ptr: torch.Tensor,  # [num_reqs + 1]
    num_computed_tokens_ptr: torch.Tensor,  # [max_num_reqs]
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Replace `input_batch._prepare_pos_seq_lens_kernel`."""
    cpu_loops.pos_seq_lens(
        idx_mapping_ptr.numpy(),
        query_start_loc_ptr.numpy(),
        num_computed_tokens_ptr.numpy(),
        _flat(pos_ptr),
        _flat(seq_lens_ptr)[:max_num_reqs],
    )


def combine_sampled_and_draft_tokens(
    input_ids_ptr: torch.Tensor,  # [max_num_tokens]
    idx_mapping_ptr: torch.Tensor,  # [num_reqs] batch row -> request slot
    last_sampled_tokens_ptr: torch.Tensor,  # [max_num_reqs, 1]
    query_start_loc_ptr: torch.Tensor,  # [num_reqs + 1]
    seq_lens_ptr: torch.Tensor,  # [num_reqs]
    prefill_len_ptr: torch.Tensor,  # [max_num_reqs]
    draft_tokens_ptr: torch.Tensor,  # [max_num_reqs, num_speculative_steps]
    draft_tokens_stride: int,
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    logits_indices_ptr: torch.Tensor,  # [num_logits]
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> None:
    """Replace `input_batch._combine_sampled_and_draft_tokens_kernel`.

    The kernel's BLOCK_SIZE also caps the logits of a row; the launcher derives
    it from the widest possible row, so the cap never bites and is not applied.
    """
    cpu_loops.sampled_and_drafts(
        _flat(input_ids_ptr),
        idx_mapping_ptr.numpy(),
        _flat(last_sampled_tokens_ptr),
        query_start_loc_ptr.numpy(),
        seq_lens_ptr.numpy(),
        prefill_len_ptr.numpy(),
        _flat(draft_tokens_ptr),
        draft_tokens_stride,
        cu_num_logits_ptr.numpy(),
        _flat(logits_indices_ptr),
        NUM_NEW_SAMPLED_TOKENS,
    )


def get_num_sampled_and_rejected(
    num_sampled_ptr: torch.Tensor,  # [num_reqs] in and out
    num_rejected_ptr: torch.Tensor,  # [num_reqs]
    seq_lens_ptr: torch.Tensor,  # [num_reqs]
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    idx_mapping_ptr: torch.Tensor,  # [num_reqs] batch row -> request slot
    prefill_len_ptr: torch.Tensor,  # [max_num_reqs]
) -> None:
    """Replace `input_batch._get_num_sampled_and_rejected_kernel`."""
    requests = idx_mapping_ptr.numpy()
    num_reqs = requests.shape[0]
    # A chunk that does not complete the prompt yields no token.
    done = seq_lens_ptr.numpy()[:num_reqs] >= prefill_len_ptr.numpy()[requests]
    num_sampled = _flat(num_sampled_ptr)[:num_reqs]
    num_sampled *= done
    num_logits = _lengths(cu_num_logits_ptr.numpy(), num_reqs)
    _flat(num_rejected_ptr)[:num_reqs] = (num_logits - num_sampled) * done


def post_update(
    idx_mapping_ptr: torch.Tensor,  # [num_reqs] batch row -> request slot, < 0: skip
    num_computed_tokens_ptr: torch.Tensor,  # [max_num_reqs]
    last_sampled_tokens_ptr: torch.Tensor,  # [max_num_reqs, 1]
    output_bin_counts_ptr: torch.Tensor | None,  # [max_num_reqs, vocab_size]
    output_bin_counts_stride: int,
    sampled_tokens_ptr: torch.Tensor,  # [num_reqs, max sampled per request]
    sampled_tokens_stride: int,
    num_sampled_ptr: torch.Tensor,  # [num_reqs]
    num_rejected_ptr: torch.Tensor,  # [num_reqs]
    query_start_loc_ptr: torch.Tensor | None,  # [num_reqs + 1]
    all_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_model_len]
    all_token_ids_stride: int,
    total_len_ptr: torch.Tensor,  # [max_num_reqs]
    num_warps: int = 1,
) -> None:
    """Replace `input_batch._post_update_kernel`."""
    cpu_loops.post_update(
        idx_mapping_ptr.numpy(),
        num_computed_tokens_ptr.numpy(),
        _flat(last_sampled_tokens_ptr),
        _NONE if output_bin_counts_ptr is None else _flat(output_bin_counts_ptr),
        output_bin_counts_stride,
        _flat(sampled_tokens_ptr),
        sampled_tokens_stride,
        num_sampled_ptr.numpy(),
        num_rejected_ptr.numpy(),
        _NONE if query_start_loc_ptr is None else query_start_loc_ptr.numpy(),
        _flat(all_token_ids_ptr),
        all_token_ids_stride,
        total_len_ptr.numpy(),
    )


def post_update_num_computed_tokens(
    idx_mapping_ptr: torch.Tensor,  # [num_reqs] batch row -> request slot
    num_computed_tokens_ptr: torch.Tensor,  # [max_num_reqs]
    query_start_loc_ptr: torch.Tensor,  # [num_reqs + 1]
) -> None:
    """Replace `input_batch._post_update_num_computed_tokens_kernel`."""
    requests = idx_mapping_ptr.numpy()
    lengths = _lengths(query_start_loc_ptr.numpy(), requests.shape[0])
    num_computed_tokens_ptr.numpy()[requests] += lengths


def expand_idx_mapping(
    idx_mapping_ptr: torch.Tensor,  # [num_reqs] batch row -> request slot
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_logits]
    expanded_local_pos_ptr: torch.Tensor,  # [num_logits]
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    BLOCK_SIZE: int,
) -> None:
    """Replace `input_batch._expand_idx_mapping_kernel`."""
    cpu_loops.expand_idx_mapping(
        idx_mapping_ptr.numpy(),
        _flat(expanded_idx_mapping_ptr),
        _flat(expanded_local_pos_ptr),
        cu_num_logits_ptr.numpy(),
    )


def apply_logit_bias(
    logits_ptr: torch.Tensor,  # [num_tokens, vocab_size] float32
    logits_stride: int,
    vocab_size: int,
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_tokens] logit -> request slot
    num_allowed_token_ids_ptr: torch.Tensor,  # [max_num_reqs]
    allowed_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max allowed]
    allowed_token_ids_stride: int,
    num_logit_bias_ptr: torch.Tensor,  # [max_num_reqs]
    bias_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max biased]
    bias_token_ids_stride: int,
    bias_ptr: torch.Tensor,  # [max_num_reqs, max biased]
    bias_stride: int,
    pos_ptr: torch.Tensor,  # [num_tokens]
    min_lens_ptr: torch.Tensor,  # [max_num_reqs]
    num_stop_token_ids_ptr: torch.Tensor,  # [max_num_reqs]
    restore_when_all_masked_ptr: torch.Tensor,  # [max_num_reqs]
    stop_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max stop]
    stop_token_ids_stride: int,
    BLOCK_SIZE: int,
    LOGITS_BLOCK_SIZE: int,
    CHECK_ALL_MASKED_ROWS: bool,
) -> None:
    """Replace `sample.logit_bias._bias_kernel`."""
    requests = expanded_idx_mapping_ptr.numpy()
    num_allowed = num_allowed_token_ids_ptr.numpy()[requests]
    num_bias = num_logit_bias_ptr.numpy()[requests]
    num_stop = num_stop_token_ids_ptr.numpy()[requests]
    too_short = pos_ptr.numpy() + 1 < min_lens_ptr.numpy()[requests]
    num_stop = np.where(too_short, num_stop, 0)
    touched = np.flatnonzero((num_allowed > 0) | (num_bias > 0) | (num_stop > 0))

    logits = logits_ptr.numpy()
    for token in touched.tolist():
        row = logits[token, :vocab_size]
        request = int(requests[token])
        if count := int(num_allowed[token]):
            ids = allowed_token_ids_ptr.numpy()[request, :count]
            kept = row[ids]
            row.fill(-np.inf)
            row[ids] = kept
        if count := int(num_bias[token]):
            ids = bias_token_ids_ptr.numpy()[request, :count]
            row[ids] += bias_ptr.numpy()[request, :count]
        if count := int(num_stop[token]):
            ids = stop_token_ids_ptr.numpy()[request, :count]
            stop_logits = row[ids]
            row[ids] = -np.inf
            # A grammar may allow nothing but a stop token: then it must win.
            if (
                CHECK_ALL_MASKED_ROWS
                and restore_when_all_masked_ptr.numpy()[request]
                and not (row > -np.inf).any()
            ):
                finite = np.isfinite(stop_logits)
                row[ids[finite]] = stop_logits[finite]


def topk_log_softmax(
    output_ptr: torch.Tensor,  # [num_rows, topk] float32
    logits_ptr: torch.Tensor,  # [num_rows, vocab_size]
    logits_stride: int,
    topk_ids_ptr: torch.Tensor,  # [num_rows, topk]
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    TOPK_BLOCK_SIZE: int,
) -> None:
    """Replace `sample.logprob._topk_log_softmax_kernel`."""
    chunk = max(1, _MAX_CHUNK_ELEMENTS // vocab_size)
    for start in range(0, logits_ptr.shape[0], chunk):
        rows = slice(start, start + chunk)
        scores = logits_ptr[rows].float()
        # Subtract the maximum before anything else, as the kernel does: a
        # log-sum-exp that adds it back loses digits when logits are large.
        shifted = scores - scores.amax(-1, keepdim=True)
        # Ids of rejected positions are arbitrary and their scores unused.
        ids = topk_ids_ptr[rows].clamp(0, vocab_size - 1)
        picked = shifted.gather(-1, ids)
        torch.sub(
            picked, shifted.exp_().sum(-1, keepdim=True).log_(), out=output_ptr[rows]
        )


def ranks(
    output_ptr: torch.Tensor,  # [num_rows] int64
    logits_ptr: torch.Tensor,  # [num_rows, vocab_size]
    logits_stride: int,
    token_ids_ptr: torch.Tensor,  # [num_rows]
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Replace `sample.logprob._ranks_kernel`."""
    # Ids of rejected positions are arbitrary and their ranks unused.
    ids = token_ids_ptr.clamp(0, vocab_size - 1).unsqueeze(-1)
    chosen = logits_ptr.gather(-1, ids.long())
    # torch makes the comparison (numpy has no bfloat16) and numpy counts, row by
    # row: both torch's sum of bools and numpy's count along an axis are slow.
    output = output_ptr.numpy()
    output[:] = [np.count_nonzero(row) for row in (logits_ptr >= chosen).numpy()]
    # The lanes that fill up the kernel's last block read -inf, so they outrank
    # a masked token too. Kept: a rank must not depend on the device.
    masked = (chosen[:, 0] == -torch.inf).numpy()
    output[masked] += -vocab_size % BLOCK_SIZE


def fill_logprob_token_ids(
    out_token_ids_ptr: torch.Tensor,  # [num_rows, 1 + num_cols]
    out_token_ids_stride: int,
    out_valid_mask_ptr: torch.Tensor,  # [num_rows, 1 + num_cols]
    out_valid_mask_stride: int,
    sampled_token_ids_ptr: torch.Tensor,  # [num_rows]
    topk_indices_ptr: torch.Tensor,  # [num_rows, NUM_TOPK]
    topk_indices_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_rows] logit -> request slot
    num_per_req_token_ids_ptr: torch.Tensor,  # [max_num_reqs]
    per_req_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max custom ids]
    per_req_token_ids_stride: int,
    NUM_TOPK: int,
    PADDED_COLS: int,
) -> None:
    """Replace `sample.logprob._fill_logprob_token_ids_kernel`."""
    token_ids = out_token_ids_ptr.numpy()
    valid = out_valid_mask_ptr.numpy()
    token_ids[:, 0] = sampled_token_ids_ptr.numpy()
    valid[:, 0] = True
    requests = expanded_idx_mapping_ptr.numpy()
    topk_indices = topk_indices_ptr.numpy()
    custom_ids = per_req_token_ids_ptr.numpy()
    num_custom = num_per_req_token_ids_ptr.numpy()[requests].tolist()
    for row, count in enumerate(num_custom):
        if count > 0:
            source = custom_ids[requests[row], :count]
        else:
            source = topk_indices[row, :NUM_TOPK] if NUM_TOPK else topk_indices[0, :0]
        token_ids[row, 1 : 1 + source.size] = source
        valid[row, 1 : 1 + source.size] = True


CPU_KERNELS: dict[str, Callable[..., None]] = {
    "vllm.v1.worker.gpu.buffer_utils._apply_write_kernel": apply_write,
    _GATHER_BLOCK_TABLES: gather_block_tables,
    "vllm.v1.worker.gpu.block_table._compute_slot_mappings_kernel": (
        compute_slot_mappings
    ),
    "vllm.v1.worker.gpu.input_batch._prepare_prefill_inputs_kernel": (
        prepare_prefill_inputs
    ),
    "vllm.v1.worker.gpu.input_batch._prepare_pos_seq_lens_kernel": (
        prepare_pos_seq_lens
    ),
    "vllm.v1.worker.gpu.input_batch._combine_sampled_and_draft_tokens_kernel": (
        combine_sampled_and_draft_tokens
    ),
    "vllm.v1.worker.gpu.input_batch._get_num_sampled_and_rejected_kernel": (
        get_num_sampled_and_rejected
    ),
    "vllm.v1.worker.gpu.input_batch._post_update_kernel": post_update,
    "vllm.v1.worker.gpu.input_batch._post_update_num_computed_tokens_kernel": (
        post_update_num_computed_tokens
    ),
    "vllm.v1.worker.gpu.input_batch._expand_idx_mapping_kernel": expand_idx_mapping,
    "vllm.v1.worker.gpu.sample.logit_bias._bias_kernel": apply_logit_bias,
    "vllm.v1.worker.gpu.sample.logprob._topk_log_softmax_kernel": topk_log_softmax,
    "vllm.v1.worker.gpu.sample.logprob._ranks_kernel": ranks,
    "vllm.v1.worker.gpu.sample.logprob._fill_logprob_token_ids_kernel": (
        fill_logprob_token_ids
    ),
}


def _register(kernels: dict[str, Callable[..., None]]) -> None:
    """Call vLLM's `register_kernels` without numba's binding to LLVM in its sight.

    It looks for copies of the kernels in every attribute of every module, and that
    module has an object that takes every name for the name of a C function.
    """
    from vllm.triton_utils.dispatcher import register_kernels

    for name in kernels:
        importlib.import_module(name.rpartition(".")[0])
    hidden = sys.modules.pop(_LLVM_BINDING, None)
    try:
        register_kernels(kernels)
    finally:
        if hidden is not None:
            sys.modules[_LLVM_BINDING] = hidden


@functools.cache
def register_cpu_kernels() -> None:
    """Make vLLM launch these implementations; a no-op where Triton works.

    Call it in the worker, once `vllm.v1.worker.cpu.shm` is imported. This imports
    the V2 runner's modules, which bind by name what that module replaces.
    """
    from vllm.triton_utils import HAS_TRITON, triton

    if HAS_TRITON:
        return

    from vllm.triton_utils.dispatcher import KernelOverride
    from vllm.utils.math_utils import next_power_of_2
    from vllm.v1.worker.gpu import block_table

    # vLLM's placeholder module has cdiv but not this; the launchers call both.
    if not hasattr(triton, "next_power_of_2"):
        triton.next_power_of_2 = next_power_of_2

    _register(CPU_KERNELS)

    class GridOverride(KernelOverride):
        """A kernel override that hands the launch grid on."""

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            return functools.partial(self._impl, grid=grid)

    # Only this module launches the kernel, so there is no other copy to rebind.
    block_table._gather_block_tables_kernel = GridOverride(
        block_table._gather_block_tables_kernel, gather_block_tables
    )
