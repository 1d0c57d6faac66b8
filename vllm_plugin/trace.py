# SPDX-License-Identifier: Apache-2.0
"""What happened to every output token of a request, and two ways to look at it.

A request with `unmask_trace` brings a trace back in its answer's
`kv_transfer_params["unmask_trace"]`. A trace holds token ids; the functions that
draw one take `pieces`, the text of each id (`pieces_of` asks a tokenizer).
"""

import html
import json
import re
import textwrap
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_unmask.trace_format import (
    CHANGES,
    KINDS,
    VERSION,
    WRITES,
    Event,
    Forward,
    TokenTrace,
    Trace,
    held,
)

__all__ = [
    "CHANGES",
    "KINDS",
    "VERSION",
    "WRITES",
    "Event",
    "Forward",
    "TokenTrace",
    "Trace",
    "canvas_at",
    "columns",
    "pieces_of",
    "printable",
    "render_html",
    "render_terminal",
    "trace_of",
]

Pieces = Mapping[int, str]

_MASK = "░"
# One page with two gaps: its title and its data.
_PAGE = Path(__file__).with_name("trace.html")
_SIGNS = {
    "revealed": "+",
    "closed": "+",
    "accepted": "+",
    "edited": "~",
    "resampled": "!",
    "masked": "-",
}
# Black on a colour for what changed in a step.
_COLORS = {
    "seeded": "30;46",
    "revealed": "30;42",
    "edited": "30;43",
    "closed": "30;45",
    "accepted": "30;102",
    "resampled": "30;103",
    "masked": "30;41",
}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


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
    """The canvas after the denoising step `step`, one entry per output token.

    Returns:
        (token id or None for a mask, what happened in this very step or None). Of
        several events in the step it is the last that changed the position; only
        if none did, the last one.

    Raises:
        ValueError: the request had no such step.
    """
    if not 0 <= step < trace.num_steps:
        raise ValueError(f"step={step}: the trace has {trace.num_steps}, from 0 on")
    canvas = []
    for token in trace.tokens:
        past = [event for event in token.events if event.step <= step]
        kinds = [event.kind for event in past if event.step == step]
        changes = [kind for kind in kinds if kind in CHANGES]
        canvas.append((held(past), ([None] + kinds + changes)[-1]))
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

    In front: the step (with speculation behind a slash the forward pass that carried it
    out), and how many positions it revealed or accepted (+), resampled (!), edited (~)
    and masked again (-). A text wider than `width` columns is cut so that the step's
    first change stays in view.

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
        counts = [f"{s}{signs.count(s)}" for s in "+!~-" if s in signs]
        place = f"{at:>{number}}"
        if trace.forwards:
            place += f"/{trace.forward_of[at]:<{len(str(len(trace.forwards) - 1))}}"
        front = f"{place} {' '.join(counts):<8} "
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
