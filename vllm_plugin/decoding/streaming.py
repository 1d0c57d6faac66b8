# SPDX-License-Identifier: Apache-2.0
"""A streaming window under causal attention (WeDLM, Tencent).

The window is the ``W`` positions behind the output so far. A forward pass reads it in
an order of its own, *decided positions first, then masks*, each with its true
position, so that under a causal mask every mask sees every decided token, also those
to its right. After a step the leading run of decided tokens is output, and as many
masks follow at the window's end.

A forward pass begins with the tokens that the step before made output: in front of
them is nothing but the output before them, so their keys and values are final, and no
other of the window are.

State is a `canvas.Canvas` whose first ``W`` columns are the window; it is never
pending, and nothing of it is prompt.
"""

import torch

from vllm_unmask.decoding.acceptance import accept_top
from vllm_unmask.decoding.canvas import Canvas


def row_order(masked: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """The order in which a forward pass reads windows.

    Args:
        masked: bool [requests, W].
        width: int64 [requests], positions that are read.

    Returns:
        int64 [requests, W], place -> column: decided ones, masks, those not read;
        each from left to right.
    """
    column = torch.arange(masked.shape[1], device=masked.device)
    key = torch.where(column < width.unsqueeze(1), masked.long(), 2)
    return key.argsort(dim=1, stable=True)


def write_windows(
    windows: torch.Tensor,
    mask_id: int,
    first_row: torch.Tensor,
    width: torch.Tensor,
    start: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Write windows to a batch, in place.

    Args:
        windows: int64 [requests, W], ids by position.
        mask_id: the mask token.
        first_row: int64 [requests], row of the batch where each window begins.
        width: int64 [requests], rows that it has, 1 to W.
        start: int64 [requests], absolute position of each window.
        input_ids: int32 [rows].
        positions: int64 [rows].

    Returns:
        int64 [requests * W], the row of each position; of one that is not read the
        window's last row.
    """
    order = row_order(windows == mask_id, width)
    place = torch.arange(order.shape[1], device=order.device)
    # Where the window has no row, its last one is written once more.
    place = torch.minimum(place, width.unsqueeze(1) - 1)
    columns = order.gather(1, place)
    rows = first_row.unsqueeze(1) + place
    input_ids[rows] = windows.gather(1, columns).to(input_ids.dtype)
    positions[rows] = start.unsqueeze(1) + columns
    return rows.new_empty(rows.shape).scatter_(1, order, rows).view(-1)


def close_windows(
    canvas: Canvas,
    slots: torch.Tensor,
    width: torch.Tensor,
    active: torch.Tensor,
    mask_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Close one step: report the leading run, move the window behind it.

    Args:
        canvas: of all slots, changed in place.
        slots: int64 [requests] -> slot.
        width: int64 [requests], positions that the step had; 0 leaves a window as
            it was.
        active: int64 [requests, W], ids after acceptance.
        mask_id: the mask token.

    Returns:
        Tokens int64 [requests, W], and how many of them are reported, int64
        [requests].
    """
    column = torch.arange(active.shape[1], device=active.device)
    decided = (active != mask_id) & (column < width.unsqueeze(1))
    run = decided.long().cumprod(dim=1).sum(dim=1)
    masks = torch.full_like(active, mask_id)
    moved = torch.cat((active, masks), dim=1).gather(1, column + run.unsqueeze(1))
    canvas.ids[slots] = torch.cat((moved, masks), dim=1)
    canvas.step[slots] += width > 0
    return active, run


def accept_near(
    entropy: torch.Tensor,
    masked: torch.Tensor,
    bound: torch.Tensor,
    penalty: torch.Tensor,
) -> torch.Tensor:
    """A complete rule: low entropy, the lower the farther from the first mask (WeDLM).

    Accepted is ``H + penalty * distance < bound``, or else where that sum is least.

    Args:
        entropy: float32 [requests, W], nats.
        masked: bool [requests, W].
        bound: float32 [requests], nats; 0 unmasks one position a step.
        penalty: float32 [requests], nats a position.

    Returns:
        bool [requests, W], a subset of ``masked``; at least one position of every
        request that has a mask.
    """
    column = torch.arange(masked.shape[1], device=masked.device)
    distance = column - masked.int().argmax(dim=1, keepdim=True)
    doubt = entropy + penalty.unsqueeze(1) * distance
    least = accept_top(-doubt, masked, torch.ones_like(masked[:, 0], dtype=torch.int64))
    return least | (masked & (doubt < bound.unsqueeze(1)))
