# SPDX-License-Identifier: Apache-2.0
"""Functions on self-speculation that tests run beside an engine."""

import itertools
from typing import Any

import engine_calls


def use_random_weights(llm: Any, seed: int, sharpness: float = 1.0) -> None:
    """Replace the model by another one of its shape.

    Args:
        llm: the engine.
        seed: of the weights.
        sharpness: factor of the logits.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in engine_calls.model_runner(llm).model.named_parameters():
        if parameter.dim() > 1:
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values * parameter.shape[-1] ** -0.5)
        elif name == "model.norm.weight":
            parameter.data.fill_(sharpness)
    engine_calls.reset_prefix_cache(llm)


def compare_random_models(
    llm: Any,
    num_models: int,
    prompts: list[list[int]],
    params: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Every request with and without speculation, on models of many seeds.

    Even seeds run their prompts together, odd ones each alone.
    """
    compared = []
    for seed in range(num_models):
        use_random_weights(llm, seed, sharpness=0.5 + seed % 4)
        batches = [[prompt] for prompt in prompts] if seed % 2 else [prompts]
        for asked in params:
            strategy = asked["extra_args"]["unmask_strategy"]
            faster = asked["extra_args"] | {"unmask_strategy": f"{strategy}+freedave"}
            tokens = []
            forwards = []
            for given in (asked, asked | {"extra_args": faster}):
                runs = [
                    engine_calls.generate_counting(llm, batch, given)
                    for batch in batches
                ]
                tokens.append([one["tokens"] for run, _ in runs for one in run])
                forwards.append(sum(counts["steps"] for _, counts in runs))
            compared.append(
                {
                    "seed": seed,
                    "strategy": strategy,
                    "same": tokens[0] == tokens[1],
                    "careful": forwards[0],
                    "speculative": forwards[1],
                }
            )
    return compared


def generate(
    llm: Any, prompts: list[list[int]], params: dict[str, Any]
) -> list[dict[str, Any]]:
    """``engine_calls.generate``; bad words may be given as token ids."""
    from vllm import SamplingParams

    params = dict(params)
    words = params.pop("bad_words_token_ids", None)
    if words is None:
        return engine_calls.generate(llm, prompts, params)
    verify = SamplingParams.update_from_tokenizer

    def update_from_tokenizer(self: Any, tokenizer: Any) -> None:
        self._bad_words_token_ids = words

    SamplingParams.update_from_tokenizer = update_from_tokenizer
    try:
        return engine_calls.generate(llm, prompts, params | {"bad_words": ["any"]})
    finally:
        SamplingParams.update_from_tokenizer = verify


def chat_counting_forwards(
    llm: Any, prompts: list[str], params: dict[str, Any]
) -> tuple[list[list[int]], int]:
    """Tokens of each prompt, one request at a time, and the forwards of all."""
    from vllm import SamplingParams

    tokens, forwards = [], 0
    sched = engine_calls.scheduler(llm)
    schedule = sched.schedule

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal forwards
        output = schedule(*args, **kwargs)
        forwards += bool(output.total_num_scheduled_tokens)
        return output

    sched.schedule = counting
    try:
        for prompt in prompts:
            (output,) = llm.generate([prompt], SamplingParams(**params), use_tqdm=False)
            tokens.append(list(output.outputs[0].token_ids))
    finally:
        del sched.schedule
    return tokens, forwards


def generate_preempted(
    llm: Any, prompts: list[list[int]], params: list[dict[str, Any]], every: int
) -> tuple[list[list[int]], int]:
    """Tokens of each prompt, and how often a request was preempted meanwhile."""
    with engine_calls.preempting(llm, every) as preempted:
        outputs = engine_calls.generate(llm, prompts, params)
    return [one["tokens"] for one in outputs], len(preempted)


def generate_planned(
    llm: Any, prompts: list[list[int]], params: list[dict[str, Any]]
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Tokens of each prompt, and what each step was.

    Every step: ``rows`` of all requests, ``windows`` of all of them, ``spare`` pages
    of a request, more than its canvas has, at most.
    """
    sched = engine_calls.scheduler(llm)
    schedule = sched.schedule
    steps: list[dict[str, Any]] = []

    def spare(req_id: str) -> int:
        (pages,) = sched.kv_cache_manager.get_block_ids(req_id)
        return len(pages) - -(-sched.plans[req_id].end // sched.block_size)

    def noting(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        drafts = output.scheduled_spec_decode_tokens.values()
        if output.num_scheduled_tokens:
            steps.append(
                {
                    "rows": sum(output.num_scheduled_tokens.values()),
                    "windows": sum(max(len(of) - 4, 0) for of in drafts),
                    "spare": max(map(spare, output.num_scheduled_tokens)),
                }
            )
        return output

    sched.schedule = noting
    try:
        outputs = engine_calls.generate(llm, prompts, params)
    finally:
        del sched.schedule
    return [one["tokens"] for one in outputs], steps


def throttle(llm: Any, pattern: list[bool]) -> None:
    """Say in which steps drafts may be verified, over and over again."""
    of = engine_calls.scheduler(llm).throttle
    allowed = itertools.cycle(pattern)

    def next_step(num_running: int) -> None:
        of.allowed = next(allowed)

    # Nothing is measured, so that nothing else is chosen.
    of.next_step = next_step
    of.start = of.finish = lambda *args: None


def throttle_by_clock(
    llm: Any, prompts: list[list[int]], params: Any, seconds: float, num_runs: int
) -> list[float]:
    """Share of steps that may verify in each run, where they take so many seconds and
    the others one."""
    from vllm_unmask.engine.throttle import Throttle

    sched = engine_calls.scheduler(llm)
    now = 0.0
    steps = [0, 0]

    def clock() -> float:
        nonlocal now
        steps[of.allowed] += 1
        now += seconds if of.allowed else 1.0
        return now

    of = sched.throttle
    if "next_step" in vars(of):  # another test has chosen by itself
        of = sched.throttle = Throttle()
    of.depth.clock = clock
    shares = []
    for _ in range(num_runs):
        steps[:] = [0, 0]
        engine_calls.generate(llm, prompts, params)
        shares.append(steps[True] / sum(steps))
    return shares


def unmasked(llm: Any) -> int:
    """Tokens that requests have unmasked whose drafts may stay unverified."""
    (count,) = (
        metric.value
        for metric in llm.get_metrics()
        if metric.name == "vllm:unmask_speculation_tokens_unmasked"
    )
    return int(count)
