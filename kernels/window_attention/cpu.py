# SPDX-License-Identifier: Apache-2.0
"""Window attention on a CPU: for each request a gather, two products and a softmax."""

import math

import torch

from vllm_unmask.kernels.window_attention.masks import unpack_mask


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
    bounds, prefixes = cu_rows.tolist(), prefix_lens.tolist()
    unseen = [(0, 0)] * len(prefixes) if holes is None else holes.tolist()
    hidden = ~unpack_mask(mask, max_window)
    # For all keys and values in turn: touching fresh memory costs as much as the copy.
    longest = max([0, *prefixes]) + max_window
    scratch = torch.empty(longest * kv_heads * dim, dtype=torch.float32)
    for request, prefix in enumerate(prefixes):
        rows = slice(bounds[request], bounds[request + 1])
        width = rows.stop - rows.start
        if prefix < 0 or not width:
            continue
        first, length = unseen[request]
        first = min(first, prefix)
        seen = [(0, first), (first + length, prefix + length)]
        end = prefix + length if first < prefix else prefix
        pages = block_table[request, : -(-end // key_cache.shape[1])].tolist()
        # One product for all the query heads that share a KV head.
        pairs = query[rows].view(width, kv_heads, group, dim).permute(1, 2, 0, 3)
        pairs = pairs.reshape(kv_heads, group * width, dim).float()
        keys = _gather(scratch, key_cache, pages, seen, key[rows])
        scores = torch.bmm(pairs, keys.permute(1, 2, 0)).mul_(scale)
        blind = hidden[rows, :width]
        window = scores.view(kv_heads, group, width, -1)[..., prefix:]
        window.masked_fill_(blind, -torch.inf)
        torch.softmax(scores, -1, out=scores)
        values = _gather(scratch, value_cache, pages, seen, value[rows])
        mixed = torch.bmm(scores, values.transpose(0, 1))
        mixed = mixed.view(kv_heads, group, width, dim)
        if not prefix:
            mixed.masked_fill_(blind.all(1, keepdim=True), 0)
        out[rows].view(width, kv_heads, group, dim).copy_(mixed.permute(2, 0, 1, 3))


def _gather(
    scratch: torch.Tensor,
    cache: torch.Tensor,
    pages: list[int],
    seen: list[tuple[int, int]],
    live: torch.Tensor,
) -> torch.Tensor:
    """The prefix, then the live rows: float32 [prefix + rows, kv_heads, dim].

    In the memory order of a page, whatever it is, so that whole runs are copied.

    Args:
        scratch: float32, memory for it.
        cache: [pages, page, kv_heads, dim].
        pages: of the request.
        seen: first positions of stretches of the cache, and those behind their ends.
        live: [rows, kv_heads, dim].
    """
    prefix = sum(end - first for first, end in seen)
    shape = (prefix + len(live), *live.shape[1:])
    order = sorted(range(3), key=lambda axis: -cache.stride(axis + 1))
    gathered = scratch[: math.prod(shape)].view([shape[axis] for axis in order])
    gathered = gathered.permute([order.index(axis) for axis in range(3)])
    page = cache.shape[1]
    place = 0
    for first, end in seen:
        while first < end:
            offset = first % page
            width = min(page - offset, end - first)
            run = cache[pages[first // page], offset : offset + width]
            gathered[place : place + width] = run
            place += width
            first += width
    gathered[prefix:] = live
    return gathered
