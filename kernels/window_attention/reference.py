# SPDX-License-Identifier: Apache-2.0
"""The definition of `vllm_unmask.kernels.window_attention`, in torch."""

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
    page = key_cache.shape[1]
    group = query.shape[1] // key.shape[1]
    bounds = cu_rows.tolist()
    for request, prefix in enumerate(prefix_lens.tolist()):
        if prefix < 0:
            continue
        rows = slice(bounds[request], bounds[request + 1])
        position = torch.arange(prefix, device=query.device)
        if holes is not None:
            first, length = holes[request].tolist()
            position = torch.where(position >= first, position + length, position)
        slots = block_table[request, position // page].long(), position % page
        keys = torch.cat((key_cache[slots], key[rows])).float()
        values = torch.cat((value_cache[slots], value[rows])).float()
        live = unpack_mask(mask[rows], rows.stop - rows.start)
        seen = torch.cat((live.new_ones(len(live), prefix), live), dim=1)
        scores = torch.einsum(
            "qhd,khd->hqk", query[rows].float(), keys.repeat_interleave(group, dim=1)
        )
        weights = (scores * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        weights = weights.masked_fill(~seen.any(1, keepdim=True), 0)
        mixed = torch.einsum(
            "hqk,khd->qhd", weights, values.repeat_interleave(group, dim=1)
        )
        out[rows] = mixed.to(out.dtype)


def write_kept(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Documented in the package."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept].long()
    place = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[place] = key[kept]
    value_cache[place] = value[kept]
