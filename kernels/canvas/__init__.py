# SPDX-License-Identifier: Apache-2.0
"""A denoising step around the forward pass and the scores, on CPU tensors.

On a CPU these few hundred numbers cost what the calls to torch cost, so each
function here is one compiled loop. What they compute is defined in plain torch:
`vllm_unmask.decoding.blocks` has the same functions for every device.

The state of a canvas lives in request slots and is changed in place. Tensors:

* canvas: `ids` int64 [slots, 2 * block], `pending` bool [slots], `num_fixed`,
  `num_masks` and `step` int64 [slots] (see `vllm_unmask.decoding.canvas`)
* strategy: `num_steps` int64 [slots], `threshold` float32 [slots], `strict`
  bool [slots] (see `vllm_unmask.decoding.denoise`)
* `slots` int64 [requests], the slot of each request; no slot twice
* `width` int64 [requests], positions of the active block that the step computes

All of them are contiguous CPU tensors. Slots must be in range: nothing here
checks it. A tensor of another dtype or layout raises TypeError.
"""

import torch

from vllm_unmask.kernels.canvas import cpu
from vllm_unmask.kernels.canvas.cpu_step import greedy_step as _greedy_step
from vllm_unmask.kernels.row_statistics.cpu import layout_of

Canvas = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Strategy = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def write_inputs(
    canvas: Canvas,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    lead: torch.Tensor,
    input_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write the canvases to the ends of their queries and choose the logits rows.

    A canvas without a pending block starts `lead` tokens into its query, behind
    prompt tokens that are there already; one with a pending block fills it.

    Args:
        canvas: state of all slots, unchanged.
        slots: see above.
        query_start: int64 [requests], first row of each query.
        query_len: int64 [requests], more than `lead`.
        lead: int64 [requests], a multiple of the block.
        input_ids: int32 [rows], written.

    Returns:
        `width`; `num_open` int64 [requests], rows of the query whose KV is not final
        after this step; `logits_rows` int64 [requests * block], the active block's
        rows. A row past the query repeats its last one.
    """
    width = torch.empty_like(slots)
    num_open = torch.empty_like(slots)
    logits_rows = torch.empty((len(slots), canvas[0].shape[1] // 2), dtype=torch.int64)
    cpu.write_inputs(
        canvas[0].numpy(),
        canvas[1].numpy(),
        slots.numpy(),
        query_start.numpy(),
        query_len.numpy(),
        lead.numpy(),
        input_ids.numpy(),
        width.numpy(),
        num_open.numpy(),
        logits_rows.numpy(),
    )
    return width, num_open, logits_rows.view(-1)


def open_blocks(
    canvas: Canvas, slots: torch.Tensor, width: torch.Tensor, mask_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks being denoised and which of their positions are to be unmasked.

    Returns:
        `active` int64 and `masked` bool, both [requests, block].
    """
    shape = len(slots), canvas[0].shape[1] // 2
    active = torch.empty(shape, dtype=torch.int64)
    masked = torch.empty(shape, dtype=torch.bool)
    cpu.open_blocks(
        canvas[0].numpy(),
        canvas[1].numpy(),
        canvas[2].numpy(),
        slots.numpy(),
        width.numpy(),
        mask_id,
        active.numpy(),
        masked.numpy(),
    )
    return active, masked


def accept(
    canvas: Canvas,
    strategy: Strategy,
    slots: torch.Tensor,
    width: torch.Tensor,
    masked: torch.Tensor,
    confidence: torch.Tensor,
    order: torch.Tensor,
) -> torch.Tensor:
    """Positions to unmask: the threshold's choice and the schedule's floor.

    Args:
        canvas: state of all slots, unchanged.
        strategy: the rule of each slot.
        slots: see above.
        width: see above.
        masked: bool [requests, block].
        confidence: float32 [requests, block]; NaN passes no threshold.
        order: float32 [requests, block], higher first, not NaN; of equal ones the
            smallest position.

    Returns:
        bool [requests, block], a subset of `masked`; at least one position of
        every request that has a mask.
    """
    accepted = torch.empty_like(masked)
    cpu.accept(
        canvas[2].numpy(),
        canvas[3].numpy(),
        canvas[4].numpy(),
        strategy[0].numpy(),
        strategy[1].numpy(),
        strategy[2].numpy(),
        slots.numpy(),
        width.numpy(),
        masked.numpy(),
        confidence.numpy(),
        order.numpy(),
        accepted.numpy(),
    )
    return accepted


def close_blocks(
    canvas: Canvas,
    slots: torch.Tensor,
    width: torch.Tensor,
    active: torch.Tensor,
    mask_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Close one step: report a block that is complete, open the next one.

    Args:
        canvas: state of all slots, changed in place.
        slots: see above.
        width: see above; 0 when the step had no row for the active block.
        active: int64 [requests, block], the active blocks after acceptance.
        mask_id: the mask token.

    Returns:
        `tokens` int64 [requests, block], left aligned, arbitrary beyond their
        number, and `num_tokens` int64 [requests], 0 while masks remain.
    """
    tokens = torch.empty_like(active)
    num_tokens = torch.empty_like(slots)
    cpu.close_blocks(
        canvas[0].numpy(),
        canvas[1].numpy(),
        canvas[2].numpy(),
        canvas[3].numpy(),
        canvas[4].numpy(),
        slots.numpy(),
        width.numpy(),
        active.numpy(),
        mask_id,
        tokens.numpy(),
        num_tokens.numpy(),
    )
    return tokens, num_tokens


def greedy_step(
    canvas: Canvas,
    strategy: Strategy,
    slots: torch.Tensor,
    width: torch.Tensor,
    logits: torch.Tensor,
    read: torch.Tensor | None,
    mask_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole step of greedy requests that order by confidence, as one loop.

    What `open_blocks`, `row_statistics` (which bans the mask), `accept` and
    `close_blocks` do one after the other.

    Args:
        canvas: state of all slots, changed in place.
        strategy: the rule of each slot.
        slots: see above.
        width: see above.
        logits: bfloat16, float16 or float32 [n, vocab], n and vocab at least 1, the
            last dimension contiguous. Left as they are.
        read: int64 [n], the position of each row, request * block + column, of
            every masked one at least; None for all in order.
        mask_id: the mask token.

    Returns:
        As `close_blocks`.
    """
    block = canvas[0].shape[1] // 2
    tokens = torch.empty((len(slots), block), dtype=torch.int64)
    num_tokens = torch.empty_like(slots)
    if read is None:
        read = torch.arange(len(slots) * block)
    _greedy_step(
        canvas[0].numpy(),
        canvas[1].numpy(),
        canvas[2].numpy(),
        canvas[3].numpy(),
        canvas[4].numpy(),
        strategy[0].numpy(),
        strategy[1].numpy(),
        strategy[2].numpy(),
        slots.numpy(),
        width.numpy(),
        *layout_of(logits),
        read.numpy(),
        mask_id,
        tokens.numpy(),
        num_tokens.numpy(),
    )
    return tokens, num_tokens
