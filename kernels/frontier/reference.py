# SPDX-License-Identifier: Apache-2.0
"""The definition of `vllm_unmask.kernels.frontier`, in torch."""

import torch


def constrain_frontier(
    logits: torch.Tensor,
    rows: torch.Tensor,
    bitmask: torch.Tensor,
    silent_ids: torch.Tensor,
    block: int,
    count: int,
) -> torch.Tensor:
    """Documented in the package."""
    vocab = logits.shape[1]
    frontier = logits[rows]
    blocks = logits.view(-1, block, vocab)
    blocks[(rows // block).unsqueeze(1), :, silent_ids] = -torch.inf
    bit = torch.arange(32, dtype=torch.int32, device=logits.device)
    legal = (bitmask.unsqueeze(2) >> bit) & 1
    frontier.masked_fill_(legal.flatten(1)[:, :vocab] == 0, -torch.inf)
    logits[rows] = frontier
    # A stable sort, because torch leaves open which of equal values comes first.
    top = frontier.sort(dim=1, descending=True, stable=True)
    best = top.indices[:, :count]
    return torch.where(top.values[:, :count] > -torch.inf, best, -1)
