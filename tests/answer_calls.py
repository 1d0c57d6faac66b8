# SPDX-License-Identifier: Apache-2.0
"""Functions on requests with shorter blocks that tests run beside an engine."""

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
    with engine_calls.preempting(llm, every) as preempted:
        outputs, records = engine_calls.generate_recorded(llm, prompts, params)
    return outputs, records, len(preempted)
