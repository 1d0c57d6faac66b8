# SPDX-License-Identifier: Apache-2.0
"""Traces: what is read, what the canvas was, and the two ways to draw it."""

import json
import re
import subprocess
import sys
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion
from trace_samples import PIECES, answer, event, sample, stub_server

from vllm_unmask.trace import (
    CHANGES,
    KINDS,
    WRITES,
    Trace,
    canvas_at,
    columns,
    pieces_of,
    render_html,
    render_terminal,
    trace_of,
)

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>",
    "\"'`&lt;&amp;\\u003c",
    "\u202e right to left \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f469\u200d\U0001f680",
    "\x1b[31mred\x07\x00\r",
    "line\u2028and\u2029paragraph",
    "@@",
    "",
]
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@st.composite
def histories(draw: st.DrawFn) -> tuple[dict[str, Any], list[list[tuple]]]:
    """A trace, and the canvas after each of its steps as it was while drawn."""
    num_steps = draw(st.integers(1, 6))
    boards: list[list[tuple]] = [[] for _ in range(num_steps)]
    tokens = []
    for _ in range(draw(st.integers(0, 8))):
        held, events = None, []
        for step in range(num_steps):
            happened = None
            kinds = draw(st.lists(st.sampled_from(KINDS), max_size=2))
            last = step == num_steps - 1
            if last and not {*kinds[-1:]} & {*WRITES}:
                kinds.append("revealed")
            for kind in kinds:
                if kind == "drafted":
                    draft = draw(st.integers(0, len(HOSTILE)))
                    events.append(event(step, kind, draft, draw(st.floats(0, 1))))
                elif kind in WRITES:
                    held = draw(st.integers(0, len(HOSTILE)))
                    events.append(event(step, kind, held, draw(st.floats(0, 1))))
                else:
                    held = None if kind == "masked" else held
                    events.append(event(step, kind))
                if kind in CHANGES or happened not in CHANGES:
                    happened = kind
            boards[step].append((held, happened))
        tokens.append({"token_id": held, "events": events})
    head = {"version": 1, "block_length": draw(st.integers(0, 4)), "mask_token_id": 99}
    if draw(st.booleans()):
        ends = draw(st.lists(st.integers(0, num_steps), max_size=4))
        bounds = [0, *sorted(ends), num_steps]
        accepted = draw(st.integers(0, 3))
        drafted = accepted + draw(st.integers(0, 3))
        head["forwards"] = [
            {"steps": end - start, "drafted": drafted, "accepted": accepted}
            for start, end in zip(bounds, bounds[1:], strict=False)
        ]
    return {
        **head,
        "strategy": draw(st.sampled_from(["static", *HOSTILE])),
        "num_steps": num_steps,
        "tokens": tokens,
    }, boards


texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=6))
pieces = st.dictionaries(st.integers(0, len(HOSTILE)), texts)


@given(histories())
def test_canvas_replays_the_events(history) -> None:
    source, boards = history
    trace = Trace.from_dict(json.loads(json.dumps(source)))
    assert [canvas_at(trace, step) for step in range(trace.num_steps)] == boards
    assert [token for token, _ in boards[-1]] == [t.token_id for t in trace.tokens]
    for before, after in zip(boards, boards[1:], strict=False):
        for (old, _), (new, kind) in zip(before, after, strict=True):
            assert old == new or kind in CHANGES


@given(histories())
def test_written_and_read_again(history) -> None:
    trace = Trace.from_dict(history[0])
    assert trace.to_dict() == history[0]
    assert Trace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace


def test_keys_of_a_later_server_are_left() -> None:
    source = sample() | {"later": 1}
    source["tokens"][0] |= {"later": 1}
    source["tokens"][0]["events"][0] |= {"later": 1}
    assert Trace.from_dict(source) == Trace.from_dict(sample())


@pytest.mark.parametrize("step", [-1, 4])
def test_no_such_step(step: int) -> None:
    with pytest.raises(ValueError, match=rf"step={step}: the trace has 4"):
        canvas_at(Trace.from_dict(sample()), step)


MISSING = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [], "trace must be an object, got []"),
        (("version",), 2, "trace.version=2: this package reads 1"),
        (("version",), MISSING, "trace.version is missing"),
        (
            ("num_steps",),
            "4",
            "trace.num_steps must be an integer, at least 0, got '4'",
        ),
        (("num_steps",), 3, "trace.tokens[0].events: step 3 of 3 steps"),
        (("forwards",), 7, "trace.forwards must be a list, got 7"),
        (("forwards",), [7], "trace.forwards[0] must be an object, got 7"),
        (
            ("forwards",),
            [{"steps": 4, "drafted": 1}],
            "forwards[0].accepted is missing",
        ),
        (
            ("forwards",),
            [{"steps": 4, "drafted": 1, "accepted": 2}],
            "trace.forwards[0]: more accepted than drafted",
        ),
        (
            ("forwards",),
            [{"steps": 3, "drafted": 1, "accepted": 1}],
            "trace.forwards have 3 steps, not 4",
        ),
        (("block_length",), True, "trace.block_length must be an integer"),
        (("mask_token_id",), -1, "trace.mask_token_id must be an integer"),
        (("strategy",), None, "trace.strategy must be a string, got None"),
        (("tokens",), {}, "trace.tokens must be a list, got {}"),
        (("tokens", 1), 7, "trace.tokens[1] must be an object, got 7"),
        (
            ("tokens", 1, "token_id"),
            5,
            "trace.tokens[1].token_id=5, but its events end",
        ),
        (("tokens", 1, "events"), MISSING, "trace.tokens[1].events is missing"),
        (("tokens", 1, "events", 0), 7, "trace.tokens[1].events[0] must be an object"),
        (
            ("tokens", 1, "events", 0, "step"),
            3,
            "events are not in order: steps [3, 2]",
        ),
        (("tokens", 1, "events", 0, "step"), 0.0, "events[0].step must be an integer"),
        (("tokens", 1, "events", 0, "event"), "lost", "event='lost': expected one of"),
        (("tokens", 1, "events", 0, "token_id"), MISSING, "[0].token_id is missing"),
        (("tokens", 1, "events", 0, "confidence"), "1", "must be a finite number"),
        (("tokens", 1, "events", 0, "confidence"), float("nan"), "a finite number"),
        (("tokens", 3, "events", 0, "event"), "masked", "but its events end at None"),
    ],
)
def test_what_is_wrong_is_named(path: tuple, value: Any, message: str) -> None:
    source: dict[Any, Any] = {"": deepcopy(sample())}
    place, path = source, ("", *path)
    for key in path[:-1]:
        place = place[key]
    if value is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        Trace.from_dict(source[""])


def test_trace_of_every_kind_of_answer() -> None:
    outputs = pytest.importorskip("vllm.outputs")
    trace, carried = Trace.from_dict(sample()), {"unmask_trace": sample()}
    request = outputs.RequestOutput("1", None, [], None, [], True)
    assert trace_of(request) is None
    request.kv_transfer_params = carried
    for found in (
        request,
        Completion.model_validate(answer(sample())),
        ChatCompletion.model_validate(answer(sample(), chat=True)),
        answer(sample()),
        sample(),
    ):
        assert trace_of(found) == trace
    for nothing in (
        Completion.model_validate(answer(None)),
        answer(None),
        {"kv_transfer_params": {"other": 1}},
        {},
        [],
        None,
    ):
        assert trace_of(nothing) is None
    with pytest.raises(ValueError, match="trace must be an object"):
        trace_of({"kv_transfer_params": {"unmask_trace": "yes"}})
    with pytest.raises(ValueError, match=r"trace\.version is missing"):
        trace_of({"kv_transfer_params": {"unmask_trace": {}}})


def test_pieces_keep_the_space_in_front() -> None:
    """Like a SentencePiece tokenizer, which drops the first space of a text."""
    decoded = pieces_of(
        Trace.from_dict(sample()),
        lambda ids: "".join(PIECES[i] for i in ids).lstrip(" "),
    )
    assert decoded == PIECES


class Scripts(HTMLParser):
    """Collects a page's title and its scripts as a browser would delimit them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, ""))

    def handle_data(self, data: str) -> None:
        if self.elements:
            tag, text = self.elements[-1]
            self.elements[-1] = (tag, text + data)

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(("/" + tag, ""))

    def texts(self, wanted: str) -> list[str]:
        return [text for tag, text in self.elements if tag == wanted]


PLAIN = Scripts(render_html(Trace.from_dict(sample()), {}, "plain"))


@settings(deadline=None)
@given(histories(), pieces, texts)
def test_page_is_data_and_nothing_else(history, pieces, title) -> None:
    trace = Trace.from_dict(history[0])
    page = Scripts(render_html(trace, pieces, title))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in PLAIN.elements]
    assert page.texts("title") == [title]
    data, script = page.texts("script")
    assert script == PLAIN.texts("script")[1]
    assert data.isascii() and "<" not in data
    found = json.loads(data)
    assert Trace.from_dict(found["trace"]) == trace
    known = {i: piece for i, piece in pieces.items() if i in trace.token_ids}
    assert {int(i): piece for i, piece in found["pieces"].items()} == known


def test_page_loads_nothing() -> None:
    page = render_html(Trace.from_dict(sample()), PIECES, "plain")
    assert not re.search(r"\b(src|href|action)=|//[a-z]+\.|@import|url\(", page)
    assert "default-src 'none'" in page
    # What the model wrote never becomes markup.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", page)


def test_wheel_holds_the_page() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (listed,) = re.findall(r"(?m)^vllm_unmask = (\[.*\])$", text)
    assert "trace.html" in json.loads(listed)


@settings(deadline=None, max_examples=60)
@given(histories(), pieces, st.integers(40, 90))
def test_terminal_stays_in_its_lines(history, pieces, width) -> None:
    trace = Trace.from_dict(history[0] | {"strategy": "static"})
    plain = render_terminal(trace, pieces, width=width)
    lines = plain.split("\n")
    assert all(line.isprintable() and columns(line) <= width for line in lines)
    assert " ".join(lines[trace.num_steps :]) == trace.summary
    colored = render_terminal(trace, pieces, width=width, color=True)
    assert ANSI.sub("", colored) == plain
    assert [columns(line) for line in colored.split("\n")] == list(map(columns, lines))
    for step, line in enumerate(lines[: trace.num_steps]):
        only = render_terminal(trace, pieces, width=width, step=step).split("\n")
        assert only == [line, *lines[trace.num_steps :]]


def speculated() -> Trace:
    """Two steps on three forwards: a draft, its verification, and a step of its own."""
    tokens = [
        [event(0, "drafted", 1, 0.5), event(0, "accepted", 1, 0.5)],
        [event(0, "drafted", 2, 0.4), event(0, "resampled", 3)],
        [event(0, "drafted", 2, 0.3), event(1, "revealed", 2, 0.9)],
    ]
    forwards = [(0, 0, 0), (1, 3, 1), (1, 0, 0)]
    names = ("steps", "drafted", "accepted")
    source = {
        "version": 1,
        "block_length": 4,
        "mask_token_id": 99,
        "strategy": "s2d2",
        "num_steps": 2,
        "forwards": [dict(zip(names, f, strict=True)) for f in forwards],
        "tokens": [
            {"token_id": i, "events": e} for i, e in zip((1, 3, 2), tokens, strict=True)
        ],
    }
    return Trace.from_dict(source)


def test_terminal_shows_what_speculation_did() -> None:
    trace = speculated()
    assert trace.forward_of == [1, 2]
    assert canvas_at(trace, 0) == [(1, "accepted"), (3, "resampled"), (None, "drafted")]
    assert render_terminal(trace, {1: "a", 2: "b", 3: "c"}).split("\n") == [
        "0/1 +1 !1    ac░",
        "1/2 +1       acb",
        "s2d2: 3 tokens, 2 steps in 3 forwards, 1.00 tokens per forward, 3 drafted, 1",
        "accepted, 1 resampled, 0 edited, 0 masked again",
    ]


def test_terminal_shows_each_step() -> None:
    trace = Trace.from_dict(sample())
    assert render_terminal(trace, PIECES).split("\n") == [
        "0 +2       The lake.░",
        "1 -1       The lake░░",
        "2 +1 ~1    The sea↵░",
        "3 +1       The sea↵.",
        trace.summary,
    ]
    assert trace.summary == (
        "static: 4 tokens, 4 forwards, 1.00 tokens per forward, 1 edited, "
        "1 masked again"
    )
    last = render_terminal(trace, PIECES, color=True).split("\n")[2]
    assert last.endswith("The\x1b[30;43m sea\x1b[0m\x1b[30;42m↵\x1b[0m\x1b[2m░\x1b[0m")
    assert "<19>" in render_terminal(trace, {})


@pytest.mark.parametrize("changed", [0, 60, 199])
def test_terminal_keeps_the_change_in_view(changed: int) -> None:
    tokens = [{"token_id": i, "events": [event(0, "seeded", i)]} for i in range(200)]
    tokens[changed]["events"].append(event(1, "edited", changed, 0.5))
    trace = Trace.from_dict(sample() | {"tokens": tokens})
    for width in range(50, 60):
        text = render_terminal(trace, {}, width=width, step=1).split("\n")[0]
        assert f"<{changed}>" in text
        assert text.endswith("…") == (changed < 199)


def test_masks_far_behind_the_text_are_left_out() -> None:
    tokens = [{"token_id": i, "events": [event(i, "revealed", i)]} for i in range(30)]
    trace = Trace.from_dict(sample() | {"tokens": tokens, "num_steps": 30})
    assert (
        render_terminal(trace, {0: "A"}, step=0).split("\n")[0].endswith(" A" + "░" * 8)
    )


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nothing_reaches_the_terminal_but_text(hostile: str) -> None:
    trace = Trace.from_dict(sample(hostile))
    text = render_terminal(trace, dict.fromkeys(PIECES, hostile), width=300)
    assert all(line.isprintable() for line in text.split("\n"))
    assert len(text.split("\n")) == 5


def test_no_forwards() -> None:
    trace = Trace.from_dict(sample() | {"tokens": [], "num_steps": 0})
    assert render_terminal(trace, {}) == trace.summary
    assert "0.00 tokens per forward" in trace.summary


@pytest.mark.parametrize("wide", [True, False])
def test_example_shows_every_strategy(wide: bool, tmp_path: Path) -> None:
    """Against a stub, no vLLM."""
    command = [sys.executable, str(ROOT / "examples" / "strategies.py")]
    names = ["static", "threshold", "credit/x"]
    with stub_server() as (address, asked):
        done = subprocess.run(
            [*command, "--url", address, "--html", "pages", "--strategies", *names],
            cwd=tmp_path,
            env={"COLUMNS": "150" if wide else "80"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert [body["vllm_xargs"]["unmask_strategy"] for body in asked] == names
    heads = [line.split() for line in done.stdout.splitlines()]
    assert (names in heads) == wide
    assert all(([name] in heads) != wide for name in names)
    assert done.stdout.count("The sea↵.") == done.stdout.count("1.00 tokens") == 3
    assert "\x1b" not in done.stdout
    written = sorted(path.name for path in (tmp_path / "pages").iterdir())
    assert written == ["credit_x.html", "static.html", "threshold.html"]


def test_example_says_what_the_server_refused() -> None:
    """Against a stub, no vLLM."""
    command = [sys.executable, str(ROOT / "examples" / "strategies.py")]
    with stub_server() as (address, _):
        done = subprocess.run(
            [*command, "--url", address, "--strategies", "nosuch"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert "unmask_strategy='nosuch' is" in done.stderr
    assert "Traceback" not in done.stderr
