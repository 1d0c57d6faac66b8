# SPDX-License-Identifier: Apache-2.0
"""vLLM engines, each in a process of its own, that count what speculation brings.

Front end, engine core and worker of an engine share its process: an engine that has
nothing to do uses no core.
"""

import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from closed_loop import ENVIRONMENT, MAX_TOKENS, Loop, Output, settings

_COUNTER = "vllm:unmask_speculation_"


class Measured(NamedTuple):
    """A list of prompts, answered.

    With `freedave`, `drafted` counts candidates that a forward held besides the canvas
    and `accepted` those that a denoising step took; with `s2d2`, tokens that were
    verified and those that passed.
    """

    seconds: float
    cpu_seconds: float  # of the process, which waiting for a core does not count in
    forwards: int  # of requests: a forward that k requests share counts k times
    rows: int  # token rows of these, candidates included
    drafted: int
    accepted: int
    outputs: list[Output]  # in the order of the prompts


class SpeculationLoop(Loop):
    """Inside the engine's process."""

    def closed(
        self, prompts: list[str], concurrency: int, extra_args: dict[str, Any]
    ) -> Measured:
        """Answer greedily, at most ``concurrency`` prompts at a time."""
        before = self._speculation()
        start = time.process_time()
        result = self.measure(prompts, concurrency, extra_args)
        cpu_seconds = time.process_time() - start
        drafted, accepted = _less(self._speculation(), before)
        return Measured(
            result.seconds,
            cpu_seconds,
            result.forwards,
            result.rows,
            drafted,
            accepted,
            result.outputs,
        )

    def sampled(
        self, prompts: Sequence[str], temperature: float, extra_args: Mapping[str, Any]
    ) -> Measured:
        """Answer all together, each with a seed of its own."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=temperature,
                seed=seed,
                max_tokens=MAX_TOKENS,
                extra_args=dict(extra_args),
            )
            for seed in range(len(prompts))
        ]
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        before = (*self._counters(), *self._speculation())
        start, cpu_start = time.perf_counter(), time.process_time()
        finished = self.llm.chat(chats, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        cpu_seconds = time.process_time() - cpu_start
        after = (*self._counters(), *self._speculation())
        answers = [output.outputs[0] for output in finished]
        outputs = [
            Output(a.text if a.finish_reason == "stop" else "", len(a.token_ids))
            for a in answers
        ]
        forwards, rows, drafted, accepted = _less(after, before)
        return Measured(
            seconds, cpu_seconds, forwards, rows, drafted, accepted, outputs
        )

    def _speculation(self) -> tuple[int, int]:
        """Drafted and accepted so far, over all requests."""
        values = {
            metric.name.removeprefix(_COUNTER): int(metric.value)
            for metric in self.llm.get_metrics()
            if metric.name.startswith(_COUNTER)
        }
        passed = values["tokens_verified"] - values["tokens_corrected"]
        return (
            values["drafted"] + values["tokens_drafted"],
            values["accepted"] + passed,
        )


def _less(after: tuple[int, ...], before: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip(after, before, strict=True))


_loop: SpeculationLoop


def _start(options: dict[str, Any], environment: dict[str, str], log: str) -> None:
    global _loop
    os.environ.update(environment)
    # vLLM and its libraries write to the descriptors, not to Python's streams.
    with open(log, "ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    _loop = SpeculationLoop(options)


def _call(method: str, *args: Any) -> Any:
    return getattr(_loop, method)(*args)


class SpeculationEngine:
    """The handle of the driving process. Engines that are made together start together.

    Args:
        model: folder of the checkpoint.
        server: server options of this plugin.
        threads: of OpenMP.
        log: file that takes what the engine writes.
    """

    def __init__(
        self, model: Path, server: Mapping[str, Any], threads: int, log: Path
    ) -> None:
        options = settings(model, eager=True) | {
            # Equal outputs are claimed as far as logits do not depend on the batch.
            "dtype": "float32",
            "additional_config": {"unmask": dict(server)},
        }
        environment = ENVIRONMENT | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        self._pool = ProcessPoolExecutor(
            1,
            multiprocessing.get_context("spawn"),
            _start,
            (options, environment, str(log)),
        )
        self._facts = self._submit("describe")

    def _submit(self, method: str, *args: Any) -> "Future[Any]":
        return self._pool.submit(_call, method, *args)

    @property
    def facts(self) -> dict[str, Any]:
        """What the engine is, once it has started.

        Raises:
            RuntimeError: it does not start.
        """
        try:
            found: dict[str, Any] = self._facts.result()
        except BrokenProcessPool:
            raise RuntimeError("an engine did not start") from None
        return found

    def closed(
        self, prompts: list[str], concurrency: int, extra_args: dict[str, Any]
    ) -> Measured:
        """`SpeculationLoop.closed`."""
        result: Measured = self._submit(
            "closed", prompts, concurrency, extra_args
        ).result()
        return result

    def sampled(
        self, prompts: list[str], temperature: float, extra_args: dict[str, Any]
    ) -> Measured:
        """`SpeculationLoop.sampled`."""
        result: Measured = self._submit(
            "sampled", prompts, temperature, extra_args
        ).result()
        return result

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(cancel_futures=True)
