# SPDX-License-Identifier: Apache-2.0
"""Functions on strategies that tests run beside an engine."""

from typing import Any

import engine_calls


def fillers(strategy: str) -> frozenset[str]:
    """What a strategy is made of."""
    from vllm_unmask.presets import compose

    return compose(strategy).fillers


def use_byte_tokenizer(llm: Any) -> None:
    """Give a checkpoint without a tokenizer some delimiters."""
    state = engine_calls.model_runner(llm).model_state
    delimiters = state.strategies.delimiters
    import torch

    for name, first in (("newline", 0), ("comma", 1), ("period", 2)):
        ids = torch.zeros(state.vocab_size, dtype=torch.bool)
        ids[first::7] = True
        delimiters.known[name] = ids


def generate_traced(
    llm: Any, prompts: list[list[int]], params: dict[str, Any]
) -> list[dict[str, Any]]:
    """Tokens, trace and forwards of each prompt, one request at a time."""
    from vllm import SamplingParams

    sched = engine_calls.scheduler(llm)
    update = sched.update_from_output
    answers = []
    for prompt in prompts:
        forwards = 0

        def counting(scheduler_output: Any, output: Any) -> Any:
            nonlocal forwards
            drafts = scheduler_output.scheduled_spec_decode_tokens
            # A step that was already planned when the request ended says nothing.
            forwards += sum(req_id in sched.requests for req_id in drafts)
            return update(scheduler_output, output)

        sched.update_from_output = counting
        try:
            (output,) = llm.generate(
                [{"prompt_token_ids": prompt}],
                SamplingParams(detokenize=False, **params),
                use_tqdm=False,
            )
        finally:
            del sched.update_from_output
        answers.append(
            {
                "tokens": list(output.outputs[0].token_ids),
                "finish_reason": output.outputs[0].finish_reason,
                "trace": output.kv_transfer_params["unmask_trace"],
                "forwards": forwards,
            }
        )
    return answers


def refusal(llm: Any, params: dict[str, Any]) -> str:
    """The error of a request that is refused, and that the engine lives on."""
    from vllm.exceptions import VLLMValidationError

    try:
        engine_calls.generate(llm, [[1, 2, 3]], params)
    except VLLMValidationError as error:
        plain = {"temperature": 0.0, "max_tokens": 1}
        assert engine_calls.generate(llm, [[1, 2, 3]], plain)[0]["tokens"]
        return str(error)
    raise AssertionError("not refused")


def presets() -> list[str]:
    """Names of published configurations."""
    from vllm_unmask.presets import PRESETS

    return list(PRESETS)
