# SPDX-License-Identifier: Apache-2.0
"""Logits of a block under a grammar whose frontier stands in it."""

from functools import cache
from typing import Any

import numpy as np
import torch

from vllm_unmask.kernels.frontier import reference


def constrain_frontier(
    logits: torch.Tensor,
    rows: torch.Tensor,
    bitmask: torch.Tensor,
    silent_ids: torch.Tensor,
    block: int,
    count: int,
) -> torch.Tensor:
    """Ban, in place, what the grammars do not allow; return the frontiers' best tokens.

    A frontier takes the tokens of its bitmask only. The other positions of its block
    take everything but the silent tokens. Blocks without a frontier stay as they are.

    Args:
        logits: float32 [blocks * block, vocab], contiguous, without NaN.
        rows: int64 [frontiers], a row of ``logits`` each, in different blocks.
        bitmask: int32 [frontiers, at least ceil(vocab / 32)], contiguous; token ``i``
            is bit ``i % 32`` of word ``i // 32``, 1 if legal.
        silent_ids: int64 [silent], tokens that only a frontier may take.
        block: positions of a block.
        count: tokens to return for each frontier, at most ``vocab``.

    Returns:
        int64 [frontiers, count]: the legal tokens of largest logit, largest first, the
        smaller token first where they tie; -1 where there is none left above -inf.
    """
    if not logits.is_cpu:
        return reference.constrain_frontier(
            logits, rows, bitmask, silent_ids, block, count
        )
    best = np.empty((len(rows), count), np.int64)
    _cpu().constrain_frontier(
        logits.numpy(),
        rows.numpy(),
        bitmask.numpy(),
        silent_ids.numpy(),
        block,
        best,
    )
    return torch.from_numpy(best)


@cache
def _cpu() -> Any:
    """The CPU implementation; compiles when first imported."""
    from vllm_unmask.kernels.frontier import cpu

    return cpu
