# SPDX-License-Identifier: Apache-2.0
"""A real engine in a process of its own.

vLLM keeps process-wide state, so each engine gets a process; inside it the
engine core and the worker run in that same process (no further
multiprocessing), so that a test can look at tensors between two steps.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from typing import Any
from unittest.mock import patch

import torch

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Two engines or a busy neighbour: spinning threads would starve them.
    "OMP_NUM_THREADS": "1",
}
# What takes an engine longest to import, and starts no thread.
PRELOADED = ["vllm.entrypoints.llm", "vllm.v1.worker.gpu.model_runner"]


@cache
def _forkserver() -> Any:
    """Processes that are forks of one that has imported vLLM, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return context


def _start_method(env: dict[str, str] | None) -> Any:
    # Some variables are read when a module is imported, and a fork may not use a GPU
    # that its parent has looked at.
    if env or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    return _forkserver()


def _serve(connection: Any, kwargs: dict[str, Any], env: dict[str, str]) -> None:
    os.environ.update(env)
    async_scheduling = kwargs.pop("async_scheduling", False)
    try:
        from vllm import LLM

        if async_scheduling:
            _keep_async_scheduling()
        llm = LLM(**kwargs)
        connection.send((True, None))
    except BaseException:
        connection.send((False, traceback.format_exc()))
        return
    while (call := connection.recv()) is not None:
        function, args, options = call
        try:
            connection.send((True, function(llm, *args, **options)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _keep_async_scheduling() -> None:
    """vLLM's CPU platform switches asynchronous scheduling off; tests want it."""
    from vllm.platforms import current_platform

    cls = type(current_platform)
    original = cls.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    cls.check_and_update_config = classmethod(check_and_update_config)  # type: ignore[method-assign]


class EngineProcess:
    """Runs module-level functions ``function(llm, *args)`` beside an engine."""

    def __init__(self, *, env: dict[str, str] | None = None, **kwargs: Any) -> None:
        context = _start_method(env)
        self._connection, child = context.Pipe()
        settings = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 64 << 20,
            "disable_log_stats": True,
        }
        self._process = context.Process(
            target=_serve,
            args=(child, {**settings, **kwargs}, {**ENVIRONMENT, **(env or {})}),
        )
        self._process.start()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def _receive(self) -> Any:
        while not self._connection.poll(1):
            if not self._process.is_alive():
                raise RuntimeError("the engine process died")
        ok, value = self._connection.recv()
        if not ok:
            raise RuntimeError(value)
        return value

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call ``function(llm, *args, **options)`` in the engine's process."""
        self._connection.send((function, args, options))
        return self._receive()

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            try:
                self._connection.send(None)
                self._process.join(10)
            except OSError:
                pass
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
