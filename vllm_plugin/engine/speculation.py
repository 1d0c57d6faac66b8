# SPDX-License-Identifier: Apache-2.0
"""Self-speculation: several denoising steps of a request from one forward pass.

After a step, candidates for the outcomes of the next ones are drafted from its scores
(`decoding.drafting`). The next forward holds them in windows behind the canvas. When a
step's outcome is one of them, the next step is carried out at once, on that window's
logits, by the same code and with the same state as any other step. So the output is
that of the strategy without speculation, whatever the strategy, the sampling
parameters and the grammar are, as far as a row's logits do not depend on the batch.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_unmask.decoding import drafting
from vllm_unmask.decoding.drafting import Candidates
from vllm_unmask.decoding.regions import first_alone
from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.engine.denoising import Stepped, Stepper
from vllm_unmask.engine.rows import DenoisingRows, StepLogits
from vllm_unmask.engine.states import BlockGeometry
from vllm_unmask.engine.windows import Speculating, Windows
from vllm_unmask.options import DecodingOptions


class Drafts:
    """Candidates of every request slot.

    Args:
        max_num_reqs: request slots.
        geometry: the model's blocks.
        max_candidates: canvases of a request that a forward may check, its own
            included.
        to_verify: windows of a request that verifies.
        max_model_len: positions of a request.
        device: of the canvases.
    """

    def __init__(
        self,
        max_num_reqs: int,
        geometry: BlockGeometry,
        max_candidates: int,
        to_verify: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.geometry = geometry
        self.depth = max_candidates - 1
        self.to_verify = to_verify
        self.max_model_len = max_model_len
        self.device = device
        self.on_cpu = device.type == "cpu"
        self.any_held = False  # on the host: whether there may be candidates
        # Windows that a slot's request asks for, 0 for one that does not speculate.
        self.limit = np.zeros(max_num_reqs, np.int64)
        self.guesses = np.zeros(max_num_reqs, np.bool_)  # the windows hold candidates
        self.scheduled = np.zeros(max_num_reqs, np.bool_)
        # Every field: request slot -> value.
        self.candidates = Candidates(
            torch.zeros(
                (max_num_reqs, self.depth, geometry.block_length),
                dtype=torch.int64,
                device=device,
            ),
            *torch.zeros((3, max_num_reqs), dtype=torch.int64, device=device),
        )
        # bool: complete since a step on a window, reported by the next forward.
        self.closing = torch.zeros(max_num_reqs, dtype=torch.bool, device=device)
        self.any_closing = False  # on the host: whether there may be one
        # vLLM's draft tokens of all slots: by them the scheduler learns who waits.
        self.reports: torch.Tensor | None = None

    def add_request(self, slot: int, options: DecodingOptions) -> None:
        """Take over a slot."""
        self.guesses[slot] = "freedave" in options.fillers
        self.limit[slot] = self.to_verify if "s2d2" in options.fillers else 0
        if self.guesses[slot]:
            wanted = options.value("candidates") or self.depth + 1
            self.limit[slot] = min(wanted - 1, self.depth)
        # Of a plain rule without a threshold, the schedule says what comes.
        self.scheduled[slot] = "static" in options.fillers
        self.candidates.count[slot] = 0
        self.closing[slot] = False

    def locate(
        self, input_batch: InputBatch, pending: torch.Tensor, asynchronous: bool
    ) -> Windows | None:
        """Where the windows of a batch are, for the requests that speculate.

        The query of such a request is its canvas, ``[complete block | open block]`` or
        the open block alone, and then windows, as many as the scheduler gave it.

        Args:
            input_batch: vLLM's batch.
            pending: bool [slots], whether a complete block is in front.
            asynchronous: scheduling with a step in flight.
        """
        num_drafts = input_batch.num_draft_tokens_per_req
        if num_drafts is None or not self.limit.any():
            return None
        length = self.geometry.block_length
        slots_np = input_batch.idx_mapping_np
        if not self.any_held:
            # Without one no draft waits, and guesses need rows.
            guessing = asynchronous or self.guesses[slots_np].any()
            if not guessing or input_batch.num_scheduled_tokens.max() <= length:
                return None
        index_np = np.flatnonzero((self.limit[slots_np] > 0) & (num_drafts > 0))
        if not len(index_np):
            return None
        query_np = input_batch.num_scheduled_tokens[index_np]
        # A canvas behind the rest of its prompt comes without windows.
        prompt_np = query_np - num_drafts[index_np] >= length
        prompt_np &= not asynchronous
        if self.on_cpu:
            opened = pending.numpy()[slots_np[index_np]]
            room_np = query_np - (1 + opened) * length
            if ((room_np < length) | (prompt_np & ~opened)).all():
                # Guesses are about the block that was open when they were made.
                count = self.candidates.count.numpy()
                count[slots_np[index_np]] = 0
                self.any_held = bool(count.any())
                return None
        to_device = partial(async_tensor_h2d, device=self.device, dtype=torch.int64)
        slots = to_device(slots_np[index_np])
        first = to_device(input_batch.query_start_loc_np[index_np])
        query_len = to_device(query_np)
        canvas = torch.minimum((1 + pending[slots]) * length, query_len)
        behind = async_tensor_h2d(prompt_np, device=self.device) & ~pending[slots]
        canvas = torch.where(behind, query_len, canvas)
        room = (query_len - canvas) // length
        fitting = Candidates(*(field[slots] for field in self.candidates)).up_to(room)
        start = input_batch.positions[first] + canvas - length
        guesses = async_tensor_h2d(self.guesses[slots_np[index_np]], device=self.device)
        return Windows(
            index_np, first + canvas, query_len - canvas, start, fitting, ~guesses
        )

    def read(
        self, batch_index: np.ndarray[Any, Any], windows: Windows, batch: InputBatch
    ) -> tuple[Speculating, torch.Tensor]:
        """The windows' logits rows.

        Args:
            batch_index: int64 [requests] -> row of the batch, those that denoise.
            windows: of the batch.
            batch: vLLM's.
        """
        width = int(windows.candidates.count.max()) if self.on_cpu else self.depth
        rows = np.searchsorted(batch_index, windows.requests)
        logits_rows = windows.logits_rows(width, batch.num_tokens)
        return Speculating(rows, windows, width), logits_rows

    def hold(self, slots: torch.Tensor, ids: torch.Tensor, wait: torch.Tensor) -> None:
        """Have drafts verified by the next forward.

        Args:
            slots: int64 [requests] -> request slot.
            ids: int64 [requests, block], the blocks as drafted.
            wait: bool [requests], which of them.
        """
        windows = torch.full_like(
            self.candidates.ids[slots], self.geometry.mask_token_id
        )
        windows[:, 0] = ids
        none = torch.full_like(slots, -1)
        held = Candidates(windows, self.to_verify * wait, none, none)
        for kept, new in zip(self.candidates, held, strict=True):
            kept[slots] = new
        self.any_held = True
        if self.reports is not None:
            self.reports[slots, 0] = held.count

    def take_closing(self, slots: torch.Tensor) -> torch.Tensor | None:
        """Which blocks wait for nothing but their report, bool [requests].

        Args:
            slots: int64 [requests] -> request slot, those that denoise now.
        """
        if not self.any_closing:
            return None
        closing = self.closing[slots]
        self.closing[slots] = False
        return closing

    def follow(
        self,
        stepper: Stepper,
        speculating: Speculating,
        logits: torch.Tensor,
        rows: DenoisingRows,
        stepped: Stepped,
    ) -> Stepped:
        """Carry out the steps whose logits are there, and draft for the next forward.

        Args:
            stepper: carries out one step.
            speculating: the requests concerned.
            logits: [requests * width * block, vocab], of their windows.
            rows: all requests that denoise.
            stepped: what the step on the canvases has done.

        Returns:
            All steps of this forward together.
        """
        length, width = self.geometry.block_length, speculating.width
        index, candidates = speculating.rows, speculating.windows.candidates
        logits = logits.view(len(index), width, length, logits.shape[1])
        candidates = candidates._replace(ids=candidates.ids[:, :width])
        most = speculating.most
        mine = np.flatnonzero(self.guesses[rows.slots_np[index]])
        if len(mine) < len(index):
            of = async_tensor_h2d(mine, device=self.device)
            candidates = Candidates(*(field[of] for field in candidates))
            index, logits = index[mine], logits[of]
            most = most if most is None else most[of]
        if not len(mine):
            return stepped
        if stepper.tracer.concern(rows):
            stepper.tracer.candidates(rows.slots_np[index], candidates.count)
        where = async_tensor_h2d(index, device=self.device)
        slots, start = rows.slots[where], rows.start[where]
        canvas, counters = stepper.canvas, stepper.grammars.counters
        used = torch.zeros(logits.shape[:2], dtype=torch.bool, device=self.device)
        inside = closing = torch.zeros_like(slots, dtype=torch.bool)
        num_accepted = 0
        while width:
            found = drafting.find(
                candidates,
                used,
                stepper.open_blocks(slots)[0],
                canvas.ids[slots, :length],
                canvas.pending[slots],
            )
            if most is not None:
                found = found.where(stepped.num_steps[where] <= most, -1)
            chosen = np.flatnonzero((found >= 0).cpu().numpy())
            if not len(chosen):
                break
            num_accepted += len(chosen)
            which = async_tensor_h2d(chosen, device=self.device)
            opened = canvas.pending[slots[which]]
            begin = start[which] + torch.where(opened, length, 0)
            later = stepper.step(
                StepLogits(logits[which, found[which]].flatten(0, 1)),
                rows.choose(index[chosen], begin, length),
                opened=opened,
            )
            stepped = stepped.then(index[chosen], opened, later)
            used[which, found[which]] = True
            inside = inside.index_copy(0, which, opened)
            closing = closing.index_copy(0, which, opened & later.complete)
        counters.add("speculation_forwards", len(index))
        counters.add("speculation_drafted", int(candidates.count.sum()))
        counters.add("speculation_accepted", num_accepted)
        self.closing[slots] = closing
        self.any_closing = not self.on_cpu or bool(self.closing.any())
        pending = canvas.pending[slots]
        start = start + torch.where(pending, length, 0)
        assert stepped.scores is not None
        scores = Scores(*(x[where] for x in stepped.scores))
        # Logits of a next block that was opened behind another guess are no base for a
        # step, but one for a guess. Without any there is nothing to draft from.
        stale = pending & ~inside & (candidates.opening >= 0)
        stale &= candidates.opening < width
        chosen = np.flatnonzero(stale.cpu().numpy())
        if len(chosen):
            which = async_tensor_h2d(chosen, device=self.device)
            flat = logits[which, candidates.opening[which]].flatten(0, 1).float()
            flat[:, self.geometry.mask_token_id] = -torch.inf
            guessed = stepper.candidates.score(
                flat,
                start[which],
                rows.slots_np[index[chosen]],
                slots[which],
            )
            pairs = zip(scores, guessed, strict=True)
            scores = Scores(*(x.index_copy(0, which, y) for x, y in pairs))
        known = inside | stale | ~pending
        self._draft(stepper, rows.slots_np[index], slots, scores, known, start)
        return stepped

    def may_open(self, slots: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Whether the next block may be a candidate, bool [requests].

        Args:
            slots: int64 [requests] -> request slot.
            start: int64 [requests], absolute position of the open block.
        """
        return start + 2 * self.geometry.block_length <= self.max_model_len

    def _draft(
        self,
        stepper: Stepper,
        slots_np: np.ndarray[Any, Any],
        slots: torch.Tensor,
        scores: Scores,
        known: torch.Tensor,
        start: torch.Tensor,
    ) -> None:
        """Candidates for the next forward.

        Args:
            stepper: has the canvases.
            slots_np: int64 [requests] -> request slot.
            slots: the same on the device.
            scores: each tensor [requests, block], of the last step.
            known: bool [requests], whether these are of the open block.
            start: int64 [requests], absolute position of the open block.
        """
        length, mask_id = self.geometry
        ids, masked = stepper.open_blocks(slots)
        canvas, num_steps = stepper.canvas, stepper.states.strategy.num_steps
        total = torch.minimum(canvas.num_masks, length - canvas.num_fixed)[slots]
        scheduled = async_tensor_h2d(self.scheduled[slots_np], device=self.device)
        counts = drafting.schedule_counts(
            total, num_steps[slots], canvas.step[slots], self.depth
        )
        sure = drafting.sureness(scores.order, stepper.states.order.gpu[slots])
        if stepper.first_alone:
            alone = first_alone(masked, canvas.step[slots])
            sure = torch.where(alone, 1.0, sure)
            counts[:, 0] = torch.where(alone[:, 0], 1, counts[:, 0])
        limit = async_tensor_h2d(self.limit[slots_np], device=self.device)
        # A bad word may begin in the block before, which is not told yet.
        worded = [slot in stepper.bad_words.words for slot in slots_np.tolist()]
        may_open = self.may_open(slots, start)
        may_open &= ~torch.tensor(worded, device=self.device)
        # A block that is kept open for edits may still change.
        may_open &= masked.any(dim=1) | self.closing[slots]
        drafts = drafting.draft(
            ids,
            masked,
            scores.tokens,
            sure,
            counts * scheduled.unsqueeze(1),
            torch.where(known, limit, 0),
            may_open,
            mask_id,
            self.depth,
        )
        for kept, new in zip(self.candidates, drafts, strict=True):
            kept[slots] = new
        self.any_held = True
