# SPDX-License-Identifier: Apache-2.0
"""Attention of live rows to a paged prefix and to each other under a mask.

What a block-diffusion model needs to check its own drafts: rows that see a prefix of
the cache in full, and of the rows of the same forward those that a mask allows, which
no setting of causal or bidirectional attention expresses. `masks` has the masks.

Caches are given as [pages, page, kv_heads, dim], with any strides. Views of what
vLLM 0.32 allocates, `kv` [pages, kv_heads, page, 2 * dim]:

* FlashAttention and Triton backends: ``kv.transpose(1, 2).split(dim, -1)``
* CPU backend, whose pages hold all keys, transposed, before all values (isa "vec" and
  "vec16"; "amx" packs pairs of bf16, which no view undoes)::

      keys, values = kv.view(pages, kv_heads, 2, page * dim).unbind(2)
      keys = keys.view(pages, kv_heads, dim, page).permute(0, 3, 1, 2)
      values = values.view(pages, kv_heads, page, dim).transpose(1, 2)
"""

import torch

from vllm_unmask.kernels.window_attention import reference


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
    out: torch.Tensor | None = None,
    holes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of every row to its request's prefix and to its masked window.

    Row ``i`` of request ``r`` sees positions ``[0, prefix_lens[r])`` of the cache, or
    as many around a hole, and the live rows ``j`` of ``r`` that `mask` allows, whose
    keys and values are not read from the cache. A row that sees nothing gives 0. Query
    head ``h`` reads KV head ``h // (heads // kv_heads)``. Positions are the caller's:
    rotate before.

    Args:
        query: float16, bfloat16 or float32 [rows, heads, dim]; the last dimension is
            contiguous, as in key, value and out.
        key: [rows, kv_heads, dim], of the type of `query`; finite.
        value: like `key`.
        key_cache: [pages, page, kv_heads, dim], of the type of `query`, any strides.
            Only what is seen is read: anything may be in the other slots.
        value_cache: like `key_cache`.
        block_table: int32 [requests, max pages], contiguous; the page of position
            ``p`` is entry ``p // page``. Entries past what is seen are not read.
        prefix_lens: int32 [requests], in tokens. A request with a negative one is
            skipped: its rows of `out` stay as they are.
        cu_rows: int32 [requests + 1], not falling; the rows of request ``r`` are
            ``cu_rows[r]`` to ``cu_rows[r + 1]``. Other rows of `out` stay as they are.
        mask: int32 [rows, at least ceil(max_window / 32)], the last dimension
            contiguous; rows may share their memory. Row ``i`` sees live row ``j`` of
            its request if bit ``j % 32`` of word ``j // 32`` of ``mask[i]`` is 1
            (`masks.pack_masks`). Bits past a window are ignored.
        max_window: no request that is not skipped has more rows.
        scale: factor of the scores before the softmax, mostly ``dim ** -0.5``.
        out: like `query`; a new tensor if None.
        holes: int32 [requests, 2], contiguous: where a stretch of the cache begins that
            is not seen, and its length. Of request ``r`` ``prefix_lens[r]`` positions
            are seen without it, those that would lie in it and past it so much further
            on. None: the prefixes are whole.

    Returns:
        `out`. Scores and sums are float32 whatever the type of `query`.

    Raises:
        ValueError: tensors that do not fit each other. Values (pages, lengths) are not
            checked: reading them would wait for the GPU.
    """
    if out is None:
        out = torch.empty_like(query)
    _check(query, key, value, key_cache, value_cache, mask, max_window, out)
    arguments = (
        query,
        key,
        value,
        key_cache,
        value_cache,
        block_table,
        prefix_lens,
        cu_rows,
        mask,
        max_window,
        scale,
        out,
        holes,
    )
    if query.device.type == "cpu":
        from vllm_unmask.kernels.window_attention import cpu

        cpu.window_attention(*arguments)
    elif query.device.type == "cuda":
        from vllm_unmask.kernels.window_attention import triton

        triton.window_attention(*arguments)
    else:
        reference.window_attention(*arguments)
    return out


def write_kept(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write the keys and values of the rows that are kept to their slots, in place.

    Args:
        key: [rows, kv_heads, dim], last dimension contiguous.
        value: like `key`.
        key_cache: [pages, page, kv_heads, dim], any strides.
        value_cache: like `key_cache`.
        slot_mapping: int64 or int32 [rows], ``page number * page + offset``; negative
            for a row that is not kept. No slot twice.
    """
    if key.device.type == "cuda":
        from vllm_unmask.kernels.window_attention import triton_write

        triton_write.write_kept(key, value, key_cache, value_cache, slot_mapping)
    else:
        reference.write_kept(key, value, key_cache, value_cache, slot_mapping)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    mask: torch.Tensor,
    max_window: int,
    out: torch.Tensor,
) -> None:
    rows, heads, dim = query.shape
    kv_heads = key.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads")
    page = key_cache.shape[:2] + (kv_heads, dim)
    for name, tensor, shape in (
        ("key", key, (rows, kv_heads, dim)),
        ("value", value, (rows, kv_heads, dim)),
        ("key_cache", key_cache, page),
        ("value_cache", value_cache, page),
        ("out", out, (rows, heads, dim)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, query is {query.dtype}")
    if mask.dtype != torch.int32 or mask.shape[1] * 32 < max_window:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}, expected int32 words for "
            f"{max_window} rows"
        )
