# SPDX-License-Identifier: Apache-2.0
"""The kernel behind `write_kept` of `vllm_unmask.kernels.window_attention`."""

import torch
import triton
import triton.language as tl


@triton.jit
def write_kept_kernel(
    key: tl.tensor,
    value: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slot_mapping: tl.tensor,
    key_row: tl.tensor,
    key_head: tl.tensor,
    value_row: tl.tensor,
    value_head: tl.tensor,
    key_page: tl.tensor,
    key_slot: tl.tensor,
    key_cache_head: tl.tensor,
    key_dim: tl.tensor,
    value_page: tl.tensor,
    value_slot: tl.tensor,
    value_cache_head: tl.tensor,
    value_dim: tl.tensor,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """One head of one row: grid (rows, kv_heads)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    place = tl.load(slot_mapping + row).to(tl.int64)
    if place < 0:
        return
    page = place // PAGE
    slot = place % PAGE
    dim = tl.arange(0, BLOCK_DIM)
    has_dim = dim < DIM
    new_key = tl.load(key + row * key_row + head * key_head + dim, mask=has_dim)
    new_value = tl.load(value + row * value_row + head * value_head + dim, mask=has_dim)
    tl.store(
        key_cache
        + page * key_page
        + slot * key_slot
        + head * key_cache_head
        + dim * key_dim,
        new_key.to(key_cache.dtype.element_ty),
        mask=has_dim,
    )
    tl.store(
        value_cache
        + page * value_page
        + slot * value_slot
        + head * value_cache_head
        + dim * value_dim,
        new_value.to(value_cache.dtype.element_ty),
        mask=has_dim,
    )


def write_kept(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Documented in the package."""
    rows, kv_heads, dim = key.shape
    if not rows:
        return
    write_kept_kernel[rows, kv_heads](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride(),
        *value_cache.stride(),
        PAGE=key_cache.shape[1],
        DIM=dim,
        BLOCK_DIM=triton.next_power_of_2(dim),
        num_warps=1,
    )
