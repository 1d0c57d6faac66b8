# SPDX-License-Identifier: Apache-2.0
"""Functions on forwards of sub-blocks that tests run beside an engine."""

from typing import Any

import engine_calls


def changes_without_rows(
    llm: Any, prompts: list[list[int]], params: Any
) -> tuple[int, int]:
    """Steps of a request that forward a part of its block, and positions that steps
    have changed without having their rows."""
    from vllm_unmask.decoding.canvas import active_ids

    sampler = engine_calls.model_runner(llm).sampler
    original = sampler._denoise
    num_parts = num_changes = 0

    def denoise(logits: Any, rows: Any) -> Any:
        nonlocal num_parts, num_changes
        before = active_ids(sampler.states.gather(rows.slots))
        stepped = original(logits, rows)
        if rows.forwarded is not None:
            # A complete block is the first of its canvas, as any block after a step.
            after = sampler.states.canvas.ids[rows.slots, : before.shape[1]]
            changed = (before != after) & ~rows.forwarded
            num_parts += int((~rows.forwarded.all(dim=1)).sum())
            num_changes += int(changed.sum())
        return stepped

    sampler._denoise = denoise
    try:
        engine_calls.generate(llm, prompts, params)
    finally:
        del sampler._denoise
    return num_parts, num_changes
