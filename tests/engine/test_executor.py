# SPDX-License-Identifier: Apache-2.0
"""What lies between engine core and workers on a CPU, and who gets it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import CpuArchEnum, current_platform
from vllm.utils import cpu_resource_utils
from vllm.utils.cpu_resource_utils import LogicalCPUInfo
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_unmask.engine.executor import (
    MANY_CORES,
    SMALL_FORWARD,
    InProcessExecutor,
    OneCallExecutor,
    compute_cores,
    execute_and_sample,
)
from vllm_unmask.families import cpu_config


class Recorder(OneCallExecutor):
    """Notes calls instead of sending them."""

    def __init__(self, async_scheduling: bool) -> None:
        self.scheduler_config = SimpleNamespace(async_scheduling=async_scheduling)
        self.kv_output_aggregator = self.ec_output_aggregator = None
        self.output_rank = 3
        self.is_failed = True  # nothing to shut down
        self.calls: list[tuple[Any, Any, dict[str, Any]]] = []

    def collective_rpc(self, method: Any, *, args: Any = (), **kwargs: Any) -> str:
        self.calls.append((method, args, kwargs))
        return "reply"


class Worker:
    def __init__(self, output: str | None) -> None:
        self.output = output
        self.asked: list[Any] = []

    def execute_model(self, scheduler_output: Any) -> str | None:
        self.asked.append(scheduler_output)
        return self.output

    def sample_tokens(self, grammar_output: Any) -> str:
        self.asked.append(grammar_output)
        return "sampled"


@pytest.mark.parametrize("non_block", [False, True])
def test_a_synchronous_step_is_one_call(non_block: bool) -> None:
    executor = Recorder(async_scheduling=False)
    plan: Any = SimpleNamespace(has_structured_output_requests=False)
    assert executor.execute_model(plan, non_block) == "reply"
    assert executor.take_draft_token_ids() is None
    ((method, args, options),) = executor.calls
    assert (method, args) == (execute_and_sample, (plan,))
    assert options["non_block"] is non_block
    assert options["unique_reply_rank"] == 3


def test_who_forwards_sub_blocks_asks_what_the_step_has_left() -> None:
    executor = Recorder(async_scheduling=False)
    plan: Any = SimpleNamespace(has_structured_output_requests=True)
    executor.execute_model(plan)
    assert executor.take_draft_token_ids() == "reply"
    assert [call[0] for call in executor.calls][1:] == ["take_draft_token_ids"]


def test_with_a_step_in_flight_the_call_is_vllms() -> None:
    executor = Recorder(async_scheduling=True)
    executor.execute_model("plan", non_block=True)  # type: ignore[arg-type]
    ((method, args, _),) = executor.calls
    assert (method, args) == ("execute_model", ("plan",))


def test_the_step_samples_what_it_computed() -> None:
    worker = Worker(None)
    assert execute_and_sample(worker, "plan") == "sampled"  # type: ignore[arg-type]
    assert worker.asked == ["plan", None]


def test_a_step_without_a_forward_is_not_sampled() -> None:
    worker = Worker("empty")
    assert execute_and_sample(worker, "plan") == "empty"  # type: ignore[arg-type]
    assert worker.asked == ["plan"]


@pytest.mark.parametrize(
    ("backend", "processes", "cpu", "expected"),
    [
        # What vLLM writes for one worker and turns into "mp" on the CPU.
        ("uni", "1", True, cpu_config.IN_PROCESS),
        ("mp", "1", True, cpu_config.ONE_CALL),
        ("uni", "0", True, "uni"),
        ("uni", "1", False, "uni"),
        ("mp", "1", False, "mp"),
        ("their.Executor", "1", True, "their.Executor"),
    ],
)
def test_who_gets_which(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    processes: str,
    cpu: bool,
    expected: str,
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", processes)
    platform = SimpleNamespace(is_cpu=lambda: cpu)
    monkeypatch.setattr(cpu_config, "current_platform", platform)
    parallel = SimpleNamespace(distributed_executor_backend=backend)
    cpu_config.set_executor(SimpleNamespace(parallel_config=parallel))  # type: ignore[arg-type]
    assert parallel.distributed_executor_backend == expected


@pytest.mark.parametrize(
    ("path", "executor"),
    [
        (cpu_config.IN_PROCESS, InProcessExecutor),
        (cpu_config.ONE_CALL, OneCallExecutor),
    ],
)
def test_their_names_are_their_own(path: str, executor: type) -> None:
    assert path == f"{executor.__module__}.{executor.__name__}"


def cpus(*sizes: int) -> list[LogicalCPUInfo]:
    """CPUs of nodes of so many cores, two to a core."""
    found, core = [], 0
    for node, size in enumerate(sizes):
        for _ in range(size):
            found += [LogicalCPUInfo(2 * core + n, core, node) for n in (0, 1)]
            core += 1
    return found


@pytest.mark.skipif(not current_platform.is_cpu(), reason="of the CPU platform")
@pytest.mark.parametrize(
    ("bind", "machine", "expected"),
    [
        ("auto", cpus(2), [1, 3]),
        ("auto", cpus(1), [1]),
        ("auto", cpus(4, 4), [1, 3, 5, 7]),
        # Where cores are many, vLLM's reserve is left to the front end.
        ("auto", cpus(MANY_CORES + 1), [2 * n + 1 for n in range(MANY_CORES)]),
        ("0,2-3", cpus(8), [0, 2, 3]),
        ("nobind", cpus(8), []),
    ],
)
def test_which_cores_compute(
    monkeypatch: pytest.MonkeyPatch,
    bind: str,
    machine: list[LogicalCPUInfo],
    expected: list[int],
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    monkeypatch.setattr(cpu_resource_utils, "get_allowed_cpu_list", lambda: machine)
    nodes = sorted({cpu.numa_node for cpu in machine})
    monkeypatch.setattr(cpu_resource_utils, "get_visible_memory_node", lambda *_: nodes)
    monkeypatch.setattr(
        type(current_platform), "get_cpu_architecture", lambda *_: CpuArchEnum.X86
    )
    parallel = SimpleNamespace(
        local_world_size=1,
        data_parallel_rank_local=None,
        _api_process_count=1,
        assigned_physical_gpu_ids=None,
    )
    config: Any = SimpleNamespace(parallel_config=parallel, kv_transfer_config=None)
    assert compute_cores(config) == expected


@pytest.mark.parametrize(
    ("tokens", "size", "expected"),
    [
        (SMALL_FORWARD - 1, 1, 1),
        (SMALL_FORWARD, 1, 3),
        (32, SMALL_FORWARD // 32, 3),
        (31, SMALL_FORWARD // 32, 1),
    ],
)
def test_a_small_forward_has_one_thread(
    monkeypatch: pytest.MonkeyPatch, tokens: int, size: int, expected: int
) -> None:
    chosen = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch._C, "set_num_threads", chosen.append)
    ran = []
    monkeypatch.setattr(
        UniProcExecutor, "execute_model", lambda _, plan, non_block: ran.append(plan)
    )
    executor = object.__new__(InProcessExecutor)
    executor.num_threads, executor.size = 3, size
    executor.is_failed = True
    plan: Any = SimpleNamespace(total_num_scheduled_tokens=tokens)
    for _ in range(2):
        executor.execute_model(plan)
    # Told once: that costs torch its cache.
    assert chosen == [2, expected]
    assert ran == [plan, plan]
