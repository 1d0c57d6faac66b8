# SPDX-License-Identifier: Apache-2.0
"""Per-slot decoding state of the requests a worker holds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor

from vllm_unmask.decoding import blocks
from vllm_unmask.decoding.canvas import Canvas
from vllm_unmask.decoding.denoise import NEVER, Strategy
from vllm_unmask.decoding.scoring import ORDERS
from vllm_unmask.options import DecodingOptions


def _canvas_kernels() -> Any:
    """The CPU implementation of ``decoding.blocks``; compiles when first imported."""
    from vllm_unmask.kernels import canvas

    return canvas


def each(function: Callable[..., torch.Tensor], *values: Any) -> Any:
    """A function of tensors, applied to named tuples of them field by field."""
    if isinstance(values[0], torch.Tensor):
        return function(*values)
    fields = zip(*values, strict=True)
    return type(values[0])(*(each(function, *field) for field in fields))


def take(kept: Any, slots: torch.Tensor) -> Any:
    """Rows of tensors [slots, ...]; ``slots`` int64 [requests]."""
    return each(lambda x: x[slots], kept)


def put(kept: Any, slots: torch.Tensor, values: Any) -> None:
    """Replace rows of tensors [slots, ...], in place."""
    each(lambda x, new: x.index_copy_(0, slots, new.to(x.dtype)), kept, values)


def select(where: torch.Tensor, yes: Any, no: Any) -> Any:
    """Of each request the one or the other.

    Args:
        where: bool [requests].
        yes: a tensor [requests, ...], or named tuples of such.
        no: the same.
    """

    def choose(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where(where.view(-1, *[1] * (a.dim() - 1)), a, b)

    return each(choose, yes, no)


class BlockGeometry(NamedTuple):
    """What a family tells the engine about its blocks and special ids."""

    block_length: int
    mask_token_id: int


class CanvasStates:
    """Canvas and strategy of every request slot, on the device.

    Slots are vLLM's request slots. ``add_request`` overwrites all of a slot, so
    a request never sees what its predecessor left.
    """

    def __init__(
        self, max_num_reqs: int, geometry: BlockGeometry, device: torch.device
    ) -> None:
        self.geometry = geometry
        self.device = device
        length = geometry.block_length
        # Every field: request slot -> value.
        self.canvas = Canvas(
            ids=torch.full(
                (max_num_reqs, 2 * length), geometry.mask_token_id, device=device
            ),
            pending=torch.zeros(max_num_reqs, dtype=torch.bool, device=device),
            num_fixed=torch.zeros(max_num_reqs, dtype=torch.int64, device=device),
            num_masks=torch.zeros(max_num_reqs, dtype=torch.int64, device=device),
            step=torch.zeros(max_num_reqs, dtype=torch.int64, device=device),
        )
        # Host-written, mirrored to the device by apply_staged_writes.
        self.num_steps = UvaBackedTensor(max_num_reqs, dtype=torch.int64)
        self.threshold = UvaBackedTensor(max_num_reqs, dtype=torch.float32)
        self.strict = UvaBackedTensor(max_num_reqs, dtype=torch.bool)
        self.order = UvaBackedTensor(max_num_reqs, dtype=torch.int64)
        self.raw_confidence = UvaBackedTensor(max_num_reqs, dtype=torch.bool)
        # What a denoising step does around the forward pass.
        self.ops = _canvas_kernels() if device.type == "cpu" else blocks

    def add_request(self, slot: int, tail: list[int], options: DecodingOptions) -> None:
        """Open a block.

        Args:
            slot: the request slot.
            tail: known tokens that the block begins with.
            options: the request's decoding options.
        """
        length, mask_id = self.geometry
        masks = [mask_id] * (2 * length - len(tail))
        self.canvas.ids[slot] = async_tensor_h2d(
            [*tail, *masks], device=self.device, dtype=torch.int64
        )
        self.canvas.pending[slot] = False
        self.canvas.num_fixed[slot] = len(tail)
        self.canvas.num_masks[slot] = length - len(tail)
        self.canvas.step[slot] = 0

        # Of the plain strategies, static and threshold; `Strategies` has the others.
        threshold = options.value("threshold")
        self.num_steps.np[slot] = options.value("steps") or length
        self.threshold.np[slot] = NEVER if threshold is None else threshold
        self.strict.np[slot] = bool(options.value("strict"))
        self.order.np[slot] = ORDERS.index(options.value("order"))
        self.raw_confidence.np[slot] = options.value("confidence_from") == "raw"

    def apply_staged_writes(self) -> None:
        """Send the host-written fields to the device."""
        for field in (
            self.num_steps,
            self.threshold,
            self.strict,
            self.order,
            self.raw_confidence,
        ):
            field.copy_to_uva()

    def gather(self, slots: torch.Tensor) -> Canvas:
        """Canvas of the given slots, int64 [requests] -> slot."""
        return Canvas(*(field[slots] for field in self.canvas))

    @property
    def strategy(self) -> Strategy:
        """Acceptance rule of every slot."""
        return Strategy(self.num_steps.gpu, self.threshold.gpu, self.strict.gpu)

    def orders_used(self, slots: np.ndarray[Any, Any]) -> frozenset[int]:
        """The order indices that occur among the slots (host side)."""
        return frozenset(self.order.np[slots].tolist())
