# SPDX-License-Identifier: Apache-2.0
"""Who answers the prompts of the quality report: an engine in this process, a server.

Both count a request's denoising steps by its trace.
"""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from closed_loop import MAX_CONCURRENCY, Loop

from vllm_unmask.trace import WRITES, Trace

_ROWS = re.compile(
    rb"^vllm:diffusion_num_canvas_positions(?:_total)?\{.*\} (\S+)", re.M
)


class Answer(NamedTuple):
    """One finished request."""

    text: str  # empty unless the model ended it
    tokens: int  # up to and including the stop token
    forwards: int  # denoising steps
    blocks: int  # that its tokens lie in
    single: int  # blocks of these that took one forward or none


class Answers(NamedTuple):
    """All answers of one configuration, in the order of the prompts."""

    answers: list[Answer]
    rows: float | None  # computed in all denoising steps
    seconds: float


Serve = Callable[[Sequence[str], Mapping[str, Any]], Answers]


def forwards_of_blocks(trace: Trace, prompt_tokens: int) -> list[int]:
    """Denoising steps that each block of an answer took, in their order.

    A block that was complete when the one before it was has taken none. Blocks count
    from the first token of the prompt.
    """
    ends: dict[int, int] = {}
    for place, token in enumerate(trace.tokens, prompt_tokens):
        block = place // trace.block_length
        steps = [e.step + 1 for e in token.events if e.kind in WRITES]
        ends[block] = max([ends.get(block, 0), *steps])
    counts, before = [], 0
    for end in list(ends.values())[:-1]:
        counts.append(max(end - before, 0))
        before = max(before, end)
    # The last block is denoised to its end, past the answer's.
    return [*counts, trace.num_steps - before]


def answer_of(
    text: str, finish_reason: str | None, prompt_tokens: int, source: Any
) -> Answer:
    """An answer from what a request brings back; `source` is its trace."""
    trace = Trace.from_dict(source)
    counts = forwards_of_blocks(trace, prompt_tokens)
    return Answer(
        text if finish_reason == "stop" else "",
        len(trace.tokens),
        trace.num_steps,
        len(counts),
        sum(count <= 1 for count in counts),
    )


class Engine(Loop):
    """vLLM in this process.

    Args:
        options: of `LLM`.
        max_tokens: of a request.
    """

    def __init__(self, options: dict[str, Any], max_tokens: int) -> None:
        super().__init__(options)
        self.max_tokens = max_tokens

    def serve(self, prompts: Sequence[str], extra_args: Mapping[str, Any]) -> Answers:
        """Answer every prompt greedily.

        Raises:
            ValueError: the engine refuses the options.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            seed=0,
            max_tokens=self.max_tokens,
            extra_args=dict(extra_args),
        )
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        _, before = self._counters()
        start = time.perf_counter()
        outputs = self.llm.chat(chats, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        _, after = self._counters()
        answers = [
            answer_of(
                output.outputs[0].text,
                output.outputs[0].finish_reason,
                len(output.prompt_token_ids),
                output.kv_transfer_params["unmask_trace"],
            )
            for output in outputs
        ]
        return Answers(answers, after - before, seconds)


class Server:
    """A running server, asked over HTTP by as many threads as an engine takes.

    Args:
        url: up to the port.
        max_tokens: of a request.
    """

    def __init__(self, url: str, max_tokens: int) -> None:
        self.url = url.rstrip("/")
        self.max_tokens = max_tokens
        self.model = json.loads(self._get("/v1/models"))["data"][0]["id"]

    def describe(self) -> dict[str, Any]:
        """What is known of it."""
        return {"url": self.url, "model": self.model, "versions": {}}

    def serve(self, prompts: Sequence[str], extra_args: Mapping[str, Any]) -> Answers:
        """Answer every prompt greedily.

        Raises:
            ValueError: the server refuses a request.
        """

        def ask(prompt: str) -> Answer:
            body = {
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "seed": 0,
                "max_tokens": self.max_tokens,
                "vllm_xargs": dict(extra_args),
            }
            answer = json.loads(self._get("/v1/chat/completions", body))
            choice = answer["choices"][0]
            return answer_of(
                choice["message"]["content"] or "",
                choice["finish_reason"],
                answer["usage"]["prompt_tokens"],
                answer["kv_transfer_params"]["unmask_trace"],
            )

        before = self._rows()
        start = time.perf_counter()
        with ThreadPoolExecutor(MAX_CONCURRENCY) as pool:
            answers = list(pool.map(ask, prompts))
        seconds = time.perf_counter() - start
        after = self._rows()
        rows = None if before is None or after is None else after - before
        return Answers(answers, rows, seconds)

    def _rows(self) -> float | None:
        found = _ROWS.findall(self._get("/metrics"))
        return sum(map(float, found)) if found else None

    def _get(self, path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as reply:
                text: bytes = reply.read()
                return text
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode(errors="replace")) from error
