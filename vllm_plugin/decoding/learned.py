# SPDX-License-Identifier: Apache-2.0
"""Slot *accept*: a small trained network that says which positions are final.

Learn2PD trains it on the confidences of whole blocks, so it belongs to one model
and one block length.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


class Filter(NamedTuple):
    """Two layers from the confidences of a block to a logit for each position."""

    weight_in: torch.Tensor  # float32 [hidden, block]
    bias_in: torch.Tensor  # float32 [hidden]
    weight_out: torch.Tensor  # float32 [block, hidden]
    bias_out: torch.Tensor  # float32 [block]


def load_filter(path: str | Path, block_length: int) -> Filter:
    """Read a filter from a safetensors file with the fields of `Filter`.

    Args:
        path: the file, as `save_filter` writes it.
        block_length: positions of a block of the model that is served.

    Returns:
        The filter on the CPU, in float32.

    Raises:
        ValueError: the file cannot be read, a tensor is missing, has another shape
            or is not finite.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"filter {path} cannot be read: {error}") from error
    missing = [name for name in Filter._fields if name not in tensors]
    if missing:
        raise ValueError(f"filter {path} has no tensor {', '.join(missing)}")
    result = Filter(*(tensors[name].float() for name in Filter._fields))
    hidden = result.bias_in.numel()
    shapes = (
        (hidden, block_length),
        (hidden,),
        (block_length, hidden),
        (block_length,),
    )
    for name, tensor, shape in zip(Filter._fields, result, shapes, strict=True):
        if tensor.shape != shape:
            raise ValueError(
                f"filter {path}: {name} has shape {tuple(tensor.shape)}, "
                f"expected {shape} for blocks of {block_length}"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"filter {path}: {name} is not finite")
    return result


def save_filter(path: str | Path, filter: Filter) -> None:
    """Write a filter to a safetensors file."""
    save_file({k: v.contiguous() for k, v in filter._asdict().items()}, path)


def accept_learned(
    confidence: torch.Tensor,
    masked: torch.Tensor,
    filter: Filter,
    threshold: torch.Tensor,
) -> torch.Tensor:
    """Every masked position that the filter takes for final (Learn2PD).

    Args:
        confidence: float32 [requests, block], of every position, revealed or not.
        masked: bool [requests, block].
        filter: the network, on the same device.
        threshold: float32 [requests], a probability; accepts with ``>``.

    Returns:
        bool [requests, block], a subset of ``masked``.
    """
    # Sums, not matrix products: those may round differently in another batch.
    hidden = (confidence.unsqueeze(1) * filter.weight_in).sum(dim=2) + filter.bias_in
    hidden = hidden.relu().unsqueeze(1)
    final = ((hidden * filter.weight_out).sum(dim=2) + filter.bias_out).sigmoid()
    return masked & (final > threshold.unsqueeze(1))
