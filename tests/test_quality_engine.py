# SPDX-License-Identifier: Apache-2.0
"""The quality report: what it reads of answers, and asking a server for them."""

import importlib
import json
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from vllm_unmask.trace import Event, TokenTrace, Trace

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def engine() -> Any:
    path = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("quality_engine")
    sys.path[:] = path


def trace(steps: Sequence[int], num_steps: int) -> Trace:
    """Tokens revealed in the steps given, blocks of 4."""
    tokens = [TokenTrace(9, (Event(s, "revealed", 9, 0.5),)) for s in steps]
    return Trace(4, 99, "threshold", num_steps, tuple(tokens))


@pytest.mark.parametrize(
    ("prompt", "steps", "num_steps", "expected"),
    [
        (4, [0, 0, 0, 0, 1, 2, 1, 2], 3, [1, 2]),
        # The prompt's last block has room for one token.
        (3, [0, 1, 1, 1, 1, 2], 3, [1, 1, 1]),
        # The second block was complete when the first one was.
        (0, [0, 1, 2, 3, 1, 1, 2, 2, 4], 5, [4, 0, 1]),
        # The last block goes on right of the stop token.
        (0, [0, 1], 4, [4]),
    ],
)
def test_forwards_of_blocks(engine, prompt, steps, num_steps, expected):
    made = trace(steps, num_steps)
    assert engine.forwards_of_blocks(made, prompt) == expected
    answer = engine.answer_of("x", "stop", prompt, made.to_dict())
    single = sum(count <= 1 for count in expected)
    assert answer == ("x", len(steps), num_steps, len(expected), single)
    cut = engine.answer_of("x", "length", prompt, made.to_dict())
    assert cut.text == ""


class Handler(BaseHTTPRequestHandler):
    """A server of one model that refuses `learned` and counts 8 rows a request."""

    requests: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        rows = 8.0 * len(self.requests)
        text = f'vllm:diffusion_num_canvas_positions_total{{engine="0"}} {rows}\n'
        models = json.dumps({"data": [{"id": "demo"}]})
        self.reply(200, text if self.path == "/metrics" else models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["vllm_xargs"]["unmask_strategy"] == "learned":
            return self.reply(400, "no filter")
        self.requests.append(body)
        message = {"content": body["messages"][0]["content"] + "!"}
        answer = {
            "choices": [{"message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 4},
            "kv_transfer_params": {"unmask_trace": trace([0, 1], 2).to_dict()},
        }
        return self.reply(200, json.dumps(answer))

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        pass


def test_a_server_is_asked_over_http(engine):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        server = engine.Server(f"http://127.0.0.1:{http.server_port}/", 32)
        options = {"unmask_strategy": "factor", "unmask_factor": 2.0}
        served = server.serve(["a", "b", "c"], options)
        with pytest.raises(ValueError, match="no filter"):
            server.serve(["a"], {"unmask_strategy": "learned"})
        http.shutdown()
    assert [answer.text for answer in served.answers] == ["a!", "b!", "c!"]
    assert served.answers[0][1:] == (2, 2, 1, 0)
    assert served.rows == 24
    asked = Handler.requests[0]
    assert asked["vllm_xargs"] == options
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == (
        "demo",
        0,
        32,
    )
