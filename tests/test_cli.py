# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_unmask serve | trace`, and how arguments reach the subcommands."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trace_samples import PIECES, answer, sample, stub_server

from vllm_unmask import cli, doctor


class Executed(Exception):
    """Raised where the process would have become another one."""


@pytest.fixture
def execve(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> None:
        calls.append(arguments)
        raise Executed

    monkeypatch.setattr(os, "execve", record)
    for name in ("VLLM_PLUGINS", "UNMASK_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (None, None),
        ("", "unmask"),
        ("unmask", "unmask"),
        ("other", "other,unmask"),
        ("unmask,other", "unmask,other"),
        ("unmasked", "unmasked,unmask"),
    ],
)
def test_plugins_with_ours(allowed: str | None, expected: str | None) -> None:
    assert cli.plugins_with_ours(allowed) == expected


def test_serve_becomes_vllm_serve(
    execve: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(Executed):
        cli.main(["serve", "some/model", "--port", "8001", "--help"])
    ((path, command, environment),) = execve
    assert path == sys.executable
    assert command == [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        "some/model",
        "--port",
        "8001",
        "--help",
    ]
    assert environment["VLLM_PLUGINS"] == "other,unmask"
    assert {k: v for k, v in environment.items() if k != "VLLM_PLUGINS"} == {
        k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"
    }


def test_serve_leaves_unset_plugins_unset(execve: list[tuple[Any, ...]]) -> None:
    with pytest.raises(Executed):
        cli.main(["serve", "some/model"])
    assert "VLLM_PLUGINS" not in execve[0][2]


def test_serve_refuses_when_switched_off(
    execve: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("UNMASK_DISABLE", "1")
    assert cli.main(["serve", "some/model"]) == 1
    assert not execve
    assert "UNMASK_DISABLE=1 switches the plugin off" in capsys.readouterr().err


def test_serve_refuses_when_vllm_cannot_see_us(
    execve: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "entry_point_visible", lambda: False)
    assert cli.main(["serve", "some/model"]) == 1
    assert not execve
    assert doctor.NOT_INSTALLED in capsys.readouterr().err


def test_serve_refuses_an_unsupported_vllm(
    execve: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.40.1")
    assert cli.main(["serve", "some/model"]) == 1
    assert not execve
    assert "found 0.40.1" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_doctor_returns_its_code(
    monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    seen = []
    monkeypatch.setattr(doctor, "run", lambda as_json: seen.append(as_json) or 7)
    assert cli.main(["doctor"] + ["--json"] * as_json) == 7
    assert seen == [as_json]


@pytest.mark.parametrize("arguments", [[], ["nosuch"], ["doctor", "--nosuch"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m vllm_unmask" in capsys.readouterr().err


def test_module_runs_outside_the_repository() -> None:
    """`python -m vllm_unmask --help` needs no vLLM, so it answers at once."""
    result = subprocess.run(
        [sys.executable, "-m", "vllm_unmask", "--help"],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for command in ("doctor", "serve", "trace"):
        assert command in result.stdout


TOKENIZER = Path(__file__).resolve().parent.parent / "examples/demo_model/sdar"


def show(*arguments: str | Path, stdin: str = "", **environment: str) -> Any:
    """Run `trace` in a process of its own."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("COLUMNS", "VLLM_API_KEY")
    }
    return subprocess.run(
        [sys.executable, "-m", "vllm_unmask", "trace", *map(str, arguments)],
        env=clean | {"COLUMNS": "100"} | environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(sample()))
    return path


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A stub, no vLLM."""
    with stub_server() as stub:
        yield stub


def logprobs(chat: bool) -> dict[str, Any]:
    """An answer with the texts of its tokens."""
    source, words = answer(sample(), chat), [PIECES[i] for i in (17, 18, 20, 21)]
    found = {"content": [{"token": w} for w in words]} if chat else {"tokens": words}
    source["choices"][0]["logprobs"] = found
    return source


def test_trace_of_a_file(saved: Path) -> None:
    result = show(saved)
    assert result.returncode == 0 and not result.stderr
    lines = result.stdout.splitlines()
    assert lines[2] == "2 +1 ~1    <17><18><20>░"
    assert lines[4].startswith("static: 4 tokens, 4 forwards, 1.00 tokens per forward")
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("chat", [False, True])
def test_trace_of_an_answer_on_standard_input(chat: bool) -> None:
    result = show("-", "--step", "3", stdin=json.dumps(logprobs(chat)))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "3 +1       The sea↵."
    assert len(result.stdout.splitlines()) == 2


def test_trace_with_a_tokenizer(saved: Path) -> None:
    result = show(saved, "--tokenizer", TOKENIZER, "--step", "3")
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    assert result.stdout.splitlines()[0] == "3 +1       -.01"


def test_trace_as_a_page(saved: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert show(saved, "--html", page).returncode == 0
    assert f"<title>{saved}</title>" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("terminal", "arguments", "unset", "colored"),
    [
        (True, [], "", True),
        (True, ["--no-color"], "", False),
        (True, [], "1", False),
        (False, [], "", False),
    ],
)
def test_trace_colours_on_a_terminal_only(
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
    arguments: list[str],
    unset: str,
    colored: bool,
) -> None:
    monkeypatch.setenv("NO_COLOR", unset)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert cli.main(["trace", str(saved), *arguments]) == 0
    assert ("\x1b[" in capsys.readouterr().out) == colored


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_trace_from_a_server(server: Any, suffix: str) -> None:
    address, asked = server
    result = show("--url", address + suffix, "--prompt", "Where?", VLLM_API_KEY="k")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[3] == "3 +1       The sea↵."
    assert asked == [
        {
            "path": "/v1/completions",
            "key": "Bearer k",
            "model": "stub",
            "prompt": "Where?",
            "max_tokens": 64,
            "temperature": 0,
            "vllm_xargs": {"unmask_trace": True},
        }
    ]


def test_trace_from_a_server_with_everything(server: Any, tmp_path: Path) -> None:
    address, asked = server
    # Its last byte is no text.
    arguments = [
        "--prompt",
        "Where?\udcff",
        "--chat",
        "--strategy",
        "credit",
        "--step",
        "3",
    ]
    arguments += ["--max-tokens", "8", "--tokenizer", str(TOKENIZER)]
    arguments += ["--html", str(tmp_path / "page.html")]
    # Past the proxy, which would not answer.
    result = show("--url", address, *arguments, http_proxy="http://127.0.0.1:1")
    assert result.returncode == 0, result.stderr
    first, summary = result.stdout.splitlines()
    assert first == "3 +1       -.01" and summary.startswith("credit: 4 tokens")
    (body,) = asked
    assert body["path"] == "/v1/chat/completions" and body["max_tokens"] == 8
    assert body["messages"] == [{"role": "user", "content": "Where?\udcff"}]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>Where??</title>" in page
    assert body["vllm_xargs"] == {"unmask_trace": True, "unmask_strategy": "credit"}


BAD = copy.deepcopy(sample())
BAD["tokens"][1]["events"][0]["event"] = "lost"


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ([], "", "neither FILE nor --url is given"),
        (["nosuch.json"], "", "No such file or directory: 'nosuch.json'"),
        (["/"], "", "Is a directory: '/'"),
        (["-"], "{", "standard input: Expecting property name"),
        (["-"], "[" * 100_000, "standard input: "),
        (["-"], "[]", "standard input: it has no trace"),
        (["-"], json.dumps(answer(None)), "standard input: it has no trace"),
        (["-"], json.dumps(BAD), "trace.tokens[1].events[0].event='lost': expected"),
        (
            ["-"],
            json.dumps(answer(sample()) | {"choices": [7]}),
            "standard input: its choices are not those of the OpenAI API",
        ),
        (["-", "--step", "4"], json.dumps(sample()), "step=4: the trace has 4"),
        (["-", "--html", "/nosuch/a"], json.dumps(sample()), "directory: '/nosuch/a'"),
        (
            ["-", "--tokenizer", "/nosuch"],
            json.dumps(sample()),
            "--tokenizer=/nosuch: no tokenizer.json in this folder",
        ),
        (
            ["-", "--tokenizer", "{broken}"],
            json.dumps(sample()),
            "broken: Model missing",
        ),
        (["-", "--prompt", "x"], "", "--prompt needs --url"),
        (["-", "--strategy", "x"], "", "--strategy needs --url"),
        (["-", "--max-tokens", "0"], "", "--max-tokens needs --url"),
        (["-", "--chat"], "", "--chat needs --url"),
        (["a", "--url", "b"], "", "FILE=a and --url exclude each other"),
        (["--url", "b"], "", "--url needs --prompt"),
        (["--url", "b", "--prompt", "x"], "", "--url=b: unknown url type"),
        (["--url", "", "--prompt", "x"], "", "--url=: unknown url type"),
        (
            ["--url", "http://127.0.0.1:1", "--prompt", "x"],
            "",
            "--url=http://127.0.0.1:1: [Errno 111] Connection refused",
        ),
        (
            ["--url", "{address}", "--prompt", "x", "--strategy", "nosuch"],
            "",
            "/v1/completions: HTTP 400: unmask_strategy='nosuch' is not ·[31mallowed",
        ),
        (
            ["--url", "{address}", "--prompt", "x", "--max-tokens", "1"],
            "",
            "it has no trace; ask for one with unmask_trace=true",
        ),
        (
            ["--url", "{address}/odd", "--prompt", "x"],
            "",
            "/odd: not the answer of a vLLM server",
        ),
        (
            ["--url", "{address}/page", "--prompt", "x"],
            "",
            "/page: not the answer of a vLLM server",
        ),
        (
            ["--url", "http://localhost:port", "--prompt", "x"],
            "",
            "--url=http://localhost:port: nonnumeric port: 'port'",
        ),
    ],
)
def test_trace_errors_are_one_line(
    server: Any, tmp_path: Path, arguments: list[str], stdin: str, message: str
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    names = {"address": server[0], "broken": broken}
    result = show(*[a.format(**names) for a in arguments], stdin=stdin)
    assert result.returncode == 2
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("vllm_unmask trace: ") and message in line


def test_trace_help_names_every_option() -> None:
    text = show("--help").stdout
    for word in (
        "FILE --tokenizer --step --html --no-color --url --prompt --strategy "
        "--max-tokens --chat"
    ).split():
        assert word in text
