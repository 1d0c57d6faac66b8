# SPDX-License-Identifier: Apache-2.0
"""A denoising step around the forward pass, on canvases that live in slots.

These functions run on any device and define the step; on a CPU the engine calls
`vllm_unmask.kernels.canvas`, which has the same functions, each as one loop. Shapes
and dtypes are documented there.
"""

import torch

from vllm_unmask.decoding import denoise
from vllm_unmask.decoding.canvas import Canvas, active_ids, advance
from vllm_unmask.decoding.denoise import Strategy
from vllm_unmask.decoding.scoring import Scores


def write_inputs(
    canvas: Canvas,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    lead: torch.Tensor,
    input_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write the canvases to the ends of their queries and choose the logits rows."""
    ids = canvas.ids[slots]
    pending = canvas.pending[slots]
    block = ids.shape[1] // 2
    skipped = torch.where(pending, 0, lead)
    column = torch.arange(2 * block, device=ids.device)
    target = (query_start + skipped).unsqueeze(1) + column
    # Where the query has no row, its last column is written once more.
    last = (query_len - skipped - 1).unsqueeze(1)
    source = torch.minimum(column, last)
    rows = torch.minimum(target, (query_start + query_len - 1).unsqueeze(1))
    input_ids[rows] = ids.gather(1, source).to(input_ids.dtype)

    first = torch.where(pending, block, skipped)
    num_open = query_len - first
    offset = first.unsqueeze(1) + column[:block]
    offset = torch.minimum(offset, query_len.unsqueeze(1) - 1)
    logits_rows = (query_start.unsqueeze(1) + offset).view(-1)
    return num_open.clamp(0, block), num_open, logits_rows


def open_blocks(
    canvas: Canvas, slots: torch.Tensor, width: torch.Tensor, mask_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks being denoised and which of their positions are to be unmasked."""
    state = Canvas(*(field[slots] for field in canvas))
    active = active_ids(state)
    column = torch.arange(active.shape[1], device=active.device)
    # A mask token in the prompt is the user's: it stays what prefill saw.
    masked = (
        (active == mask_id)
        & (column >= state.num_fixed.unsqueeze(1))
        & (column < width.unsqueeze(1))
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
    """Positions to unmask: the threshold's choice and the schedule's floor."""
    return denoise.accept(
        Scores(confidence, confidence, order),
        masked,
        torch.minimum(canvas.num_masks[slots], width - canvas.num_fixed[slots]),
        canvas.step[slots],
        Strategy(*(field[slots] for field in strategy)),
    )


def close_blocks(
    canvas: Canvas,
    slots: torch.Tensor,
    width: torch.Tensor,
    active: torch.Tensor,
    mask_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Close one step: report a block that is complete, open the next one."""
    state = Canvas(*(field[slots] for field in canvas))
    following, commit = advance(state, active, width, mask_id)
    for field, value in zip(canvas, following, strict=True):
        field[slots] = value
    return commit.tokens, commit.num_tokens
