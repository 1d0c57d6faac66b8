# SPDX-License-Identifier: Apache-2.0
"""What a denoising step reads: its requests, and the logits rows of each."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

if TYPE_CHECKING:
    from vllm_unmask.engine.grammar import GrammarRequest
    from vllm_unmask.engine.verification_step import Drafted
    from vllm_unmask.engine.windows import Speculating


class AheadRows(NamedTuple):
    """The requests that also read their next block."""

    rows: np.ndarray[Any, Any]  # int64 [requests] -> row of DenoisingRows
    width: torch.Tensor  # int64 [requests], positions of that block, 0..L


def read_ahead(
    looking: np.ndarray[Any, Any],
    num_open: torch.Tensor,
    end: torch.Tensor,
    length: int,
) -> tuple[AheadRows, torch.Tensor]:
    """The next blocks' logits rows, where the step forwards these blocks.

    Args:
        looking: int64 [n] -> row of the denoising requests.
        num_open: int64 [requests], rows from the open block on.
        end: int64 [requests], row after each query.
        length: positions of a block.
    """
    index = torch.from_numpy(looking).to(num_open.device)
    num_open, end = num_open[index].unsqueeze(1), end[index].unsqueeze(1)
    column = torch.arange(length, device=end.device)
    rows = torch.minimum(end - num_open + length + column, end - 1)
    width = (num_open.squeeze(1) - length).clamp(0, length)
    return AheadRows(looking, width), rows.view(-1)


class DenoisingRows(NamedTuple):
    """The requests of a step that denoise, and the logits rows they read."""

    batch_index: np.ndarray[Any, Any]  # int64 [requests] -> row of the batch
    slots_np: np.ndarray[Any, Any]  # int64 [requests] -> request slot
    slots: torch.Tensor  # int64 [requests] -> request slot
    width: torch.Tensor  # int64 [requests], positions of the active block, 0..L
    num_open: torch.Tensor  # int64 [requests], rows whose KV this step leaves open
    start: torch.Tensor  # int64 [requests], absolute position of the active block
    ahead: AheadRows | None  # None if no request looks ahead
    speculating: "Speculating | None"  # None if no request speculates
    # int64 [n] -> request * block + position, those that have logits; None for all.
    read: torch.Tensor | None = None
    # bool [requests, block], positions that have a row; None for all.
    forwarded: torch.Tensor | None = None

    def choose(
        self, index: np.ndarray[Any, Any], start: torch.Tensor, length: int
    ) -> "DenoisingRows":
        """Some of the requests, with a whole block each that nothing comes after.

        Args:
            index: int64 [n] -> row here.
            start: int64 [n], absolute position of their blocks.
            length: positions of a block.
        """
        where = async_tensor_h2d(index, device=self.slots.device)
        width = torch.full_like(where, length)
        return DenoisingRows(
            self.batch_index[index],
            self.slots_np[index],
            self.slots[where],
            width,
            width,
            start,
            None,
            None,
        )

    def positions(self, length: int) -> torch.Tensor:
        """Absolute positions of the active blocks, int64 [requests, block]."""
        column = torch.arange(length, device=self.start.device)
        return self.start.unsqueeze(1) + column


class StepLogits(NamedTuple):
    """Logits that a step reads."""

    # [requests * block, vocab], the open blocks, or of those the rows that are read.
    logits: torch.Tensor
    # [requests that look ahead * block, vocab], their next blocks.
    ahead: torch.Tensor | None = None
    drafted: "Drafted | None" = None  # of requests that verify


def positions_read(
    masked: np.ndarray[Any, Any], members: "list[tuple[int, GrammarRequest]]"
) -> np.ndarray[Any, Any] | None:
    """Positions that a step of plain requests reads, as `DenoisingRows.read`.

    Masks, and what a grammar may still take back. The head is a large part of a
    forward, and half of the positions of a block are known on average.

    Args:
        masked: bool [requests, block]; changed.
        members: rows of the requests that have a grammar, and these.
    """
    for row, request in members:
        first = 0 if request.state is None else request.frontier
        masked[row, min(first, masked.shape[1] - 1) :] = True
    read = np.flatnonzero(masked)
    return read if 0 < len(read) < masked.size else None
