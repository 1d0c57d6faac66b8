# SPDX-License-Identifier: Apache-2.0
"""Requests that verify their own drafts (S2D2): their options, and what they learn."""

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_unmask.decoding import routing
from vllm_unmask.engine.states import BlockGeometry, put, select, take
from vllm_unmask.options import DecodingOptions

# Options that routing and acceptance read, as columns of a table of slots.
COLUMNS = (
    "route",
    "acceptance_estimate",
    "estimate_parameter",
    "verify_cost",
    "cost_per_token",
    "min_score",
    "score_on",
    "score_off",
    "min_span",
    "exploration",
    "tempering",
    "threshold",
)


class Memory(NamedTuple):
    """What policies remember of a request."""

    verified: torch.Tensor  # bool [slots]
    bandit: routing.Bandit


class Verifier:
    """Options and memory of every request slot that verifies.

    Args:
        max_num_reqs: request slots.
        geometry: the model's blocks.
        vocab_size: entries of a logits row.
        device: of the canvases.
        adaptive: whether the scheduler says when drafts are verified.
    """

    def __init__(
        self,
        max_num_reqs: int,
        geometry: BlockGeometry,
        vocab_size: int,
        device: torch.device,
        adaptive: bool,
    ) -> None:
        self.max_num_reqs = max_num_reqs
        self.geometry = geometry
        self.vocab_size = vocab_size
        self.adaptive = adaptive
        self.device = device
        self.options = np.zeros((max_num_reqs, len(COLUMNS)), np.float32)
        self.mine = np.zeros(max_num_reqs, np.bool_)
        # Of these, the ones that do so while the scheduler allows it, and are otherwise
        # requests of their rule alone.
        self.throttled = np.zeros(max_num_reqs, np.bool_)
        # Of this step: rows of the requests that verify, int64 [requests], and which of
        # all are throttled, bool [requests].
        self.now = np.zeros(0, np.int64)
        self.counted: np.ndarray[Any, Any] | None = None
        # Now, and when the open block was opened: a preempted request goes on from
        # there, as from its tokens.
        self.memory = self._new_memory(max_num_reqs)
        self.opened = self._new_memory(max_num_reqs)
        self.bucket = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        # bool [slots]: a draft waits for its verification.
        self.waiting = torch.zeros(max_num_reqs, dtype=torch.bool, device=device)
        # Drafts verified, positions in them, accepted, corrected, since last told.
        self.totals = torch.zeros(4, dtype=torch.int64, device=device)
        self.slots: dict[str, int] = {}
        self.left: OrderedDict[str, Memory] = OrderedDict()

    def _new_memory(self, count: int) -> Memory:
        return Memory(
            torch.zeros(count, dtype=torch.bool, device=self.device),
            routing.new_bandit(count, self.device),
        )

    def add_request(self, slot: int, req_id: str, options: DecodingOptions) -> None:
        """Take over a slot."""
        self.mine[slot] = "s2d2" in options.fillers
        always = options.value("route") == "always"
        self.throttled[slot] = self.adaptive and self.mine[slot] and not always
        if not self.mine[slot]:
            return
        kind = list(routing.ESTIMATES.values())
        parameter = kind[int(options.number("acceptance_estimate"))]
        # No score counts sure positions where the rule has no threshold.
        unset = {"estimate_parameter": parameter, "threshold": 1.0}
        self.options[slot] = [
            options.number(name, unset.get(name, 0)) for name in COLUMNS
        ]
        self.waiting[slot] = False
        self.slots[req_id] = slot
        where = torch.tensor([slot], device=self.device)
        memory = self.left.pop(req_id, None) or self._new_memory(1)
        put(self.memory, where, memory)
        put(self.opened, where, memory)

    def remove_request(self, req_id: str) -> None:
        """Forget a finished request; keep what a preempted one has learnt."""
        slot = self.slots.pop(req_id, None)
        if slot is None:
            return
        where = torch.tensor([slot], device=self.device)
        self.left[req_id] = take(self.opened, where)
        if len(self.left) > self.max_num_reqs:
            # Which of the two it is nobody says, so the oldest go.
            self.left.popitem(last=False)

    def reported(self, slots: torch.Tensor, done: torch.Tensor) -> None:
        """Blocks were reported: what comes next is a new block.

        Args:
            slots: int64 [requests] -> request slot.
            done: bool [requests].
        """
        now, before = take(self.memory, slots), take(self.opened, slots)
        put(self.opened, slots, select(done, now, before))

    def begin(self, slots_np: np.ndarray[Any, Any], may_draft: bool) -> None:
        """A step begins.

        Args:
            slots_np: int64 [requests] -> request slot, those that denoise.
            may_draft: whether throttled requests verify.
        """
        if not self.slots:
            self.now, self.counted = np.zeros(0, np.int64), None
            return
        mine = self.mine[slots_np]
        if self.adaptive:
            self.counted = self.throttled[slots_np]
            mine = mine if may_draft else mine & ~self.counted
        self.now = mine.nonzero()[0]

    def num_unmasked(self, accepted: torch.Tensor) -> int:
        """What throttled requests have unmasked in this step.

        Args:
            accepted: bool [requests, block].
        """
        if self.counted is None or not self.counted.any():
            return 0
        if not self.counted.all():
            accepted = accepted[torch.from_numpy(self.counted).to(accepted.device)]
        return int(accepted.sum())
