# SPDX-License-Identifier: Apache-2.0
"""Functions that tests run beside an engine (``EngineProcess.run``)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


def generate(
    llm: Any, prompts: list[list[int]], params: list[dict[str, Any]] | dict[str, Any]
) -> list[dict[str, Any]]:
    """What came of each prompt: tokens, log-probabilities, trace and so on."""
    from vllm import SamplingParams

    each = params if isinstance(params, list) else [params] * len(prompts)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [SamplingParams(detokenize=False, **p) for p in each],
        use_tqdm=False,
    )
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "all_tokens": [list(sample.token_ids) for sample in output.outputs],
            "finish_reason": output.outputs[0].finish_reason,
            "num_cached_tokens": output.num_cached_tokens,
            "logprobs": [
                {token: (lp.logprob, lp.rank) for token, lp in position.items()}
                for position in output.outputs[0].logprobs or []
            ],
            "trace": (output.kv_transfer_params or {}).get("unmask_trace"),
        }
        for output in outputs
    ]


def model_runner(llm: Any) -> Any:
    """The worker's model runner (the engine core runs in this process)."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def scheduler(llm: Any) -> Any:
    """The engine core's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


@contextmanager
def preempting(llm: Any, every: int) -> Iterator[list[str]]:
    """Preempt the youngest request every few steps, 0 for never; yields whom."""
    of = scheduler(llm)
    schedule = of.schedule
    steps = 0
    preempted: list[str] = []

    def preempt_and_schedule(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if every and steps % every == 0 and len(of.running) > 1:
            victim = of.running.pop()
            of._preempt_request(victim, time.monotonic())
            preempted.append(victim.request_id)
        return schedule(*args, **kwargs)

    of.schedule = preempt_and_schedule
    try:
        yield preempted
    finally:
        del of.schedule


def generate_recorded(
    llm: Any, prompts: list[list[int]], params: list[dict[str, Any]] | dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """``generate``, and for each denoising step of each request what it saw.

    Every record: ``prefix`` (ids left of the active block), ``active`` (its ids
    before the step), ``num_fixed`` (of them from the prompt), ``logits`` [width,
    vocab] (of known positions, too), ``rows`` (rows forwarded), ``pages`` (KV pages in
    order).
    """
    from vllm_unmask.engine import model_state

    runner = model_runner(llm)
    sampler = runner.sampler
    records: list[dict[str, Any]] = []
    original, sample = sampler._denoise, runner.sample
    batch: Any = None

    def noting_sample(hidden: Any, input_batch: Any, *args: Any) -> Any:
        nonlocal batch
        batch = input_batch
        return sample(hidden, input_batch, *args)

    def denoise(logits: Any, rows: Any) -> Any:
        from vllm_unmask.decoding.canvas import active_ids

        length = sampler.geometry.block_length
        canvas = sampler.states.gather(rows.slots)
        active = active_ids(canvas)
        tokens = runner.req_states.all_token_ids.gpu
        for i, slot in enumerate(rows.slots_np.tolist()):
            width = int(rows.width[i])
            if width == 0:
                continue
            start = int(rows.start[i])
            index = int(rows.batch_index[i])
            records.append(
                {
                    "request": batch.req_ids[index],
                    "prefix": tokens[slot, :start].tolist(),
                    "active": active[i, :width].tolist(),
                    "num_fixed": int(canvas.num_fixed[i]),
                    "logits": logits[i * length : i * length + width].clone(),
                    "rows": int(batch.num_scheduled_tokens[index]),
                    "pages": runner.block_tables.block_tables[0]
                    .gpu[slot, : int(runner.block_tables.num_blocks.np[0, slot])]
                    .tolist(),
                }
            )
        return original(logits, rows)

    sampler._denoise, runner.sample = denoise, noting_sample
    try:
        with mock.patch.object(model_state, "positions_read", return_value=None):
            outputs = generate(llm, prompts, params)
    finally:
        del sampler._denoise, runner.sample
    return outputs, records


def read_pages(llm: Any, pages: list[int]) -> Any:
    """KV of the given pages, [layers, pages, ...], as the backend keeps it."""
    import torch

    return torch.stack([cache[pages].clone() for cache in model_runner(llm).kv_caches])


def generate_counting(
    llm: Any, prompts: list[list[int]], params: Any
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """``generate``, and how many preemptions and mixed steps it took."""
    counts = {"preemptions": 0, "mixed_steps": 0, "steps": 0, "widest_step": 0}
    sched = scheduler(llm)
    preempt, schedule = sched._preempt_request, sched.schedule

    def counting_preempt(*args: Any, **kwargs: Any) -> Any:
        counts["preemptions"] += 1
        return preempt(*args, **kwargs)

    def counting_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        scheduled = set(output.num_scheduled_tokens)
        # A prompt's last chunk has a canvas as well.
        prefilling = {request.req_id for request in output.scheduled_new_reqs}
        prefilling |= scheduled - set(output.scheduled_spec_decode_tokens)
        counts["mixed_steps"] += bool(prefilling and scheduled - prefilling)
        counts["steps"] += bool(scheduled)
        counts["widest_step"] = max(
            counts["widest_step"], output.total_num_scheduled_tokens
        )
        return output

    sched._preempt_request, sched.schedule = counting_preempt, counting_schedule
    try:
        return generate(llm, prompts, params), counts
    finally:
        del sched._preempt_request, sched.schedule


def generate_with_aborts(
    llm: Any,
    prompts: list[list[int]],
    params: dict[str, Any],
    doomed: list[list[int]],
    steps: int,
) -> list[list[int]]:
    """Start ``doomed`` requests, abort them after ``steps`` steps, then generate."""
    from vllm import SamplingParams

    engine = llm.llm_engine

    def add(name: str, prompt: list[int], options: dict[str, Any]) -> None:
        engine.add_request(
            name,
            {"prompt_token_ids": prompt},
            SamplingParams(detokenize=False, **options),
        )

    for index, prompt in enumerate(doomed):
        endless = {"temperature": 1.0, "max_tokens": 200, "ignore_eos": True}
        add(f"doomed-{index}", prompt, endless)
    for _ in range(steps):
        engine.step()
    engine.abort_request([f"doomed-{index}" for index in range(len(doomed))])
    for index, prompt in enumerate(prompts):
        add(f"wanted-{index}", prompt, params)
    outputs = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                outputs[output.request_id] = list(output.outputs[0].token_ids)
    return [outputs[f"wanted-{index}"] for index in range(len(prompts))]


def reset_prefix_cache(llm: Any) -> None:
    """Forget cached prefixes."""
    assert llm.reset_prefix_cache()


def chat_counting(
    llm: Any, prompts: list[str], params: dict[str, Any]
) -> tuple[list[tuple[str, int]], int]:
    """(text, output tokens) of each user message, and all denoising steps.

    A denoising step is a request's share of one forward pass.
    """
    from vllm import SamplingParams

    sched = scheduler(llm)
    schedule = sched.schedule
    steps = 0

    def counting_schedule(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        output = schedule(*args, **kwargs)
        steps += len(output.scheduled_spec_decode_tokens)
        return output

    sched.schedule = counting_schedule
    try:
        outputs = llm.chat(
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            SamplingParams(**params),
            use_tqdm=False,
        )
    finally:
        del sched.schedule
    return [
        (output.outputs[0].text, len(output.outputs[0].token_ids)) for output in outputs
    ], steps
