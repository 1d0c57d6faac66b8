# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in a process of its own that answers structured requests.

Grammar work is timed inside it: for this plugin the frontier's bitmask and the step
of a request's grammar, for stock vLLM the bitmask and the acceptance of its tokens.
It is the thread's own time, so that a busy machine does not count as grammar work.
"""

import functools
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from closed_loop import Engine, Loop, settings


class Request(NamedTuple):
    """One prompt, and what its answer must be."""

    prompt: str
    max_tokens: int
    schema: str | None = None
    extra_args: dict[str, Any] | None = None


class Answer(NamedTuple):
    """One finished request."""

    text: str
    tokens: int
    finish_reason: str | None


class Measurement(NamedTuple):
    """One closed loop: every request once, at most ``concurrency`` at a time."""

    seconds: float
    engine_steps: int  # engine steps, one forward pass each
    forwards: int  # request-forwards that yield output; prompts not counted
    grammar_us: list[float]  # of each request and step that has a grammar
    answers: list[Answer]  # in the order of the requests


class StructuredLoop(Loop):
    """Inside the engine's process."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.grammar_us: list[float] = []
        if os.environ.get("UNMASK_DISABLE") == "1":
            from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

            self._time(XgrammarGrammar, "fill_bitmask", "accept_tokens")
        else:
            from vllm_unmask.grammar.state import GrammarState

            self._time(GrammarState, "frontier_mask", "step")

    def _time(self, owner: Any, first: str, last: str) -> None:
        """Time two methods that a step calls on a request's grammar, one then other."""
        pending: dict[int, float] = {}

        def timed(method: Any) -> Any:
            name = method.__name__

            @functools.wraps(method)
            def call(instance: Any, *args: Any, **kwargs: Any) -> Any:
                start = time.thread_time()
                try:
                    return method(instance, *args, **kwargs)
                finally:
                    spent = 1e6 * (time.thread_time() - start)
                    spent += pending.pop(id(instance), 0)
                    if name == last:
                        self.grammar_us.append(spent)
                    else:
                        pending[id(instance)] = spent

            return call

        for name in (first, last):
            setattr(owner, name, timed(getattr(owner, name)))

    def shortest(self, schemas: Sequence[str]) -> list[int | str]:
        """Tokens of the shortest output of each schema, or why it is not served.

        Compiles the grammars, so that no later request waits for that.
        """
        return [self._shortest(schema) for schema in schemas]

    def _shortest(self, schema: str) -> int | str:
        refusal = self._add("shortest", Request("", 1, schema))
        if refusal is None:
            self._drain()
            return 1
        needed = re.search(r"room for at least (\d+)", refusal)
        return int(needed[1]) if needed else refusal

    def admit(self, schemas: Sequence[str]) -> list[str | None]:
        """Why each schema is not served, None if it is; compiles the grammars."""
        refusals = [
            self._add(f"admit-{index}", Request("", 256, schema))
            for index, schema in enumerate(schemas)
        ]
        self._drain()
        return refusals

    def _drain(self) -> None:
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()

    def serve(self, requests: Sequence[Request], concurrency: int) -> Measurement:
        """Keep ``concurrency`` requests in flight until every one is answered."""
        engine = self.llm.llm_engine
        answers: dict[str, Answer] = {}
        waiting = iter(enumerate(requests))
        started = steps = 0
        before, _ = self._counters()
        self.grammar_us.clear()
        start = time.perf_counter()
        while len(answers) < len(requests):
            while started - len(answers) < concurrency and started < len(requests):
                index, request = next(waiting)
                if refusal := self._add(str(index), request):
                    raise RuntimeError(refusal)
                started += 1
            for result in engine.step():
                if result.finished:
                    answer = result.outputs[0]
                    answers[result.request_id] = Answer(
                        answer.text, len(answer.token_ids), answer.finish_reason
                    )
            steps += 1
        seconds = time.perf_counter() - start
        ordered = [answers[str(index)] for index in range(len(requests))]
        forwards = self._counters()[0] - before
        if not self.is_diffusion:
            forwards = sum(answer.tokens for answer in ordered)
        return Measurement(seconds, steps, forwards, list(self.grammar_us), ordered)

    def _add(self, name: str, request: Request) -> str | None:
        """Start a request; returns why it is refused."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        structured = None
        if request.schema is not None:
            structured = StructuredOutputsParams(json=request.schema)
        params = SamplingParams(
            temperature=0,
            max_tokens=request.max_tokens,
            extra_args=request.extra_args,
            structured_outputs=structured,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = tokens_input(self._encode(request.prompt))
        try:
            self.llm.llm_engine.add_request(name, prompt, params)
        except (VLLMValidationError, ValueError) as error:
            return str(error)
        return None


class StructuredEngine(Engine):
    """The handle of the driving process."""

    def __init__(
        self,
        model: Path,
        *,
        log: Path,
        environment: dict[str, str],
        **options: Any,
    ) -> None:
        super().__init__(
            settings(model, eager=True) | {"max_model_len": 1024} | options,
            environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | environment,
            log=log,
            loop_type=StructuredLoop,
        )
