# SPDX-License-Identifier: Apache-2.0
"""What happened to every output token of a request, and two ways to look at it.

A request with `unmask_trace` brings a trace back in its answer's
`kv_transfer_params["unmask_trace"]`. A trace holds token ids; the functions that
draw one take `pieces`, the text of each id (`pieces_of` asks a tokenizer).
"""

import html
import json
import math
import re
import reprlib
import textwrap
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VERSION = 1
# Events that put a token on the canvas; "masked" takes it away again.
WRITES = ("seeded", "revealed", "edited", "closed")
CHANGES = (*WRITES, "masked")
KINDS = (*CHANGES, "verified", "committed")

Pieces = Mapping[int, str]

_MASK = "░"
# One page with two gaps: its title and its data.
_PAGE = Path(__file__).with_name("trace.html")
_SIGNS = {"revealed": "+", "closed": "+", "edited": "~", "masked": "-"}
# Black on a colour for what changed in a step.
_COLORS = dict(zip(CHANGES, ("30;46", "30;42", "30;43", "30;45", "30;41"), strict=True))
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_NOUNS = {
    int: "an integer, at least 0",
    str: "a string",
    list: "a list",
    float: "a finite number",
}


@dataclass(frozen=True)
class Event:
    """What happened to a position in the forward pass `step`, counted from 0."""

    step: int
    kind: str  # one of KINDS
    token_id: int | None = None  # given by WRITES
    confidence: float | None = None  # given by "revealed" and "edited"


@dataclass(frozen=True)
class TokenTrace:
    """An output token and its events, in order of their steps."""

    token_id: int
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Trace:
    """A request's output tokens with their events."""

    block_length: int
    mask_token_id: int
    strategy: str
    num_steps: int
    tokens: tuple[TokenTrace, ...]

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
        )

    def to_dict(self) -> dict[str, Any]:
        """The object that `from_dict` reads."""
        tokens = [
            {"token_id": token.token_id, "events": [_written(e) for e in token.events]}
            for token in self.tokens
        ]
        return {"version": VERSION, **asdict(self), "tokens": tokens}

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
    def summary(self) -> str:
        """Tokens, forwards, tokens per forward, edits, masked again, in one line."""
        return (
            f"{self.strategy}: {len(self.tokens)} tokens, {self.num_steps} forwards, "
            f"{len(self.tokens) / max(self.num_steps, 1):.2f} tokens per forward, "
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


def _token(source: Any, num_steps: int, where: str) -> TokenTrace:
    token_id = _field(source, "token_id", int, where)
    records = _field(source, "events", list, where)
    events = tuple(_event(e, f"{where}.events[{i}]") for i, e in enumerate(records))
    steps = [event.step for event in events]
    if steps != sorted(steps):
        raise ValueError(f"{where}.events are not in order: steps {steps}")
    if steps and steps[-1] >= num_steps:
        raise ValueError(f"{where}.events: step {steps[-1]} of {num_steps} forwards")
    final = _held(events)
    if events and final != token_id:
        raise ValueError(f"{where}.token_id={token_id}, but its events end at {final}")
    return TokenTrace(token_id, events)


def _event(source: Any, where: str) -> Event:
    kind = _field(source, "event", str, where)
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(f"{where}.event={reprlib.repr(kind)}: expected one of {known}")
    step = _field(source, "step", int, where)
    token_id = _field(source, "token_id", int, where) if kind in WRITES else None
    given = source.get("confidence") is not None
    confidence = _field(source, "confidence", float, where) if given else None
    return Event(step, kind, token_id, confidence)


def _held(events: Sequence[Event]) -> int | None:
    """The token on the canvas after these events; None is a mask."""
    last = next((e for e in reversed(events) if e.kind in CHANGES), None)
    return last.token_id if last else None


def trace_of(output: Any) -> Trace | None:
    """The trace that came with an answer; None if it was not asked for.

    Args:
        output: vLLM's `RequestOutput`, an object of the OpenAI client, or such an
            answer or a trace itself as parsed JSON.

    Raises:
        ValueError: there is one, but it is not valid.
    """
    if isinstance(output, Mapping):
        if "tokens" in output and "num_steps" in output:
            return Trace.from_dict(output)
        carried = output.get("kv_transfer_params")
    else:
        carried = getattr(output, "kv_transfer_params", None)
    source = carried.get("unmask_trace") if isinstance(carried, Mapping) else None
    return None if source is None else Trace.from_dict(source)


def canvas_at(trace: Trace, step: int) -> list[tuple[int | None, str | None]]:
    """The canvas after the forward `step`, one entry per output token.

    Returns:
        (token id or None for a mask, what happened in this very step or None). Of
        several events in the step it is the last that changed the position; only
        if none did, the last one.

    Raises:
        ValueError: the request had no such forward.
    """
    if not 0 <= step < trace.num_steps:
        raise ValueError(f"step={step}: the trace has {trace.num_steps}, from 0 on")
    canvas = []
    for token in trace.tokens:
        past = [event for event in token.events if event.step <= step]
        kinds = [event.kind for event in past if event.step == step]
        changes = [kind for kind in kinds if kind in CHANGES]
        canvas.append((_held(past), ([None] + kinds + changes)[-1]))
    return canvas


def pieces_of(trace: Trace, decode: Callable[[list[int]], str]) -> dict[int, str]:
    """The text of every token id in a trace, with the spaces in front of words.

    Many tokenizers drop the space of a text's first word, so each id is decoded
    behind itself. An id whose bytes are no complete character decodes to U+FFFD.
    """
    return {i: decode([i, i])[len(decode([i])) :] for i in sorted(trace.token_ids)}


def columns(text: str) -> int:
    """Terminal columns that a line takes; ANSI colours take none."""
    wide = {"W": 2, "F": 2}
    return sum(
        wide.get(unicodedata.east_asian_width(character), 1)
        for character in _ANSI.sub("", text)
        if not unicodedata.combining(character)
    )


def printable(text: str) -> str:
    """A text on one line, without anything that would move the cursor."""
    text = text.replace("\n", "↵")
    return "".join(c if c.isprintable() else "·" for c in text)


def render_terminal(
    trace: Trace,
    pieces: Pieces,
    *,
    width: int = 80,
    color: bool = False,
    step: int | None = None,
) -> str:
    """One line per step, the text so far with ░ for a mask, and a summary.

    In front: the step, and how many positions it revealed (+), edited (~) and masked
    again (-). A text wider than `width` columns is cut so that the step's first
    change stays in view.

    Args:
        trace: what to show.
        pieces: the text of each token id.
        width: columns of a line.
        color: highlight what changed, with ANSI colours.
        step: show this step alone.

    Raises:
        ValueError: the request had no such step.
    """
    lines = []
    number = len(str(trace.num_steps - 1))
    for at in range(trace.num_steps) if step is None else [step]:
        canvas = canvas_at(trace, at)
        signs = [_SIGNS.get(kind or "") for _, kind in canvas]
        counts = [f"{s}{signs.count(s)}" for s in "+~-" if s in signs]
        front = f"{at:>{number}} {' '.join(counts):<8} "
        lines.append(front + _window(canvas, trace, pieces, width - len(front), color))
    return "\n".join([*lines, *textwrap.wrap(printable(trace.summary), max(width, 20))])


def _window(
    canvas: list[tuple[int | None, str | None]],
    trace: Trace,
    pieces: Pieces,
    room: int,
    color: bool,
) -> str:
    """The part of a canvas that fits into `room` columns."""
    touched = [i for i, (token, kind) in enumerate(canvas) if token is not None or kind]
    masks = [i for i, (token, _) in enumerate(canvas) if token is None]
    # Masks far behind the text are left out, up to a block of them is shown.
    ends = [i + 1 for i in touched] + [i + trace.block_length for i in masks[:1]]
    end = max(ends, default=0)
    cells = [
        _MASK if token is None else printable(pieces.get(token) or f"<{token}>")
        for token, _ in canvas[:end]
    ]
    kinds = [kind for _, kind in canvas[:end]]
    changed = [i for i, kind in enumerate(kinds) if kind in CHANGES]
    sizes = [columns(cell) for cell in cells]
    start, left = 0, sum(sizes)
    first = min(changed, default=end)
    while start < first and left + (start > 0) > room:
        left -= sizes[start]
        start += 1
    line, used = ("…", 1) if start else ("", 0)
    for i in range(start, len(cells)):
        last = i + 1 == len(cells)
        if used + sizes[i] + (not last) > room:
            return line + "…"
        used += sizes[i]
        style = _COLORS.get(kinds[i] or "", "2" if cells[i] == _MASK else "")
        line += f"\x1b[{style}m{cells[i]}\x1b[0m" if color and style else cells[i]
    return line


def render_html(trace: Trace, pieces: Pieces, title: str) -> str:
    """One page that shows the canvas step by step; it loads nothing from elsewhere.

    What comes from the model is data only: the page's script writes it as text.

    Args:
        trace: what to show.
        pieces: the text of each token id; others than the trace's are left out.
        title: plain text.
    """
    known = {i: pieces[i] for i in sorted(trace.token_ids) if i in pieces}
    data = {"trace": trace.to_dict(), "pieces": known, "summary": trace.summary}
    # ASCII without "<" cannot end the script element or start a comment in it.
    text = json.dumps(data).replace("<", "\\u003c")
    head, middle, tail = _PAGE.read_text(encoding="utf-8").split("@@")
    return head + html.escape(title) + middle + text + tail
