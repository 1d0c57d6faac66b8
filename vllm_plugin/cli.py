# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_unmask doctor | serve | trace`."""

import argparse
import http.client
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_unmask import doctor
from vllm_unmask.registration import DISABLE, flag, supported_version
from vllm_unmask.trace import (
    Trace,
    pieces_of,
    printable,
    render_html,
    render_terminal,
    trace_of,
)

PLUGIN_NAME = "unmask"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_unmask",
        description="Serve block-diffusion language models with vLLM.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("doctor", help="show what is installed and what is not")
    check.add_argument("--json", action="store_true", help="print a JSON object")
    check.add_argument(
        "--model",
        metavar="DIR",
        help="say instead what would be done with the checkpoint in this folder",
    )
    serve = commands.add_parser(
        "serve",
        help="check the installation, then run `vllm serve`",
        add_help=False,
    )
    # Everything after `serve` is vLLM's, --help included.
    serve.add_argument("arguments", nargs=argparse.REMAINDER)
    _add_trace(commands)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:
        return _serve(arguments[1:])
    options = parser.parse_args(arguments)
    if options.command == "trace":
        return _trace(options)
    if options.model is not None:
        return doctor.run_model(options.model, as_json=options.json)
    return doctor.run(as_json=options.json)


def plugins_with_ours(allowed: str | None) -> str | None:
    """VLLM_PLUGINS with this plugin added; None when it is unset, which loads all."""
    if allowed is None:
        return None
    names = [name for name in allowed.split(",") if name]
    return ",".join(names if PLUGIN_NAME in names else [*names, PLUGIN_NAME])


def _serve(arguments: list[str]) -> int:
    """Replace this process by `vllm serve`."""
    try:
        if flag(DISABLE):
            raise RuntimeError(
                f"{DISABLE}=1 switches the plugin off; unset it, or run `vllm serve`"
            )
        if not doctor.entry_point_visible():
            raise RuntimeError(doctor.NOT_INSTALLED)
        supported_version()
    except (ImportError, RuntimeError) as error:
        sys.stderr.write(f"vllm_unmask serve: {error}\n")
        return 1
    environment = dict(os.environ)
    plugins = plugins_with_ours(environment.get("VLLM_PLUGINS"))
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


def _add_trace(commands: Any) -> None:
    """Declare `trace`; `commands` is what `add_subparsers` returned."""
    show = commands.add_parser(
        "trace",
        help="show how a request was decoded, step by step",
        description="Show how a request with unmask_trace=true was decoded: one line "
        "per forward pass, with a mask as a light block, and how many positions it "
        "revealed (+), edited (~) and masked again (-). Reads a saved trace or answer, "
        "or asks a running server. Exit status 2 if there is nothing to show.",
        allow_abbrev=False,
    )
    show.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="a saved trace or a saved answer of the OpenAI API (completion or chat), "
        "JSON; - for standard input",
    )
    show.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="folder with the model's tokenizer.json; without it texts come from the "
        "server, or from the log-probabilities in FILE, else a token is <its id>",
    )
    show.add_argument(
        "--step", type=int, metavar="N", help="show this step alone, counted from 0"
    )
    show.add_argument("--html", metavar="OUT", help="also write a page to this file")
    show.add_argument(
        "--no-color",
        action="store_true",
        help="no ANSI colours; so too if NO_COLOR is set or this is no terminal",
    )
    server = show.add_argument_group("ask a running server, at temperature 0")
    server.add_argument(
        "--url",
        help="the server, such as http://localhost:8000; VLLM_API_KEY is its key",
    )
    server.add_argument("--prompt", metavar="TEXT", help="needed with --url")
    server.add_argument(
        "--strategy", metavar="S", help="unmask_strategy; default: the server's"
    )
    server.add_argument(
        "--max-tokens", type=int, metavar="N", help="tokens at most (default 64)"
    )
    server.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="send the prompt as a chat message",
    )


def _trace(options: argparse.Namespace) -> int:
    """Show a trace; 2 and one line of text if that cannot be done."""
    try:
        trace, pieces, title = (
            _saved(options) if options.url is None else _asked(options)
        )
        if options.tokenizer:
            pieces = pieces_of(trace, _decoder(options.tokenizer))
        is_terminal = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        text = render_terminal(
            trace,
            pieces,
            width=shutil.get_terminal_size().columns,
            color=is_terminal and not options.no_color,
            step=options.step,
        )
        if options.html:
            page = render_html(trace, pieces, title)
            # A title from the command line may hold bytes that are no text.
            Path(options.html).write_text(page, encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:
        # A server may answer with anything, this is one line.
        line = printable(" ".join(str(error).split()))
        sys.stderr.write(f"vllm_unmask trace: {line}\n")
        return 2
    sys.stdout.write(text + "\n")
    return 0


def _saved(options: argparse.Namespace) -> tuple[Trace, dict[int, str], str]:
    """Trace, texts and title of FILE."""
    for key in ("prompt", "strategy", "max_tokens", "chat"):
        if getattr(options, key) is not None:
            raise ValueError(f"--{key.replace('_', '-')} needs --url")
    name = options.file
    if name is None:
        raise ValueError("neither FILE nor --url is given")
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    where = "standard input" if name == "-" else name
    try:
        answer = json.loads(data)
        trace = _traced(answer)
        return trace, _reported(answer, trace), where
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error


def _asked(options: argparse.Namespace) -> tuple[Trace, dict[int, str], str]:
    """Trace, texts and title of what a server answers."""
    url = options.url.rstrip("/").removesuffix("/v1")
    if options.file is not None:
        raise ValueError(f"FILE={options.file} and --url exclude each other")
    if options.prompt is None:
        raise ValueError("--url needs --prompt")
    extra = {"unmask_trace": True, "unmask_strategy": options.strategy}
    body: dict[str, Any] = {
        "max_tokens": 64 if options.max_tokens is None else options.max_tokens,
        "temperature": 0,
        "vllm_xargs": {key: value for key, value in extra.items() if value is not None},
    }
    if options.chat:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": options.prompt}]
    else:
        path = "/v1/completions"
        body["prompt"] = options.prompt
    try:
        model = _call(url, "/v1/models")["data"][0]["id"]
        trace = _traced(_call(url, path, {"model": model, **body}))
        if options.tokenizer:
            return trace, {}, options.prompt

        def decode(ids: list[int]) -> str:
            text = _call(url, "/detokenize", {"model": model, "tokens": ids})
            return str(text["prompt"])

        return trace, pieces_of(trace, decode), options.prompt
    except (LookupError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"--url={url}: not the answer of a vLLM server") from error
    except (ValueError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"--url={url}: {reason}") from error


def _call(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that the server answers, past any proxy."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        raise ValueError(f"{path}: HTTP {error.code}: {_message(text)}") from error


def _message(text: str) -> str:
    """What a refusal says: vLLM's own sentence, or the start of anything else."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text[:200]


def _traced(answer: Any) -> Trace:
    trace = trace_of(answer)
    if trace is None:
        raise ValueError("it has no trace; ask for one with unmask_trace=true")
    return trace


def _reported(answer: Any, trace: Trace) -> dict[int, str]:
    """Texts of the output tokens, where an answer's log-probabilities hold them."""
    try:
        found = (answer.get("choices") or [{}])[0].get("logprobs") or {}
        texts = found.get("tokens") or [e["token"] for e in found.get("content") or []]
        ids = [token.token_id for token in trace.tokens]
        return {i: str(text) for i, text in zip(ids, texts, strict=False)}
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError("its choices are not those of the OpenAI API") from error


def _decoder(path: str) -> Callable[[list[int]], str]:
    """The `decode` of a tokenizer on disk.

    By the tokenizers library alone: it loads in no time, transformers takes seconds.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"--tokenizer={path}: no tokenizer.json in this folder")
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
    # The library raises Exception itself.
    except Exception as error:
        raise ValueError(f"--tokenizer={path}: {error}") from error
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))
