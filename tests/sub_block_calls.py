# SPDX-License-Identifier: Apache-2.0
"""Functions on forwards of sub-blocks that tests run beside an engine."""

from typing import Any

import engine_calls


def count_parts(
    llm: Any, prompts: list[list[int]], params: Any
) -> tuple[int, int, int]:
    """Steps of a request that forward a part of its block, positions that steps have
    changed without having their rows, and logits rows that are another request's."""
    from vllm_unmask.decoding.canvas import active_ids

    runner = engine_calls.model_runner(llm)
    sampler = runner.sampler
    original, sample = sampler._denoise, runner.sample
    length = sampler.geometry.block_length
    batch: Any = None
    num_parts = num_changes = num_strange = 0

    def noting_sample(hidden: Any, input_batch: Any, *args: Any) -> Any:
        nonlocal batch
        batch = input_batch
        return sample(hidden, input_batch, *args)

    def denoise(logits: Any, rows: Any) -> Any:
        nonlocal num_parts, num_changes, num_strange
        before = active_ids(sampler.states.gather(rows.slots))
        stepped = original(logits, rows)
        bounds = batch.query_start_loc_np
        read = batch.logits_indices[: len(rows.slots_np) * length].view(-1, length)
        for of_request, index in zip(read, rows.batch_index.tolist(), strict=True):
            own = (of_request >= bounds[index]) & (of_request < bounds[index + 1])
            num_strange += int((~own).sum())
        if rows.forwarded is not None:
            # A complete block is the first of its canvas, as any block after a step.
            after = sampler.states.canvas.ids[rows.slots, :length]
            changed = (before != after) & ~rows.forwarded
            num_parts += int((~rows.forwarded.all(dim=1)).sum())
            num_changes += int(changed.sum())
        return stepped

    sampler._denoise, runner.sample = denoise, noting_sample
    try:
        engine_calls.generate(llm, prompts, params)
    finally:
        del sampler._denoise, runner.sample
    return num_parts, num_changes, num_strange
