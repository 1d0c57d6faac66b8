# SPDX-License-Identifier: Apache-2.0
"""Windows: rows of a forward pass that hold other ids than their places in the cache.

A request that speculates asks for more rows than its canvas has. Behind the open block
they are cut into *windows* of one block each, which hold candidates of that block, or
the next block as it starts. A window sees the request's cache up to the open block,
itself, and the candidate that it follows: a mask, which `kernels.window_attention`
carries out beside the platform's own attention. Their keys and values go to cache slots
past the canvas that nothing reads, because the rows are rejected in every step.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_unmask.decoding.drafting import Candidates
from vllm_unmask.kernels.window_attention import window_attention
from vllm_unmask.kernels.window_attention.masks import (
    candidates_mask,
    pack_masks,
    s2d2_mask,
)

# Those whose cache `_cache_views` knows.
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
# Where attention metadata carries the windows of a batch.
ATTRIBUTE = "unmask_windows"


class Windows(NamedTuple):
    """The windows of a batch: where they lie and what they see."""

    requests: np.ndarray[Any, Any]  # int64 [requests] -> row of the batch
    first_row: torch.Tensor  # int64 [requests], row of the first window, rising
    num_rows: torch.Tensor  # int64 [requests], rows from there to the query's end
    start: torch.Tensor  # int64 [requests], absolute position of the open block
    candidates: Candidates  # what they hold, no more than there is room for
    verifies: torch.Tensor  # bool [requests], a draft to be verified

    def logits_rows(self, width: int, num_tokens: int) -> torch.Tensor:
        """Rows of the first ``width`` windows, int64 [requests * width * block]."""
        length = self.candidates.ids.shape[2]
        column = torch.arange(width * length, device=self.first_row.device)
        rows = self.first_row.unsqueeze(1) + column
        return rows.clamp(max=num_tokens - 1).view(-1)


class Speculating(NamedTuple):
    """The denoising requests of a step that speculate."""

    rows: np.ndarray[Any, Any]  # int64 [requests] -> row of the denoising requests
    windows: Windows
    width: int  # windows of each that have logits
    # int64 [requests], steps that may be carried out on windows; None for all.
    most: torch.Tensor | None = None
    # bool [requests], whose windows have the row before their block; None for nobody's.
    whole: torch.Tensor | None = None


class WindowMetadata(NamedTuple):
    """Arguments of `window_attention` for a batch.

    Between the windows of two requests lie rows that the platform's attention has
    done; they count as requests that are skipped.
    """

    block_table: torch.Tensor  # int32 [segments, pages]
    prefix_lens: torch.Tensor  # int32 [segments], -1 to skip
    cu_rows: torch.Tensor  # int32 [segments + 1]
    mask: torch.Tensor  # int32 [rows, words]
    max_window: int
    holes: torch.Tensor | None = None  # int32 [segments, 2]


def write_windows(
    windows: Windows, input_ids: torch.Tensor, positions: torch.Tensor
) -> None:
    """Put ids and positions of the windows into the batch, in place.

    Args:
        windows: of the batch.
        input_ids: int32 [rows].
        positions: int64 [rows], absolute.
    """
    window, column, request = _places(windows, len(positions))
    ids, count, opening, _ = windows.candidates
    behind = window >= 0
    inside = behind & (window < count[request])
    window = window.clamp(0, ids.shape[1] - 1)
    # Rows without a candidate hold some token that there is.
    values = ids[request, window, column].where(inside, 0).to(input_ids.dtype)
    input_ids.copy_(torch.where(behind, values, input_ids))
    place = windows.start[request] + column
    place += torch.where(window == opening[request], ids.shape[2], 0)
    positions.copy_(torch.where(inside, place.to(positions.dtype), positions))


def _places(
    windows: Windows, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row its window, -1 without one, the column in it, and the request."""
    length = windows.candidates.ids.shape[2]
    row = torch.arange(num_rows, device=windows.first_row.device)
    # First rows rise, so the last one that is not past a row is its request's.
    request = torch.searchsorted(windows.first_row, row, right=True) - 1
    known = request >= 0
    request = request.clamp(min=0)
    offset = row - windows.first_row[request]
    within = known & (offset < windows.num_rows[request])
    window = torch.where(within, offset // length, -1)
    return window, offset.clamp(min=0) % length, request


def window_rows(windows: Windows, num_rows: int) -> torch.Tensor:
    """Which rows of the batch are behind a canvas, bool [rows]."""
    return _places(windows, num_rows)[0] >= 0


def window_metadata(
    windows: Windows, block_table: torch.Tensor, num_rows: int
) -> WindowMetadata:
    """What attention needs to know of the windows.

    Args:
        windows: of the batch.
        block_table: int32 [batch, pages].
        num_rows: rows of the batch.
    """
    ids, count, opening, leader = windows.candidates
    depth, length = ids.shape[1:]
    device = block_table.device
    first = windows.first_row
    bounds = torch.stack((first, first + count * length), dim=1).view(-1)
    cu_rows = torch.nn.functional.pad(bounds, (1, 0)).to(torch.int32)
    # A next block without a candidate in front follows the open block itself.
    prefix = windows.start + torch.where((opening >= 0) & (leader < 0), length, 0)
    prefix = torch.where(count > 0, prefix, -1)
    prefix_lens = torch.stack((torch.full_like(prefix, -1), prefix), dim=1).view(-1)
    requests = async_tensor_h2d(windows.requests.repeat(2), device=device)

    window, column, request = _places(windows, num_rows)
    own = _own_masks(length, depth).to(device)
    mask = own[(window * length + column).clamp(0, len(own) - 1)]
    # The next block also sees the complete candidate that it follows.
    led = (window == opening[request]) & (leader[request] >= 0)
    front = own[leader[request].clamp(min=0) * length]
    mask = torch.where(led.unsqueeze(1), mask | front, mask)
    draft = _draft_masks(length, depth).to(device)
    row = (window * length + column).clamp(0, len(draft) - 1)
    mask = torch.where(windows.verifies[request].unsqueeze(1), draft[row], mask)
    return WindowMetadata(
        block_table[requests],
        prefix_lens.to(torch.int32),
        cu_rows,
        mask,
        depth * length,
    )


@cache
def _own_masks(length: int, depth: int) -> torch.Tensor:
    """Rows that see their own window, int32 [depth * length, words]."""
    return pack_masks([candidates_mask(length, depth)])


@cache
def _draft_masks(length: int, depth: int) -> torch.Tensor:
    """Rows of a draft and of masks that verify it, int32 [2 * length or less, words].

    A draft is causal, with or without masks behind it.
    """
    mask = torch.zeros((depth * length, depth * length), dtype=torch.bool)
    rows = min(depth, 2) * length
    mask[:rows, :rows] = s2d2_mask(length)[:rows, :rows]
    return pack_masks([mask])[:rows]


def attend_in_windows(model: nn.Module) -> None:
    """Make the attention layers of a model carry out the windows of a batch.

    Raises:
        ValueError: the platform has chosen a backend whose cache we do not know.
    """
    for layer in model.modules():
        if isinstance(layer, Attention):
            name = layer.attn_backend.get_name()
            if name not in BACKENDS:
                raise ValueError(
                    f"Self-speculation cannot read the KV cache of {name}: start the "
                    'server with --additional-config \'{"unmask": {"max_candidates": '
                    f"1}}}}', or with --attention-backend {BACKENDS[-1]}"
                )
            impl_cls: Any = type(layer.impl)
            layer.impl.__class__ = _windowed(impl_cls)


@cache
def _windowed(impl_cls: Any) -> Any:
    """The implementation of a backend, followed by windows where there are any.

    A subclass, so that what the backend asks of its own implementation still holds.
    """

    class WindowedAttention(impl_cls):
        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            result = super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                *args, **kwargs,
            )  # fmt: skip
            windows = getattr(attn_metadata, ATTRIBUTE, None)
            if windows is not None:
                num_rows = windows.mask.shape[0]
                window_attention(
                    query[:num_rows],
                    key[:num_rows],
                    value[:num_rows],
                    *_cache_views(kv_cache),
                    windows.block_table,
                    windows.prefix_lens,
                    windows.cu_rows,
                    windows.mask,
                    windows.max_window,
                    self.scale,
                    output.view(query.shape)[:num_rows],
                    windows.holes,
                )
            return result

    WindowedAttention.__name__ = WindowedAttention.__qualname__ = impl_cls.__name__
    return WindowedAttention


def _cache_views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a cache [pages, kv_heads, page, 2 * dim], as the operator
    takes them."""
    pages, heads, page, width = kv_cache.shape
    dim = width // 2
    if kv_cache.device.type != "cpu":
        keys, values = kv_cache.transpose(1, 2).split(dim, dim=-1)
        return keys, values
    # vLLM's CPU kernels keep a page's keys transposed, before its values.
    keys, values = kv_cache.view(pages, heads, 2, page * dim).unbind(2)
    keys = keys.view(pages, heads, dim, page).permute(0, 3, 1, 2)
    return keys, values.view(pages, heads, page, dim).transpose(1, 2)
