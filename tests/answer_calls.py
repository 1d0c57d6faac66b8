# SPDX-License-Identifier: Apache-2.0
"""Functions on requests with shorter blocks that tests run beside an engine."""

import time
from typing import Any

import engine_calls


def number_of(request: str) -> int:
    """vLLM numbers the requests of a call."""
    return int(request.partition("-")[0])


def generate_preempted(
    llm: Any, prompts: list[list[int]], params: list[dict[str, Any]], every: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """`engine_calls.generate_recorded`, preempting the youngest every few steps.

    Args:
        every: how many; 0 for never.
    """
    scheduler = engine_calls.scheduler(llm)
    schedule = scheduler.schedule
    steps = preempted = 0

    def preempting(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps, preempted
        steps += 1
        if every and steps % every == 0 and len(scheduler.running) > 1:
            victim = scheduler.running.pop()
            scheduler._preempt_request(victim, time.monotonic())
            preempted += 1
        return schedule(*args, **kwargs)

    scheduler.schedule = preempting
    try:
        outputs, records = engine_calls.generate_recorded(llm, prompts, params)
    finally:
        del scheduler.schedule
    return outputs, records, preempted
