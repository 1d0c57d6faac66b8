# SPDX-License-Identifier: Apache-2.0
"""A trace, and a stub of the few HTTP routes that a trace is asked for through.

The stub is no vLLM: it answers in vLLM's form, with the trace below whatever is asked.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PIECES = {17: "The", 18: " sea", 19: " lake", 20: "\n", 21: "."}


def event(step: int, kind: str, token_id: int | None = None, sure: float | None = None):
    record = {"step": step, "event": kind, "token_id": token_id, "confidence": sure}
    return {key: value for key, value in record.items() if value is not None}


def sample(strategy: str = "static") -> dict[str, Any]:
    """Four tokens in four forwards: one is edited, one masked again, one closed."""
    events = {
        17: [event(0, "seeded", 17), event(3, "committed")],
        18: [event(0, "revealed", 19, 0.4), event(2, "edited", 18, 0.9)],
        20: [
            event(0, "revealed", 21, 0.3),
            event(1, "masked"),
            event(2, "revealed", 20, 0.8),
            event(2, "verified"),
        ],
        21: [event(3, "closed", 21), event(3, "committed")],
    }
    return {
        "version": 1,
        "block_length": 8,
        "mask_token_id": 4,
        "strategy": strategy,
        "num_steps": 4,
        "tokens": [{"token_id": i, "events": e} for i, e in events.items()],
    }


def answer(trace: dict[str, Any] | None, chat: bool = False) -> dict[str, Any]:
    """An answer in the form of vLLM's completion or chat completion."""
    text = "".join(PIECES[i] for i in (17, 18, 20, 21))
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    choice |= (
        {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    )
    return {
        "id": "1",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1,
        "model": "stub",
        "choices": [choice],
        "kv_transfer_params": trace and {"unmask_trace": trace},
    }


@contextlib.contextmanager
def stub_server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields the address and the list of requests for an answer, growing."""
    asked: list[dict[str, Any]] = []

    class Stub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = {"object": "list", "data": [{"id": "stub"}]}
            if self.path.startswith("/odd"):
                models = {}
            self.reply(200, models, b"<" if self.path.startswith("/page") else b"")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/detokenize":
                text = "".join(PIECES[i] for i in body["tokens"])
                return self.reply(200, {"prompt": text})
            key = self.headers.get("Authorization")
            asked.append({"path": self.path, "key": key, **body})
            extra = body.get("vllm_xargs", {})
            strategy = extra.get("unmask_strategy", "static")
            if strategy == "nosuch":
                message = "unmask_strategy='nosuch' is\nnot \x1b[31mallowed"
                return self.reply(400, {"error": {"message": message, "code": 400}})
            trace = sample(strategy) if extra.get("unmask_trace") else None
            if body["max_tokens"] == 1:
                trace = None
            self.reply(200, answer(trace, chat=self.path.endswith("chat/completions")))

        def reply(self, status: int, content: Any, before: bytes = b"") -> None:
            data = before + json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
