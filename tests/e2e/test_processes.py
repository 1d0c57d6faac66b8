# SPDX-License-Identifier: Apache-2.0
"""Where engine core and worker run, with vLLM's processes as they are by default."""

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import engine_calls
import pytest
import torch
from checkpoints import EOS, sdar_config, write_checkpoint
from engine_process import EngineProcess
from vllm.platforms import current_platform

from vllm_unmask.engine.executor import SMALL_FORWARD

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="of the CPU platform"),
]

CORE = min(os.sched_getaffinity(0))
DEFAULT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    # For `where`, which is sent to the worker.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


class Place(NamedTuple):
    """Where a function runs."""

    process: int
    parent: int
    threads: int
    cpus: frozenset[int]


def _place(*_: Any) -> Place:
    cpus = frozenset(os.sched_getaffinity(0))
    return Place(os.getpid(), os.getppid(), torch.get_num_threads(), cpus)


def where(llm: Any) -> tuple[Place, list[Place]]:
    """The front end and the workers."""
    return _place(), llm.collective_rpc(_place)


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, EngineProcess]]:
    path = tmp_path_factory.mktemp("sdar")
    write_checkpoint(path, sdar_config(block_size=4))
    options: dict[str, dict[str, Any]] = {
        "default": {"env": DEFAULT},
        "one process": {},
        "mp": {"env": DEFAULT, "distributed_executor_backend": "mp"},
        "one core": {"env": DEFAULT | {"VLLM_CPU_OMP_THREADS_BIND": str(CORE)}},
    }
    with ThreadPoolExecutor(2) as pool:
        starting = {
            name: pool.submit(EngineProcess, model=str(path), **kwargs)
            for name, kwargs in options.items()
        }
    started = [f.result() for f in starting.values() if not f.exception()]
    try:
        yield {name: future.result() for name, future in starting.items()}
    finally:
        for engine in started:
            engine.close()


def test_the_worker_shares_the_engine_cores_process(
    engines: dict[str, EngineProcess],
) -> None:
    front, (worker,) = engines["default"].run(where)
    assert worker.parent == front.process
    front, (worker,) = engines["mp"].run(where)
    assert worker.parent != front.process


def test_all_cores_compute(engines: dict[str, EngineProcess]) -> None:
    # No request has come yet: this model is so small that one thread serves it.
    default = engines["default"]
    _, (worker,) = default.run(where)
    assert worker.threads == len(worker.cpus)
    # vLLM's own worker leaves one out, of so few.
    cores = len(os.sched_getaffinity(0))
    if 1 < cores < 8:
        _, (alone,) = engines["mp"].run(where)
        assert worker.threads > alone.threads
    default.run(engine_calls.generate, [[1]], {"max_tokens": 1})
    _, (worker,) = default.run(where)
    assert worker.threads == 1


def test_cores_that_are_named_are_the_ones(engines: dict[str, EngineProcess]) -> None:
    _, (worker,) = engines["one core"].run(where)
    assert worker.cpus == {CORE} and worker.threads == 1


def test_tokens_do_not_depend_on_it(engines: dict[str, EngineProcess]) -> None:
    draw = random.Random(0)
    # Together they are a forward that threads share, and the steps behind it are not.
    lengths = (1, 3, 8, 17, 33, 200, 210, 220)
    prompts = [[draw.randrange(EOS) for _ in range(n)] for n in lengths]
    size = 12 * sdar_config()["num_hidden_layers"] * sdar_config()["hidden_size"] ** 2
    assert sum(lengths) * size > SMALL_FORWARD
    params = {"max_tokens": 24, "temperature": 1, "seed": 3, "logprobs": 1}
    outputs = {
        name: engine.run(engine_calls.generate, prompts, params)
        for name, engine in engines.items()
    }
    assert outputs["default"] == outputs["one process"] == outputs["mp"]
    assert outputs["one core"] == outputs["default"]
