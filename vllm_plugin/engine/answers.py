# SPDX-License-Identifier: Apache-2.0
"""Shorter blocks for the answer (TCCF of TDAR, LuLuLuyi/TDAR).

A request may have long blocks until its output contains a text, and short ones behind
the block in which that happened. The canvas stays as long as it is: attention cuts it
into *parts* that see what precedes them and themselves, and only the leftmost part with
a mask is unmasked. That is decoding in short blocks: what a part sees is final, as the
parts before it are complete and are forwarded with it.

Whether the text is there is known to the device alone when the next step is planned.
So a request that may come to it has rows as short as its parts from the start, and how
far a row sees is decided on the device.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_unmask.decoding.delimiter import follow
from vllm_unmask.decoding.regions import sub_block
from vllm_unmask.engine.attention import Parts
from vllm_unmask.engine.states import BlockGeometry
from vllm_unmask.engine.strategy_data import Delimiters
from vllm_unmask.options import DecodingOptions

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_unmask.engine.rows import DenoisingRows

# Past every position.
_NEVER = 1 << 40


class _Searched(NamedTuple):
    """A text that outputs are searched for."""

    text: str
    table: torch.Tensor  # of `delimiter.transitions`


class Answers:
    """Parts of every request slot.

    Args:
        max_num_reqs: request slots.
        geometry: the model's blocks.
        device: of the canvases.
        delimiters: has the tables of texts.
    """

    def __init__(
        self,
        max_num_reqs: int,
        geometry: BlockGeometry,
        device: torch.device,
        delimiters: Delimiters,
    ) -> None:
        self.block_length = geometry.block_length
        self.device = device
        self.delimiters = delimiters
        # Slot -> positions of a part; the block length without shorter ones.
        self.length = np.full(max_num_reqs, self.block_length, np.int64)
        # Slot -> position before which there is no part, known from the start.
        self.long = np.zeros(max_num_reqs, np.int64)
        self.searched: dict[int, _Searched] = {}  # slot -> what it is searched for
        # Slot -> how much of the text its output ends with.
        self.state = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        # Slot -> position from which blocks are short.
        self.start = torch.full_like(self.state, _NEVER)

    def add_request(
        self, slot: int, options: DecodingOptions, token_ids: list[int], num_prompt: int
    ) -> None:
        """Take over a slot.

        Args:
            slot: the request slot.
            options: the request's decoding options.
            token_ids: its prompt, and its output from before a preemption.
            num_prompt: tokens of its prompt.
        """
        length = self.block_length
        self.searched.pop(slot, None)
        self.length[slot] = options.answer_block_length or length
        if self.length[slot] == length:
            return
        text = options.value("answer_after")
        table = self.delimiters.table(text)
        self.searched[slot] = _Searched(text, table)
        state, start = 0, _NEVER
        output = torch.tensor(token_ids[num_prompt:], dtype=torch.int64)
        for place, to in enumerate(table[output.to(table.device)].tolist()):
            state = to[state]
            if state == table.shape[1] - 1:
                start = ((num_prompt + place) // length + 1) * length
                break
        self.state[slot], self.start[slot] = state, start
        self.long[slot] = min(start, len(token_ids) // length * length)

    def _any(self, slots_np: np.ndarray[Any, Any]) -> bool:
        """Whether any of the slots has parts."""
        if not self.searched:
            return False
        return bool((self.length[slots_np] < self.block_length).any())

    def locate(self, batch: "InputBatch") -> Parts | None:
        """Where the rows of a batch are cut shorter; None for nowhere."""
        slots_np = batch.idx_mapping_np[: batch.num_reqs]
        if not self._any(slots_np):
            return None
        slots = async_tensor_h2d(slots_np, device=self.device, dtype=torch.int64)
        query_len = batch.num_scheduled_tokens[: batch.num_reqs]
        # An upper bound: rows that are shorter than they need be do no harm.
        begin = batch.seq_lens_cpu_upper_bound[: batch.num_reqs].numpy() - query_len
        long = np.maximum(self.long[slots_np] - begin, 0)
        long = long // self.block_length * self.block_length
        return Parts(self.length[slots_np], long, self.start[slots])

    def reach(self, rows: "DenoisingRows", masked: torch.Tensor) -> torch.Tensor | None:
        """Masked positions that may be unmasked now; None for all of them.

        Args:
            rows: the requests of a step.
            masked: bool [requests, block].
        """
        if not self._any(rows.slots_np):
            return None
        part = async_tensor_h2d(self.length[rows.slots_np], device=self.device)
        short = rows.start >= self.start[rows.slots]
        return sub_block(masked, torch.where(short, part, self.block_length))

    def observe(
        self, rows: "DenoisingRows", tokens: torch.Tensor, num_tokens: torch.Tensor
    ) -> None:
        """Search what a step reports.

        Args:
            rows: the requests of the step.
            tokens: int64 [requests, block], left aligned.
            num_tokens: int64 [requests].
        """
        if not self._any(rows.slots_np):
            return
        by_text: dict[str, tuple[torch.Tensor, list[int]]] = {}
        for row, slot in enumerate(rows.slots_np.tolist()):
            if self.length[slot] < self.block_length:
                text, table = self.searched[slot]
                by_text.setdefault(text, (table, []))[1].append(row)
        for table, members in by_text.values():
            index = async_tensor_h2d(np.array(members), device=self.device)
            slots = rows.slots[index]
            state = follow(self.state[slots], tokens[index], num_tokens[index], table)
            found = state == table.shape[1] - 1
            start = torch.where(found, rows.start[index] + self.block_length, _NEVER)
            self.state[slots] = state
            self.start[slots] = torch.minimum(self.start[slots], start)
