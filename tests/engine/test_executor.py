# SPDX-License-Identifier: Apache-2.0
"""One call to the workers a step: what it is and who gets it."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_unmask.engine.executor import OneCallExecutor, execute_and_sample
from vllm_unmask.families import config_hook


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
        ("uni", "1", True, config_hook.EXECUTOR),
        ("mp", "1", True, config_hook.EXECUTOR),
        ("uni", "0", True, "uni"),
        ("uni", "1", False, "uni"),
        ("mp", "1", False, "mp"),
        ("their.Executor", "1", True, "their.Executor"),
    ],
)
def test_who_gets_it(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    processes: str,
    cpu: bool,
    expected: str,
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", processes)
    platform = SimpleNamespace(is_cpu=lambda: cpu)
    monkeypatch.setattr(config_hook, "current_platform", platform)
    parallel = SimpleNamespace(distributed_executor_backend=backend)
    config_hook._set_executor(SimpleNamespace(parallel_config=parallel))  # type: ignore[arg-type]
    assert parallel.distributed_executor_backend == expected


def test_its_name_is_its_own() -> None:
    module, name = config_hook.EXECUTOR.rsplit(".", 1)
    assert (module, name) == (OneCallExecutor.__module__, OneCallExecutor.__name__)
