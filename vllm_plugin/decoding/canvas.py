# SPDX-License-Identifier: Apache-2.0
"""The canvas of a block-causal model: two blocks and what each forward means.

A request's canvas is ``[block | next block]``, both ``L`` wide, starting on the
block grid. Tokens are reported when the block holds no mask any more; its KV is
final only after a forward that saw those final ids. That forward is the one that
also denoises the next block, so the block is *pending* for one step:

* not pending: ``[block being denoised | masks]``
* pending:     ``[complete block, already reported | block being denoised]``

The *active* block is the one being denoised. A block's forward passes are
therefore exactly its denoising steps.
"""

from typing import NamedTuple

import torch


class Canvas(NamedTuple):
    """Canvas state of a batch of requests."""

    ids: torch.Tensor  # int64 [requests, 2 * block]
    pending: torch.Tensor  # bool [requests], first block awaits its final forward
    num_fixed: torch.Tensor  # int64 [requests], leading prompt ids of active block
    num_masks: torch.Tensor  # int64 [requests], masks when the block was opened
    step: torch.Tensor  # int64 [requests], denoising step of the active block


class Commit(NamedTuple):
    """What one step reports and how far the request moves."""

    tokens: torch.Tensor  # int64 [requests, block], left aligned
    num_tokens: torch.Tensor  # int64 [requests], 0 while masks remain
    advance: torch.Tensor  # int64 [requests], positions whose KV became final


def active_ids(canvas: Canvas) -> torch.Tensor:
    """Ids of the block being denoised, int64 [requests, block]."""
    first, second = canvas.ids.chunk(2, dim=1)
    return torch.where(canvas.pending.unsqueeze(1), second, first)


def advance(
    canvas: Canvas, active: torch.Tensor, width: torch.Tensor, mask_id: int
) -> tuple[Canvas, Commit]:
    """Close one step: report a block that is complete, open the next one.

    Args:
        canvas: state before the step.
        active: int64 [requests, block], the active block after acceptance.
        width: int64 [requests], positions of the active block inside the model
            length (``block``, fewer only in the last block); 0 when the step
            had no row for the active block.
        mask_id: the mask token.

    Returns:
        The next state and the ``Commit``.
    """
    block = active.shape[1]
    column = torch.arange(block, device=active.device)
    # Masks of the prompt, left of num_fixed, are not to be unmasked.
    open_ = (column >= canvas.num_fixed.unsqueeze(1)) & (column < width.unsqueeze(1))
    complete = (width > 0) & ~((active == mask_id) & open_).any(dim=1)

    num_tokens = torch.where(complete, width - canvas.num_fixed, 0)
    source = (column + canvas.num_fixed.unsqueeze(1)).clamp(max=block - 1)
    commit = Commit(
        tokens=active.gather(1, source),
        num_tokens=num_tokens,
        advance=canvas.pending.to(torch.int64) * block,
    )
    following = torch.full_like(active, mask_id)
    zero = torch.zeros_like(canvas.step)
    state = Canvas(
        # Whatever was pending is final now; the active block moves to the front.
        ids=torch.cat((active, following), dim=1),
        pending=complete,
        num_fixed=torch.where(complete, zero, canvas.num_fixed),
        num_masks=torch.where(complete, block, canvas.num_masks),
        step=torch.where(complete, zero, canvas.step + (width > 0)),
    )
    return state, commit


def stay(
    canvas: Canvas,
    slots: torch.Tensor,
    before: Canvas,
    active: torch.Tensor,
    stepped: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """Undo, in place, that a step was closed, where its block has to stay in place.

    It lies behind a block that was reported after the same forward, and stays there
    even if it is complete: the next forward makes the reported block's KV final.

    Args:
        canvas: state of all slots, after the step was closed.
        slots: int64 [requests] -> slot.
        before: state of these slots before that.
        active: int64 [requests, block], the active block after acceptance.
        stepped: bool [requests], whether the step counts.
        rows: bool [requests], which requests it is about.
    """
    first, _ = before.ids.chunk(2, dim=1)
    kept = before._replace(
        ids=torch.cat((first, active), dim=1), step=before.step + stepped
    )
    for field, value in zip(canvas, kept, strict=True):
        mine = rows.unsqueeze(1) if value.dim() > 1 else rows
        field[slots] = torch.where(mine, value, field[slots])
