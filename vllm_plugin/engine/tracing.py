# SPDX-License-Identifier: Apache-2.0
"""The trace of a request: which step did what to each of its tokens.

What a worker returns has no room for it. So the worker appends every block that it
reports to a file of the request's, and the scheduler, which sees the report later,
reads it.
"""

import atexit
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_unmask.decoding.scoring import Scores

if TYPE_CHECKING:
    from vllm_unmask.engine.grammar import Grammars
    from vllm_unmask.engine.openings import NextBlocks
    from vllm_unmask.engine.rows import DenoisingRows

logger = init_logger("vllm.vllm_unmask.engine.tracing")

VERSION = 1
# Where a response carries the trace: vLLM's field for what an engine adds to it.
TRACE_KEY = "unmask_trace"

Event = dict[str, Any]


def create_traces() -> str:
    """A directory for the traces of one server, gone when this process ends."""
    directory = tempfile.mkdtemp(prefix="vllm-unmask-traces-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _path(directory: str, req_id: str) -> Path:
    # A client may choose the request's name.
    return Path(directory, hashlib.sha256(req_id.encode()).hexdigest())


def read_trace(directory: str, req_id: str, token_ids: list[int]) -> dict[str, Any]:
    """The trace of the tokens that a request has reported.

    Args:
        directory: of the traces.
        req_id: vLLM's name of the request.
        token_ids: its output.

    Returns:
        ``num_steps`` and ``tokens``, as documented in `vllm_unmask.trace`, and
        ``forwards`` of a request that speculates.
    """
    path = _path(directory, req_id)
    lines = path.read_text().splitlines() if path.exists() else []
    events: list[list[Event]] = []
    forwards: list[dict[str, int]] = []
    num_steps = 0
    for line in lines:
        # With a step in flight there may be a block more than was asked for.
        if len(events) < len(token_ids):
            block = json.loads(line)
            events += block["tokens"]
            forwards += block["forwards"]
            num_steps = block["step"] + 1
    tokens = [
        {"token_id": token, "events": of_token}
        for token, of_token in zip(token_ids, events, strict=False)
    ]
    if not forwards:
        return {"num_steps": num_steps, "tokens": tokens}
    # The last forward may have gone on in the block after these.
    beyond = sum(forward["steps"] for forward in forwards) - num_steps
    for name in ("steps", "accepted"):
        forwards[-1][name] -= beyond
    return {"num_steps": num_steps, "forwards": forwards, "tokens": tokens}


def forget_trace(directory: str, req_id: str) -> None:
    """Remove what was kept of a request."""
    _path(directory, req_id).unlink(missing_ok=True)


class Record:
    """What happened to the open block of a request, and to the next one."""

    def __init__(self, path: Path, length: int, step: int, speculates: bool) -> None:
        self.path = path
        self.step = step
        self.speculates = speculates
        self.open: list[list[Event]] = [[] for _ in range(length)]
        self.ahead: list[list[Event]] = [[] for _ in range(length)]
        # Of the forward under way, and of those since the last block was reported.
        self.steps = self.drafted = self.accepted = 0
        self.forwards: list[dict[str, int]] = []
        self.block: dict[str, Any] | None = None  # reported in this forward

    def report(self, fixed: int, width: int) -> None:
        """Close the open block, and open the next one."""
        for events in self.open[fixed:width]:
            events.append({"step": self.step, "event": "committed"})
        self.block = {"step": self.step, "tokens": self.open[fixed:width]}
        following = self.open[width:] + self.ahead
        self.open = following[: len(self.ahead)]
        self.ahead = [[] for _ in self.open]

    def end_forward(self) -> None:
        """Append the block that was reported, if any, to the file."""
        if self.speculates:
            names = ("steps", "drafted", "accepted")
            self.forwards.append({name: getattr(self, name) for name in names})
        self.steps = self.drafted = self.accepted = 0
        if self.block is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(self.block | {"forwards": self.forwards}) + "\n")
            self.block, self.forwards = None, []


class Tracer:
    """Traces of the request slots that asked for one.

    Args:
        directory: of the traces.
        writes: whether this worker is the one whose outputs are read.
        block_length: positions of a block.
        mask_id: the mask token.
    """

    def __init__(
        self, directory: str, writes: bool, block_length: int, mask_id: int
    ) -> None:
        self.directory = directory
        self.writes = writes
        self.length, self.mask_id = block_length, mask_id
        self.records: dict[int, Record] = {}

    def add_request(
        self, slot: int, req_id: str, traced: bool, speculates: bool
    ) -> None:
        """Take over a slot."""
        self.records.pop(slot, None)
        if traced and self.writes and not Path(self.directory).is_dir():
            logger.warning("No trace of %s: %s is not here.", req_id, self.directory)
        elif traced and self.writes:
            path = _path(self.directory, req_id)
            step = self._last_step(path)
            self.records[slot] = Record(path, self.length, step, speculates)

    def _last_step(self, path: Path) -> int:
        """Of the last block that the request reported before a preemption, or -1."""
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else -1

    def concern(self, rows: "DenoisingRows") -> bool:
        """Whether any of the requests is traced."""
        return not self.records.keys().isdisjoint(rows.slots_np.tolist())

    def candidates(self, slots_np: np.ndarray[Any, Any], count: torch.Tensor) -> None:
        """Note the candidates, int64 [requests], of the forward under way."""
        for slot, drafted in zip(slots_np.tolist(), count.tolist(), strict=True):
            if slot in self.records:
                self.records[slot].drafted += drafted

    def end_forward(self, rows: "DenoisingRows") -> None:
        """All steps of a forward have been noted."""
        if not self.records:
            return
        for slot in rows.slots_np.tolist():
            if slot in self.records:
                self.records[slot].end_forward()

    def observe(
        self,
        rows: "DenoisingRows",
        before: torch.Tensor,
        after: torch.Tensor,
        scores: Scores,
        checked: torch.Tensor | None,
        on_candidate: bool,
        width: torch.Tensor,
        closing: torch.Tensor | None,
        num_fixed: torch.Tensor,
        num_tokens: torch.Tensor,
        grammars: "Grammars",
        following: "NextBlocks | None",
    ) -> None:
        """Note one step.

        Args:
            rows: the requests that denoise.
            before: int64 [requests, block], the open blocks before the step.
            after: int64 [requests, block], and after it.
            scores: each tensor [requests, block]; confidence is that of the
                diffusion mode in what was unmasked or edited.
            checked: int64 [requests, block], drafts that were verified, -1 elsewhere.
            on_candidate: whether the logits are those of a candidate.
            width: int64 [requests], positions of the blocks; 0 without a part in it.
            closing: bool [requests], blocks that were complete before the step.
            num_fixed: int64 [requests], leading prompt positions of the blocks.
            num_tokens: int64 [requests], reported in this step.
            grammars: of all slots.
            following: what was unmasked ahead.
        """
        none = [-1] * self.length
        for row, slot in enumerate(rows.slots_np.tolist()):
            record = self.records.get(slot)
            end = int(width[row])
            if record is None or end == 0:
                continue
            counts = closing is None or not closing[row]
            record.step += counts
            record.steps += counts
            record.accepted += on_candidate
            fixed, reported = int(num_fixed[row]), int(num_tokens[row])
            drafts = none if checked is None else checked[row].tolist()
            columns = zip(
                before[row].tolist(),
                after[row].tolist(),
                drafts,
                scores.tokens[row].tolist(),
                scores.confidence[row].tolist(),
                strict=True,
            )
            request = grammars.requests.get(slot)
            closed = bool(request and request.num_forced)
            for column, of_column in enumerate(columns):
                if fixed <= column < end:
                    self._note(record, column, *of_column, closed)
            if request is not None:
                verified = fixed + reported if reported else request.frontier
                for events in record.open[fixed:verified]:
                    if all(event["event"] != "verified" for event in events):
                        events.append({"step": record.step, "event": "verified"})
            if following is not None and not reported:
                self._note_ahead(record, slot, following)
            if reported:
                record.report(fixed, fixed + reported)

    def _note(
        self,
        record: Record,
        column: int,
        old: int,
        new: int,
        draft: int,
        token: int,
        confidence: float,
        closed: bool,
    ) -> None:
        """Note a position.

        Args:
            record: of its request.
            column: where it is in the block.
            old: before the step.
            new: after it.
            draft: what was verified, or -1.
            token: what the step wanted there.
            confidence: as in ``observe``.
            closed: whether a grammar completes the output.
        """
        events, step = record.open[column], record.step
        sure = {"confidence": round(confidence, 6)}
        if old != self.mask_id and not events:
            events.append({"step": step, "event": "seeded", "token_id": old})
        if draft >= 0:
            drafted = {"step": step, "event": "drafted", "token_id": draft}
            events.append(drafted | sure)
            record.drafted += 1
        if new == old:
            return
        if new == self.mask_id:
            events.append({"step": step, "event": "masked"})
            return
        kind = "revealed"
        if old != self.mask_id:
            kind = "edited"
        elif closed:
            kind, sure = "closed", {}
        elif new == draft:
            kind = "accepted"
            record.accepted += 1
        elif draft >= 0 and new == token:
            kind, sure = "resampled", {}
        events.append({"step": step, "event": kind, "token_id": new} | sure)

    def _note_ahead(self, record: Record, slot: int, following: "NextBlocks") -> None:
        for column, token, sure in following.unmasked(slot):
            record.ahead[column].append(
                {
                    "step": record.step,
                    "event": "revealed",
                    "token_id": token,
                    "confidence": round(sure, 6),
                }
            )
