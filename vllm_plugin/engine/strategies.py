# SPDX-License-Identifier: Apache-2.0
"""Strategies of the request slots, and what they remember between steps.

Requests of a plain strategy (static or threshold, nothing else) never come here: the
canvas operations carry it out for the whole batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_unmask.decoding.history import Stability
from vllm_unmask.decoding.learned import Filter
from vllm_unmask.decoding.strategy import Parameters, State
from vllm_unmask.engine.biases import changes_logits
from vllm_unmask.engine.states import BlockGeometry, each, put, select, take
from vllm_unmask.options import DecodingOptions, decoding_limits
from vllm_unmask.seeds import Seeds

# Not a filler that a request can name: its canvas starts with more than masks.
SEEDED = "seeded"
# Fillers that change how many steps a forward serves, and no step.
SPECULATION = frozenset({"freedave", "s2d2"})
# Filler -> what it remembers, as the functions of `decoding` call it.
_MEMORY = {
    "klass": ("stability",),
    "credit": ("credit",),
    "bacd": ("revealed",),
    "ccd": ("coherence",),
    "adablock": ("region_end",),
    "sched": ("previous",),
    "edit": ("post",),
    "remdm": ("at_reveal",),
    "rcr": ("at_reveal",),
}
_COLUMNS = tuple(
    name
    for name, limits in decoding_limits().items()
    if limits.kind not in ("strategy", "text")
)


class Group(NamedTuple):
    """The requests of a step that share a strategy."""

    fillers: frozenset[str]
    rows: np.ndarray[Any, Any]  # int64 [requests] -> row of the denoising batch
    where: torch.Tensor | None  # the same on the device; None: all, in order
    slots_np: np.ndarray[Any, Any]  # int64 [requests] -> request slot
    slots: torch.Tensor  # int64 [requests] -> request slot
    parameters: Parameters

    def take(self, batch: torch.Tensor) -> torch.Tensor:
        """The group's rows of a tensor of the denoising batch."""
        return batch if self.where is None else batch[self.where]

    def put(self, batch: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The batch with the group's rows replaced."""
        if self.where is None:
            return values
        return batch.index_copy(0, self.where, values)


def is_plain(options: DecodingOptions, seeds: Seeds | None) -> bool:
    """Whether the canvas operations carry out the whole of every step."""
    steps = options.fillers - SPECULATION
    return (
        len(steps) == 1
        and not steps.isdisjoint({"static", "threshold"})
        and options.value("step_sizes") == "linear"
        and seeds is None
    )


def is_greedy(options: DecodingOptions, params: SamplingParams) -> bool:
    """Whether a plain request's steps are `kernels.canvas.greedy_step`, no more.

    But for a grammar, which may still be asked for.
    """
    return (
        params.temperature == 0
        and not changes_logits(params)
        and SPECULATION.isdisjoint(options.fillers)
        and options.value("order") == "confidence"
        and options.answer_block_length is None
        and not options.trace
    )


def sub_block_length(options: DecodingOptions, block_length: int) -> int:
    """Positions of a part of a block."""
    return options.value("sub_block_length") or max(block_length // 4, 1)


class Strategies:
    """Strategies of every request slot that has more than a plain one.

    Args:
        max_num_reqs: request slots.
        geometry: the model's blocks.
        device: of the canvases.
        learned: the filter of the strategy `learned`, if there is one.
        delimiters: bool [vocab] by name of a delimiter; asked when first needed.
    """

    def __init__(
        self,
        max_num_reqs: int,
        geometry: BlockGeometry,
        device: torch.device,
        learned: Filter | None,
        delimiters: Callable[[str], torch.Tensor],
    ) -> None:
        self.max_num_reqs = max_num_reqs
        self.geometry = geometry
        self.device = device
        self.learned = learned
        self.delimiters = delimiters
        # Slots of the same number share their fillers; 0 is plain.
        self.kind = np.zeros(max_num_reqs, np.int64)
        # Request slot -> whether its steps read positions that are not masked.
        self.reads_all = np.zeros(max_num_reqs, np.bool_)
        # Request slot -> whether its steps are `kernels.canvas.greedy_step`.
        self.greedy = np.zeros(max_num_reqs, np.bool_)
        self.kinds: list[tuple[frozenset[str], str]] = [(frozenset(), "")]
        self.parameters = np.zeros((max_num_reqs, len(_COLUMNS)), np.float32)
        self.stop_ids = np.full((max_num_reqs, 1), -1, np.int64)
        self.max_tokens = np.ones(max_num_reqs, np.float32)
        self.num_prompt = np.zeros(max_num_reqs, np.int64)
        # Name -> tensors [slots, ...], made when first remembered.
        self.memory: State = {}
        # KLASS keeps whole distributions, so only for the slots that use it.
        self.distributions: dict[int, Stability] = {}
        self.settling: dict[str, int] = {}  # request id -> slot, of those

    def add_request(
        self,
        slot: int,
        req_id: str,
        options: DecodingOptions,
        params: SamplingParams,
        num_prompt: int,
        seeds: Seeds | None,
    ) -> None:
        """Take over a slot.

        Args:
            slot: the request slot.
            req_id: vLLM's name of the request.
            options: the request's decoding options.
            params: its sampling parameters.
            num_prompt: tokens of its prompt.
            seeds: what its canvases start with.
        """
        if "klass" in options.fillers:
            self.settling[req_id] = slot
        self.kind[slot] = 0
        plain, fillers = is_plain(options, seeds), options.fillers
        drafts = "freedave" in fillers
        self.reads_all[slot] = not plain or drafts or changes_logits(params)
        self.greedy[slot] = plain and is_greedy(options, params)
        if plain:
            return
        if seeds is not None:
            fillers = fillers | {SEEDED}
        kind = (fillers, options.value("delimiter") or "")
        if kind not in self.kinds:
            self.kinds.append(kind)
        self.kind[slot] = self.kinds.index(kind)
        length = self.geometry.block_length
        unset = {
            "steps": length,
            "sub_block_length": sub_block_length(options, length),
        }
        self.parameters[slot] = [
            options.number(name, unset.get(name, 0)) for name in _COLUMNS
        ]
        eos = params.eos_token_id
        stops = [*params.stop_token_ids, *([] if eos is None else [eos])]
        missing = len(stops) - self.stop_ids.shape[1]
        if missing > 0:
            wider = ((0, 0), (0, missing))
            self.stop_ids = np.pad(self.stop_ids, wider, constant_values=-1)
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(stops)] = stops
        self.max_tokens[slot] = params.max_tokens or 1
        self.num_prompt[slot] = num_prompt

    def remove_request(self, req_id: str) -> None:
        """Free what is too large to wait for the slot's next request."""
        self.distributions.pop(self.settling.pop(req_id, -1), None)

    def groups(self, slots_np: np.ndarray[Any, Any]) -> list[Group]:
        """The groups of a step; empty if all of its requests are plain.

        Args:
            slots_np: int64 [requests] -> request slot, the denoising requests.
        """
        kinds = self.kind[slots_np]
        if not kinds.any():
            return []
        return [
            self._group(slots_np, kinds, kind) for kind in np.unique(kinds[kinds > 0])
        ]

    def _group(
        self, slots_np: np.ndarray[Any, Any], kinds: np.ndarray[Any, Any], kind: int
    ) -> Group:
        rows = np.flatnonzero(kinds == kind)
        slots = slots_np[rows]
        where = None
        if len(rows) < len(slots_np):
            where = async_tensor_h2d(rows, device=self.device)
        columns = async_tensor_h2d(
            np.ascontiguousarray(self.parameters[slots].T), device=self.device
        )
        return Group(
            self.kinds[kind][0],
            rows,
            where,
            slots,
            async_tensor_h2d(slots, device=self.device, dtype=torch.int64),
            dict(zip(_COLUMNS, columns.unbind(0), strict=True)),
        )

    def looking_ahead(self, slots_np: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Rows of the requests that unmask in their next block, int64."""
        return np.flatnonzero(self._with("lookahead")[self.kind[slots_np]])

    def threshold_ahead(self, slots_np: np.ndarray[Any, Any]) -> torch.Tensor:
        """float32 [requests]: confidence that a token of the next block needs."""
        column = _COLUMNS.index("ahead_threshold")
        threshold = np.ascontiguousarray(self.parameters[slots_np, column])
        return async_tensor_h2d(threshold, device=self.device)

    def opens(self, slots_np: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """bool [requests]: the request's blocks start with more than masks."""
        either = self._with("lookahead") | self._with(SEEDED)
        return either[self.kind[slots_np]]

    def _with(self, filler: str) -> np.ndarray[Any, Any]:
        return np.array([filler in fillers for fillers, _ in self.kinds])

    def is_delimiter(self, group: Group) -> torch.Tensor | None:
        """bool [vocab], if the group's strategy looks for delimiters."""
        if "adablock" not in group.fillers:
            return None
        name = self.kinds[self.kind[group.slots_np[0]]][1]
        return self.delimiters(name)

    def recall(self, group: Group) -> State:
        """What the group remembers, for its rows."""
        state: State = {}
        for name in self._names(group):
            if name == "stability":
                state["stability"] = self._recall_distributions(group)
            elif name in self.memory:
                state[name] = take(self.memory[name], group.slots)
        return state

    def remember(
        self, group: Group, state: State, wait: torch.Tensor | None = None
    ) -> None:
        """Keep what the step left.

        Args:
            group: the requests.
            state: what the functions of `decoding` made of what was recalled.
            wait: bool [requests], whose step is carried out by the next forward: they
                remember what they did before it.
        """
        known = {} if wait is None else self.recall(group)
        for name, value in state.items():
            if wait is not None:
                before = known.get(name)
                if before is None:
                    before = each(torch.zeros_like, value)
                value = select(wait, before, value)
            if name == "stability":
                for slot, *row in zip(group.slots_np.tolist(), *value, strict=True):
                    self.distributions[slot] = Stability(*row)
                continue
            if name not in self.memory:
                self.memory[name] = each(
                    lambda x: x.new_zeros((self.max_num_reqs, *x.shape[1:])), value
                )
            put(self.memory[name], group.slots, value)

    def _names(self, group: Group) -> set[str]:
        return {name for filler in group.fillers for name in _MEMORY.get(filler, ())}

    def _recall_distributions(self, group: Group) -> Stability | None:
        known = [self.distributions.get(slot) for slot in group.slots_np.tolist()]
        some = next((row for row in known if row is not None), None)
        if some is None:
            return None
        # A slot without one is in the first step of its first block.
        rows = [row or Stability(*map(torch.zeros_like, some)) for row in known]
        return Stability(*map(torch.stack, zip(*rows, strict=True)))
