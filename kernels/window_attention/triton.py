# SPDX-License-Identifier: Apache-2.0
"""The kernel behind `vllm_unmask.kernels.window_attention`, for GPUs.

With P prefix positions and W rows of a request, ``2 * kv_heads * dim * (P + W)``
elements of K and V are read for each tile of query rows, of which there is one as long
as ``W * heads / kv_heads <= 64``. The prefix is not split among programs.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Keys of a tile of the window: those of one word of the mask.
WORD_KEYS = 32


@triton.jit
def absorb_tile(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    seen: tl.tensor,
    scale: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One step of the online softmax, in base 2.

    Args:
        query: [rows, dim].
        keys: [dim, keys].
        values: [keys, dim].
        seen: bool, broadcast to [rows, keys].
        scale: factor of the scores, with log2(e).
        peak: float32 [rows], largest score so far, -inf if there was none.
        total: float32 [rows], sum of exp2(score - peak).
        mixed: float32 [rows, dim], sum of exp2(score - peak) * value.
        PRECISION: of the products of float32.

    Returns:
        `peak`, `total` and `mixed` after these keys.
    """
    scores = tl.dot(query, keys, input_precision=PRECISION) * scale
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen nothing yet has no peak to subtract: -inf - -inf is NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(weights, 1)
    mixed = mixed * decay[:, None]
    mixed = tl.dot(
        weights.to(values.dtype), values, acc=mixed, input_precision=PRECISION
    )
    return higher, total, mixed


# Numbers that follow the batch, not the model: one kernel serves all of them.
@triton.jit(do_not_specialize=["table_stride", "words"])
def window_attention_kernel(
    out: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    block_table: tl.tensor,
    prefix_lens: tl.tensor,
    cu_rows: tl.tensor,
    mask: tl.tensor,
    holes: tl.tensor,
    scale: tl.tensor,
    table_stride: tl.tensor,
    words: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
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
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WORD_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_HOLES: tl.constexpr,
) -> None:
    """Rows of one request and one group of heads: grid (requests, kv_heads, tiles).

    A tile has BLOCK_ROWS pairs of a row and a head of the group, all of which read the
    same keys. Tensors and strides as in `window_attention`, `mask` and `block_table`
    with a last stride of 1, like the last dimension of query, key, value and out.
    `holes` is read if HAS_HOLES.
    """
    request = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    prefix = tl.load(prefix_lens + request)
    first = tl.load(cu_rows + request).to(tl.int64)
    width = (tl.load(cu_rows + request + 1) - first).to(tl.int32)
    begin = tl.program_id(2) * BLOCK_ROWS
    if (prefix < 0) | (begin >= width * GROUP):
        return

    dim = tl.arange(0, BLOCK_DIM)
    has_dim = dim < DIM
    pair = begin + tl.arange(0, BLOCK_ROWS)
    row = pair // GROUP
    has_row = row < width
    head = kv_head * GROUP + pair % GROUP
    cells = has_row[:, None] & has_dim[None, :]
    query_place = (first + row) * query_row + head * query_head
    block_query = tl.load(
        query + query_place[:, None] + dim[None, :], mask=cells, other=0.0
    )

    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    mixed = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)

    table = block_table + request.to(tl.int64) * table_stride
    key_cache += kv_head * key_cache_head
    value_cache += kv_head * value_cache_head
    for start in range(0, prefix, BLOCK_KEYS):
        position = start + tl.arange(0, BLOCK_KEYS)
        has_key = position < prefix
        if HAS_HOLES:
            hole = tl.load(holes + request * 2)
            length = tl.load(holes + request * 2 + 1)
            position = tl.where(position >= hole, position + length, position)
        page = tl.load(table + position // PAGE, mask=has_key, other=0).to(tl.int64)
        slot = position % PAGE
        keys = tl.load(
            key_cache
            + (page * key_page + slot * key_slot)[None, :]
            + dim[:, None] * key_dim,
            mask=has_dim[:, None] & has_key[None, :],
            other=0.0,
        )
        values = tl.load(
            value_cache
            + (page * value_page + slot * value_slot)[:, None]
            + dim[None, :] * value_dim,
            mask=has_key[:, None] & has_dim[None, :],
            other=0.0,
        )
        peak, total, mixed = absorb_tile(
            block_query,
            keys.to(block_query.dtype),
            values.to(block_query.dtype),
            has_key[None, :],
            scale,
            peak,
            total,
            mixed,
            PRECISION,
        )

    key += first * key_row + kv_head * key_head
    value += first * value_row + kv_head * value_head
    for start in range(0, width, WORD_KEYS):
        bit = tl.arange(0, WORD_KEYS)
        live = start + bit
        has_key = live < width
        word = tl.load(
            mask + (first + row) * words + start // WORD_KEYS, mask=has_row, other=0
        )
        keys = tl.load(
            key + live[None, :] * key_row + dim[:, None],
            mask=has_dim[:, None] & has_key[None, :],
            other=0.0,
        )
        values = tl.load(
            value + live[:, None] * value_row + dim[None, :],
            mask=has_key[:, None] & has_dim[None, :],
            other=0.0,
        )
        peak, total, mixed = absorb_tile(
            block_query,
            keys,
            values,
            ((word[:, None] >> bit[None, :]) & 1 == 1) & has_key[None, :],
            scale,
            peak,
            total,
            mixed,
            PRECISION,
        )

    # A row that saw nothing has mixed nothing: 0 / 1.
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    out_place = (first + row) * out_row + head * out_head
    tl.store(
        out + out_place[:, None] + dim[None, :],
        mixed.to(out.dtype.element_ty),
        mask=cells,
    )


class Tiling(NamedTuple):
    """What a kernel is compiled for, besides the model's own sizes."""

    rows: int
    keys: int
    dim: int
    num_warps: int
    num_stages: int


def tiling(pairs: int, dim: int, element_size: int) -> Tiling:
    """Tile sizes for at most ``pairs`` (row, head) pairs of a group.

    Three heights at most, so that a model has at most three kernels. Larger tiles need
    more registers or more shared memory than sm_80 or gfx942 have: `resources.json`
    tells what these need, and a test compiles them. Float32 has no tensor cores here,
    as its products are exact to its last bits, and is made for tests and small models.

    Args:
        pairs: rows of the widest window times query heads of a KV head.
        dim: head size.
        element_size: bytes of an element of the query.
    """
    block_dim = max(triton.next_power_of_2(dim), 16)
    if element_size == 4:
        return Tiling(16, 32, block_dim, num_warps=4, num_stages=1)
    rows = min(max(triton.next_power_of_2(pairs), 16), 64)
    keys = 64 if block_dim <= 128 else 32
    return Tiling(rows, keys, block_dim, 8 if rows == 64 else 4, num_stages=2)


def constants(
    tile: Tiling, group: int, page: int, dim: int, holes: bool
) -> dict[str, Any]:
    """Constexpr arguments of `window_attention_kernel`."""
    return {
        "GROUP": group,
        "PAGE": page,
        "DIM": dim,
        "BLOCK_DIM": tile.dim,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_KEYS": tile.keys,
        "WORD_KEYS": WORD_KEYS,
        "PRECISION": "ieee",
        "HAS_HOLES": holes,
    }


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    prefix_lens: torch.Tensor,
    cu_rows: torch.Tensor,
    mask: torch.Tensor,
    max_window: int,
    scale: float,
    out: torch.Tensor,
    holes: torch.Tensor | None = None,
) -> None:
    """Documented in the package."""
    kv_heads, dim = key.shape[1:]
    group = query.shape[1] // kv_heads
    tile = tiling(max_window * group, dim, query.element_size())
    grid = (len(prefix_lens), kv_heads, triton.cdiv(max_window * group, tile.rows))
    if 0 in grid:
        return
    window_attention_kernel[grid](
        out,
        query,
        key,
        value,
        key_cache,
        value_cache,
        block_table,
        prefix_lens,
        cu_rows,
        mask,
        # Without holes nothing is read of it.
        prefix_lens if holes is None else holes,
        # exp(x) is exp2(x * log2(e)).
        scale * 1.4426950408889634,
        block_table.stride(0),
        mask.stride(0),
        *out.stride()[:2],
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride(),
        *value_cache.stride(),
        **constants(tile, group, key_cache.shape[1], dim, holes is not None),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
