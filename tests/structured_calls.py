# SPDX-License-Identifier: Apache-2.0
"""Functions on structured output that tests run beside an engine."""

import time
from typing import Any
from unittest import mock

import engine_calls


def chat(
    llm: Any, prompts: list[str], params: list[dict[str, Any]] | dict[str, Any]
) -> list[dict[str, Any]]:
    """Answers to one-message conversations.

    ``params`` holds arguments of ``SamplingParams``; ``structured_outputs`` in it
    is a dict of arguments of ``StructuredOutputsParams``.
    """
    each = params if isinstance(params, list) else [params] * len(prompts)
    outputs = llm.chat(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        [_sampling_params(p) for p in each],
        use_tqdm=False,
    )
    return [
        {
            "text": output.outputs[0].text,
            "texts": [sample.text for sample in output.outputs],
            "tokens": list(output.outputs[0].token_ids),
            "finish_reason": output.outputs[0].finish_reason,
            "num_cached_tokens": output.num_cached_tokens,
            "logprobs": output.outputs[0].logprobs,
        }
        for output in outputs
    ]


def _sampling_params(params: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = {"temperature": 0, "max_tokens": 120} | params
    if grammar := params.pop("structured_outputs", None):
        grammar = StructuredOutputsParams(**grammar)
    return SamplingParams(**params, structured_outputs=grammar)


def refusal(llm: Any, params: dict[str, Any]) -> str:
    """The error of a request that is refused, and that the engine lives on."""
    from vllm.exceptions import VLLMValidationError

    try:
        chat(llm, ["a"], params)
    except VLLMValidationError as error:
        assert chat(llm, ["a"], {"max_tokens": 1})[0]["tokens"]
        return str(error)
    raise AssertionError("not refused")


def left_to_right(
    llm: Any, prompt: str, schema: str, max_tokens: int
) -> tuple[list[int], list[int]]:
    """Tokens of one constrained request, and of masked left-to-right decoding.

    The second asks the engine for one plain token at a time, and allows it what a
    fresh matcher does.
    """
    import xgrammar
    from vllm import SamplingParams

    from vllm_unmask.grammar.vocabulary import Vocabulary

    tokenizer = llm.get_tokenizer()
    config = llm.model_config.hf_config
    vocabulary = Vocabulary.from_huggingface(
        tokenizer, config.vocab_size, config.mask_token_id, [tokenizer.eos_token_id]
    )
    compiled = xgrammar.GrammarCompiler(vocabulary.info).compile_json_schema(
        schema, max_whitespace_cnt=1
    )
    matcher = xgrammar.GrammarMatcher(compiled)
    bitmask = xgrammar.allocate_token_bitmask(1, vocabulary.vocab_size)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=False,
    )
    tokens: list[int] = []
    while len(tokens) < max_tokens and not matcher.is_terminated():
        matcher.fill_next_token_bitmask(bitmask)
        legal = [
            token
            for token in range(vocabulary.vocab_size)
            if (int(bitmask[0, token // 32]) >> token % 32) & 1
        ]
        params = SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=legal)
        (output,) = llm.generate(
            [{"prompt_token_ids": ids + tokens}], params, use_tqdm=False
        )
        tokens += output.outputs[0].token_ids
        assert matcher.accept_token(tokens[-1])
    grammar = {"json": schema}
    ours = chat(llm, [prompt], {"structured_outputs": grammar, "max_tokens": 200})
    return ours[0]["tokens"], tokens


def chat_with_fault(
    llm: Any, prompts: list[str], params: list[dict[str, Any]], faulty: int
) -> list[dict[str, Any]]:
    """``chat``; the grammar of request ``faulty`` raises in its third step."""
    from vllm_unmask.engine import grammar

    steps = 0
    victim: list[Any] = []
    original = grammar.GrammarState.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        if not victim and self.max_tokens == params[faulty]["max_tokens"]:
            victim.append(self)
        if victim and self is victim[0]:
            steps += 1
            if steps == 3:
                raise ValueError("a fault for the test")
        return original(self, *args, **kwargs)

    grammar.GrammarState.step = step  # type: ignore[method-assign]
    try:
        return chat(llm, prompts, params)
    finally:
        grammar.GrammarState.step = original  # type: ignore[method-assign]


def chat_with_triton(
    llm: Any, prompts: list[str], params: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], int]:
    """``chat`` with what a GPU runs, in Triton's interpreter; and how often it ran."""
    from vllm_unmask.kernels.row_statistics import cpu, triton

    kernel = mock.Mock(side_effect=triton.row_statistics)
    with mock.patch.object(cpu, "row_statistics", kernel):
        return chat(llm, prompts, params), kernel.call_count


def chat_counting_logits(
    llm: Any, prompts: list[str], params: list[dict[str, Any]], every: bool
) -> tuple[list[dict[str, Any]], int, int]:
    """``chat``, of every position or as always; and two counts.

    Logits rows, and steps in which some were to be left out.
    """
    from vllm_unmask.engine import model_state

    num_rows = 0
    runner = engine_calls.model_runner(llm)
    original = runner.model.compute_logits

    def compute_logits(hidden: Any) -> Any:
        nonlocal num_rows
        num_rows += len(hidden)
        return original(hidden)

    choose = mock.Mock(side_effect=model_state.positions_read)
    if every:
        choose = mock.Mock(return_value=None)
    with (
        mock.patch.object(runner.model, "compute_logits", compute_logits),
        mock.patch.object(model_state, "positions_read", choose),
    ):
        return chat(llm, prompts, params), num_rows, choose.call_count


def chat_with_slow_compiler(
    llm: Any, prompts: list[str], params: list[dict[str, Any]], seconds: float
) -> tuple[list[dict[str, Any]], list[float]]:
    """``chat``, and when each request was finished, in seconds.

    The worker takes ``seconds`` for a grammar that says "slow".
    """
    from vllm_unmask.engine import grammar
    from vllm_unmask.grammar.spec import GrammarSpec

    load = grammar.Grammars._load

    def slow(self: Any, record: Any) -> Any:
        if "slow" in GrammarSpec(*record["grammar"]).text:
            time.sleep(seconds)
        return load(self, record)

    ends: dict[str, float] = {}
    scheduler = engine_calls.scheduler(llm)
    free = scheduler._free_request
    started = time.monotonic()

    def note(request: Any, *args: Any, **kwargs: Any) -> Any:
        ends[request.request_id] = time.monotonic() - started
        return free(request, *args, **kwargs)

    grammar.Grammars._load = slow  # type: ignore[method-assign]
    scheduler._free_request = note
    try:
        outputs = chat(llm, prompts, params)
    finally:
        grammar.Grammars._load = load  # type: ignore[method-assign]
        del scheduler._free_request
    return outputs, [ends[key] for key in sorted(ends, key=_number)]


def _number(request_id: str) -> int:
    return int(request_id.split("-")[0])


def num_grammars(llm: Any) -> int:
    """Requests whose grammar the worker still holds."""
    return len(engine_calls.model_runner(llm).model_state.grammars.requests)


def metrics(llm: Any) -> dict[str, float]:
    """Our counters, and the observations of our histograms."""
    return {
        metric.name.removeprefix("vllm:unmask_"): getattr(
            metric, "value", getattr(metric, "count", 0)
        )
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:unmask_")
    }


def chat_preempted(
    llm: Any, prompts: list[str], params: Any, every: int
) -> tuple[list[dict[str, Any]], int]:
    """``chat``, with the youngest request preempted every few steps."""
    with engine_calls.preempting(llm, every) as preempted:
        answers = chat(llm, prompts, params)
    return answers, len(preempted)
