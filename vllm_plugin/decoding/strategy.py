# SPDX-License-Identifier: Apache-2.0
"""What the slots of a strategy read: the open blocks, options and memory."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

# Per-request options by name, each [requests]: float32, choices as their index.
Parameters = Mapping[str, torch.Tensor]
# What a strategy remembers between the steps of a block, by name. Rows whose step is 0
# ignore what they are given: a new block.
State = dict[str, Any]


class Block(NamedTuple):
    """The open blocks of the requests, before the step."""

    ids: torch.Tensor  # int64 [requests, block]
    masked: torch.Tensor  # bool [requests, block], to be unmasked
    output: torch.Tensor  # bool [requests, block], neither prompt nor beyond the end
    live: torch.Tensor  # bool [requests, block], output that may still change
    num_masks: torch.Tensor  # int64 [requests], masks when the block was opened
    step: torch.Tensor  # int64 [requests], denoising step of the block
    stop_ids: torch.Tensor  # int64 [requests, n], padded with -1
    progress: torch.Tensor  # float32 [requests], share of max_tokens reported
    seeds: torch.Tensor  # int64 [requests]
    positions: torch.Tensor  # int64 [requests, block], absolute
    is_delimiter: torch.Tensor | None = None  # bool [vocab], for adablock
    injected: torch.Tensor | None = None  # bool [requests, block], seeded, not pinned
    # bool [requests, block], of `masked` what attention is ready for; None: all.
    reach: torch.Tensor | None = None


def integers(parameters: Parameters, name: str) -> torch.Tensor:
    """An option whose values are whole numbers or choices, int64 [requests]."""
    return parameters[name].long()


def is_stop(tokens: torch.Tensor, block: Block) -> torch.Tensor:
    """bool [requests, block]: the token ends its request."""
    return (tokens.unsqueeze(2) == block.stop_ids.unsqueeze(1)).any(dim=2)
