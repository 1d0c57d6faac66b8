# SPDX-License-Identifier: Apache-2.0
"""Compiling grammars beside a server: bounded in time, memory, queue and cache.

A hostile grammar can compile for minutes, take gigabytes or overflow the stack, and
a thread cannot be killed. So every grammar compiles in a process of its own (see
`compile_worker`), and a failure there is the refusal of that grammar only.
"""

import atexit
import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import NamedTuple, TypeAlias

from vllm_unmask.grammar.compile_worker import send_frame
from vllm_unmask.grammar.loading import CompiledSpec
from vllm_unmask.grammar.spec import GrammarLimits, GrammarSpec
from vllm_unmask.grammar.vocabulary import Vocabulary

_WORKER = (sys.executable, "-m", "vllm_unmask.grammar.compile_worker")
# Seconds to import torch and xgrammar on a slow disk, and those that a killed
# compilation may take to be gone.
_START_SECONDS = 300.0
_GRACE_SECONDS = 10.0

# What a result in the cache takes besides the text and the closing.
_ENTRY_BYTES = 1024


class Refusal(NamedTuple):
    """Why a grammar is refused; see `GrammarSpec.refused`."""

    reason: str
    expected: str


Result: TypeAlias = CompiledSpec | Refusal
Compilation: TypeAlias = "Future[CompiledSpec]"


class GrammarCompilers:
    """Compiles admitted grammars. May be used from any thread.

    Nothing is started before `start` or the first `submit`.

    Args:
        vocabulary: what the grammars are compiled for.
        limits: what one grammar, the queue and the cache may take.
        processes: grammars that are compiled at a time.
        observe: told the seconds that each compilation took, from any thread.

    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        limits: GrammarLimits = GrammarLimits(),  # noqa: B008
        *,
        processes: int = 2,
        observe: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self._limits = limits
        self._processes = processes
        self._observe = observe
        self._worker = _Worker(vocabulary, limits)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._tasks: queue.SimpleQueue[GrammarSpec | None] = queue.SimpleQueue()
        self._pending: dict[GrammarSpec, Compilation] = {}
        self._cache = _Cache(limits)

    def start(self) -> None:
        """Start in the background, so that the first grammar need not wait for it."""
        with self._lock:
            if self._threads or self._closed:
                return
            atexit.register(self.close)
            for _ in range(self._processes):
                thread = threading.Thread(target=self._serve, daemon=True)
                self._threads.append(thread)
                thread.start()

    def submit(self, spec: GrammarSpec) -> Compilation:
        """Compile a grammar, or find it compiled.

        The future is shared by all who wait for this grammar, so it cannot be
        cancelled. It fails with a `GrammarError` if the grammar is refused, and with
        a `RuntimeError` if no process can be started.
        """
        self.start()
        with self._lock:
            if self._closed:
                raise RuntimeError("the compilers are closed")
            if (pending := self._pending.get(spec)) is not None:
                return pending
            future: Compilation = Future()
            future.set_running_or_notify_cancel()
            if (found := self._cache.get(spec)) is not None:
                _resolve(future, spec, found)
            elif len(self._pending) >= self._processes + self._limits.waiting:
                expected = f"at most {self._limits.waiting} that wait, try again later"
                found = Refusal("has too many grammars before it", expected)
                _resolve(future, spec, found)
            else:
                self._pending[spec] = future
                self._tasks.put(spec)
            return future

    def close(self) -> None:
        """Kill what runs; whatever is pending fails. Returns when all is gone."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        self._worker.stop()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        # Without a grammar there is nobody to tell that it cannot be started.
        with suppress(OSError):
            self._worker.start()
        while (spec := self._tasks.get()) is not None:
            result: Result | RuntimeError
            started = time.monotonic()
            try:
                result = self._worker.compile(spec)
                self._observe(time.monotonic() - started)
            except OSError as error:
                result = RuntimeError(f"no grammar can be compiled: {error}")
            with self._lock:
                if not isinstance(result, RuntimeError):
                    self._cache.put(spec, result)
                future = self._pending.pop(spec)
            _resolve(future, spec, result)


def _resolve(
    future: Compilation, spec: GrammarSpec, result: Result | RuntimeError
) -> None:
    if isinstance(result, CompiledSpec):
        future.set_result(result)
    elif isinstance(result, Refusal):
        # A new error each time: one that is raised again grows its traceback.
        future.set_exception(spec.refused(*result))
    else:
        future.set_exception(result)


class _Cache:
    """Results: the latest used that fit, refusals for a while only."""

    def __init__(self, limits: GrammarLimits) -> None:
        self._limits = limits
        self._results: OrderedDict[GrammarSpec, tuple[Result, float, int]]
        self._results = OrderedDict()
        self.num_bytes = 0

    def get(self, spec: GrammarSpec) -> Result | None:
        """The result, None if there is none any more."""
        result, expiry, _ = self._results.get(spec, (None, 0.0, 0))
        if result is not None and time.monotonic() > expiry:
            self._drop(spec)
            return None
        if result is not None:
            self._results.move_to_end(spec)
        return result

    def put(self, spec: GrammarSpec, result: Result) -> None:
        """Remember a result and forget the oldest ones that do not fit."""
        size, expiry = _ENTRY_BYTES + len(spec.text), math.inf
        if isinstance(result, CompiledSpec):
            size += 8 * len(result.closing)
        else:
            expiry = time.monotonic() + self._limits.refusal_seconds
        self._results[spec] = (result, expiry, size)
        self.num_bytes += size
        while self.num_bytes > self._limits.cache_bytes:
            self._drop(next(iter(self._results)))

    def _drop(self, spec: GrammarSpec) -> None:
        self.num_bytes -= self._results.pop(spec)[2]


class _Worker:
    """The process that forks compilations, started again whenever it is gone."""

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits) -> None:
        self._vocabulary = vocabulary
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._stopped = False

    def compile(self, spec: GrammarSpec) -> Result:
        """Compile in a process of its own.

        Raises:
            OSError: the process cannot be started, or `stop` was called.

        """
        seconds = self._limits.compile_seconds
        # Nothing at all comes back if the process was gone before it forked.
        for _ in range(2):
            reply, taken = self._ask(json.dumps(spec).encode())
            if reply:
                break
        if self._stopped or not reply:
            raise ConnectionError("the compiling process is gone")
        try:
            answer = json.loads(reply)
        except ValueError:
            if taken < seconds:
                return Refusal("crashes its compiler", "a simpler grammar")
            reason = f"takes more than {seconds} seconds to compile"
            return Refusal(reason, "a simpler grammar")
        if "reason" in answer:
            return Refusal(**answer)
        answer["closing"] = tuple(answer["closing"])
        return CompiledSpec(spec, **answer)

    def start(self) -> None:
        """Start the process, wait until it is ready.

        Raises:
            OSError: it cannot be started, or `stop` was called.

        """
        with self._lock:
            self._running()

    def stop(self) -> None:
        """Kill the process with all that it forked, and start no other."""
        self._stopped = True
        self._kill()

    def _ask(self, request: bytes) -> tuple[bytes, float]:
        """What came back until the process that was forked ended, and when."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._send(request, theirs.fileno())
            started = time.monotonic()
            # Killed by its own alarm, unless something is very wrong.
            ours.settimeout(self._limits.compile_seconds + _GRACE_SECONDS)
            reply = b""
            try:
                while part := ours.recv(1 << 20):
                    reply += part
            except TimeoutError:
                self._kill()
            return reply, time.monotonic() - started

    def _send(self, request: bytes, fd: int) -> None:
        with self._lock:
            try:
                send_frame(self._running(), request, fd)
            except ConnectionError:
                self._kill()
                send_frame(self._running(), request, fd)

    def _running(self) -> socket.socket:
        """The socket of the process, which is started if there is none."""
        if self._requests and self._process and self._process.poll() is None:
            return self._requests
        if self._requests:
            self._requests.close()
        self._requests, theirs = socket.socketpair()
        self._requests.settimeout(_START_SECONDS)
        # Threads of the libraries that it imports would not survive a fork.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            with theirs:
                self._check_open()
                self._process = subprocess.Popen(
                    _WORKER,
                    stdin=theirs.fileno(),
                    env=environment,
                    start_new_session=True,
                )
            # `stop` may have come too early to see it.
            self._check_open()
            send_frame(self._requests, json.dumps(self._limits).encode())
            send_frame(self._requests, self._vocabulary.dumps())
            if not self._requests.recv(1):
                raise ConnectionError("the compiling process ended at its start")
        except OSError:
            self._kill()
            raise
        return self._requests

    def _check_open(self) -> None:
        if self._stopped:
            raise ConnectionError("closed")

    def _kill(self) -> None:
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
