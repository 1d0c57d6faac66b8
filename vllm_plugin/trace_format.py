# SPDX-License-Identifier: Apache-2.0
"""The format of a trace: what happened to every output token of a request."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

VERSION = 1
# Events that put a token on the canvas; "masked" takes it away again. A verified draft
# is "accepted", or another token is "resampled" in its place.
WRITES = ("seeded", "revealed", "edited", "closed", "accepted", "resampled")
CHANGES = (*WRITES, "masked")
KINDS = (*CHANGES, "drafted", "verified", "committed")

_NOUNS = {
    int: "an integer, at least 0",
    str: "a string",
    list: "a list",
    float: "a finite number",
}


@dataclass(frozen=True)
class Event:
    """What happened to a position in the denoising step `step`, counted from 0."""

    step: int
    kind: str  # one of KINDS
    token_id: int | None = None  # given by WRITES and "drafted"
    # In the token, of the diffusion mode; given by "revealed", "edited", "drafted" and
    # "accepted".
    confidence: float | None = None


@dataclass(frozen=True)
class TokenTrace:
    """An output token and its events, in order of their steps."""

    token_id: int
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Forward:
    """One forward pass of a request that speculates."""

    # Denoising steps carried out on it; 0 if it only drafted, or told a block.
    steps: int
    drafted: int  # what it checked: candidates (freedave), drafted tokens (s2d2)
    accepted: int  # how many of these passed


@dataclass(frozen=True)
class Trace:
    """A request's output tokens with their events."""

    block_length: int
    mask_token_id: int
    strategy: str
    num_steps: int  # denoising steps
    tokens: tuple[TokenTrace, ...]
    # In order; none where every step is a forward pass, as without speculation.
    forwards: tuple[Forward, ...] = ()

    @classmethod
    def from_dict(cls, source: Any) -> "Trace":
        """Read the object that a server sends; keys that it does not know are left.

        Raises:
            ValueError: names what is missing, of a wrong type, or contradicts itself.
        """
        version = _field(source, "version", int, "trace")
        if version != VERSION:
            raise ValueError(f"trace.version={version}: this package reads {VERSION}")
        num_steps = _field(source, "num_steps", int, "trace")
        entries = _field(source, "tokens", list, "trace")
        return cls(
            block_length=_field(source, "block_length", int, "trace"),
            mask_token_id=_field(source, "mask_token_id", int, "trace"),
            strategy=_field(source, "strategy", str, "trace"),
            num_steps=num_steps,
            tokens=tuple(
                _token(entry, num_steps, f"trace.tokens[{i}]")
                for i, entry in enumerate(entries)
            ),
            forwards=_forwards(source, num_steps),
        )

    def to_dict(self) -> dict[str, Any]:
        """The object that `from_dict` reads."""
        tokens = [
            {"token_id": token.token_id, "events": [_written(e) for e in token.events]}
            for token in self.tokens
        ]
        written = {"version": VERSION, **asdict(self), "tokens": tokens}
        written["forwards"] = [asdict(forward) for forward in self.forwards]
        if not self.forwards:
            del written["forwards"]
        return written

    @property
    def token_ids(self) -> set[int]:
        """Every token that was on the canvas at some time."""
        ids = {token.token_id for token in self.tokens}
        events = [event for token in self.tokens for event in token.events]
        return ids | {e.token_id for e in events if e.token_id is not None}

    def count(self, kind: str) -> int:
        """Events of one kind, over all tokens."""
        return sum(e.kind == kind for token in self.tokens for e in token.events)

    @property
    def forward_of(self) -> list[int]:
        """Of every step the forward pass that carried it out, both counted from 0."""
        if not self.forwards:
            return list(range(self.num_steps))
        return [i for i, f in enumerate(self.forwards) for _ in range(f.steps)]

    @property
    def summary(self) -> str:
        """Tokens, forwards, tokens per forward, edits, masked again, in one line."""
        forwards, drafts = f"{self.num_steps} forwards", ""
        if self.forwards:
            forwards = f"{self.num_steps} steps in {len(self.forwards)} forwards"
            drafts = (
                f"{sum(f.drafted for f in self.forwards)} drafted, "
                f"{sum(f.accepted for f in self.forwards)} accepted, "
                f"{self.count('resampled')} resampled, "
            )
        number = len(self.forwards) or max(self.num_steps, 1)
        return (
            f"{self.strategy}: {len(self.tokens)} tokens, {forwards}, "
            f"{len(self.tokens) / number:.2f} tokens per forward, {drafts}"
            f"{self.count('edited')} edited, {self.count('masked')} masked again"
        )


def _written(event: Event) -> dict[str, Any]:
    given = {key: value for key, value in asdict(event).items() if value is not None}
    given["event"] = given.pop("kind")
    return given


def _field(source: Any, key: str, kind: type, where: str) -> Any:
    """`source[key]` if it is of this kind; ValueError names the key otherwise."""
    if not isinstance(source, Mapping):
        raise ValueError(f"{where} must be an object, got {reprlib.repr(source)}")
    if key not in source:
        raise ValueError(f"{where}.{key} is missing")
    value = source[key]
    right = isinstance(value, (int, float) if kind is float else kind)
    if isinstance(value, bool) or (kind is int and right and value < 0):
        right = False
    if not right or (isinstance(value, float) and not math.isfinite(value)):
        got = reprlib.repr(value)
        raise ValueError(f"{where}.{key} must be {_NOUNS[kind]}, got {got}")
    return value


def _forwards(source: Any, num_steps: int) -> tuple[Forward, ...]:
    if "forwards" not in source:
        return ()
    forwards = []
    for i, entry in enumerate(_field(source, "forwards", list, "trace")):
        where = f"trace.forwards[{i}]"
        names = ("steps", "drafted", "accepted")
        forwards.append(Forward(*(_field(entry, name, int, where) for name in names)))
        if forwards[-1].accepted > forwards[-1].drafted:
            raise ValueError(f"{where}: more accepted than drafted, {forwards[-1]}")
    total = sum(forward.steps for forward in forwards)
    if forwards and total != num_steps:
        raise ValueError(f"trace.forwards have {total} steps, not {num_steps}")
    return tuple(forwards)


def _token(source: Any, num_steps: int, where: str) -> TokenTrace:
    token_id = _field(source, "token_id", int, where)
    records = _field(source, "events", list, where)
    events = tuple(_event(e, f"{where}.events[{i}]") for i, e in enumerate(records))
    steps = [event.step for event in events]
    if steps != sorted(steps):
        raise ValueError(f"{where}.events are not in order: steps {steps}")
    if steps and steps[-1] >= num_steps:
        raise ValueError(f"{where}.events: step {steps[-1]} of {num_steps} steps")
    final = held(events)
    if events and final != token_id:
        raise ValueError(f"{where}.token_id={token_id}, but its events end at {final}")
    return TokenTrace(token_id, events)


def _event(source: Any, where: str) -> Event:
    kind = _field(source, "event", str, where)
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(f"{where}.event={reprlib.repr(kind)}: expected one of {known}")
    step = _field(source, "step", int, where)
    has_token = kind in (*WRITES, "drafted")
    token_id = _field(source, "token_id", int, where) if has_token else None
    given = source.get("confidence") is not None
    confidence = _field(source, "confidence", float, where) if given else None
    return Event(step, kind, token_id, confidence)


def held(events: Sequence[Event]) -> int | None:
    """The token on the canvas after these events; None is a mask."""
    last = next((e for e in reversed(events) if e.kind in CHANGES), None)
    return last.token_id if last else None
