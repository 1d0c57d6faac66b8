# SPDX-License-Identifier: Apache-2.0
"""The demo model behind `vllm serve`, driven by OpenAI's client."""

import inspect
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import openai
import pytest
from e2e.server import Server
from transformers import AutoTokenizer, PreTrainedTokenizerBase

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
MODEL = DEMO / "sdar"
CONFIG = json.loads((MODEL / "config.json").read_text())
BLOCK = CONFIG["block_size"]
MASK = CONFIG["mask_token_id"]
EOS = CONFIG["eos_token_id"]
MAX_MODEL_LEN = 512

STATIC = {"unmask_strategy": "static"}
# Two whole blocks of text that the model has not been trained on: a block that
# starts with the output, and outputs that are anything but certain.
ALIGNED = list(range(100, 100 + 2 * BLOCK))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(
        MODEL,
        *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN)),
        *("--max-num-seqs", "16", "--kv-cache-memory-bytes", str(64 << 20)),
        log=tmp_path_factory.mktemp("http") / "server.log",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def record(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt of an unseen record, whose answer is varied text."""
    (row,) = held_out("json", 1)
    return tokenizer.encode(render(tokenizer, row["prompt"]), add_special_tokens=False)


def render(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
    )


def held_out(task: str, count: int) -> list[dict[str, str]]:
    lines = (DEMO / "held_out.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["task"] == task]
    return rows[:count]


def arguments(create: Callable[..., Any], params: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's parameters by name, vLLM's own through `extra_body`."""
    known = inspect.signature(create).parameters
    extra = {key: value for key, value in params.items() if key not in known}
    own = {key: value for key, value in params.items() if key in known}
    return own | {"extra_body": {"return_token_ids": True} | extra}


def create_completion(server: Server, prompt: Any, **params: Any) -> Any:
    """Greedy and `ignore_eos` unless told otherwise."""
    create = server.client.completions.create
    params = {"temperature": 0, "max_tokens": 21, "ignore_eos": True} | params
    return create(model=server.NAME, prompt=prompt, **arguments(create, params))


def complete(server: Server, prompt: Any, **params: Any) -> Any:
    """The only choice of a completion."""
    (choice,) = create_completion(server, prompt, **params).choices
    return choice


def create_chat(server: Server, content: str, **params: Any) -> Any:
    create = server.client.chat.completions.create
    params = {"temperature": 0, "max_tokens": 100} | params
    return create(
        model=server.NAME,
        messages=[{"role": "user", "content": content}],
        **arguments(create, params),
    )


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Results of calls that run at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def eventually(read: Callable[[], Any], expected: Any, seconds: float = 10) -> None:
    """Metrics are written after the response."""
    deadline = time.monotonic() + seconds
    while (value := read()) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert value == expected


# --- The two endpoints ------------------------------------------------------------


def test_chat_answers_unseen_records(server: Server) -> None:
    rows = held_out("json", 8)
    answers = together([lambda r=row: create_chat(server, r["prompt"]) for row in rows])
    for answer in answers:
        (choice,) = answer.choices
        assert choice.finish_reason == "stop"
        assert choice.message.role == "assistant"
        assert len(choice.token_ids) == answer.usage.completion_tokens
        assert choice.token_ids[-1] == EOS
    exact = [
        answer.choices[0].message.content == row["answer"]
        for answer, row in zip(answers, rows, strict=True)
    ]
    # How good the model is, is measured elsewhere; here, that it is the model.
    assert sum(exact) >= 5


def test_completion_of_the_rendered_prompt_is_the_chat(
    server: Server, tokenizer: PreTrainedTokenizerBase
) -> None:
    (row,) = held_out("reverse", 1)
    text = render(tokenizer, row["prompt"])
    chat = create_chat(server, row["prompt"])
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert chat.prompt_token_ids == ids
    assert chat.usage.prompt_tokens == len(ids)
    for prompt in (text, ids):
        choice = complete(server, prompt, max_tokens=100, ignore_eos=False)
        assert choice.token_ids == chat.choices[0].token_ids
        assert choice.text == chat.choices[0].message.content


# --- Streaming --------------------------------------------------------------------


def streamed(stream: Any) -> tuple[list[str], list[list[int]], str | None, Any]:
    """Texts and token ids by chunk, finish reason, usage."""
    texts, ids, reason, usage = [], [], None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta = getattr(choice, "delta", None)
            texts.append((delta.content if delta else choice.text) or "")
            ids.append(getattr(choice, "token_ids", None) or [])
            reason = choice.finish_reason or reason
    return texts, ids, reason, usage


@pytest.mark.parametrize("options", [{}, STATIC], ids=["threshold", "static"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_stream_is_the_committed_text(
    server: Server, endpoint: str, options: dict[str, Any]
) -> None:
    params = {"vllm_xargs": options, "max_tokens": 61}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    if endpoint == "chat":
        (row,) = held_out("json", 1)
        whole = create_chat(server, row["prompt"], **params)
        text = whole.choices[0].message.content
        chunks = create_chat(server, row["prompt"], **params, **stream)
    else:
        prompt = ALIGNED[3:]
        whole = create_completion(server, prompt, **params)
        text = whole.choices[0].text
        chunks = create_completion(server, prompt, **params, **stream)
    texts, ids, reason, usage = streamed(chunks)
    received = ""
    for piece in texts:
        received += piece
        assert text.startswith(received)
    assert received == text
    assert sum(ids, []) == whole.choices[0].token_ids
    assert MASK not in sum(ids, [])
    assert reason == whole.choices[0].finish_reason
    assert usage == whole.usage
    # A block is sent when it is complete, never a part of it.
    ends = list(accumulate(map(len, ids), initial=usage.prompt_tokens))
    assert all(end % BLOCK == 0 for end in ends if ends[0] < end < ends[-1])
    assert sum(bool(piece) for piece in ids) > 1


# --- Sampling ---------------------------------------------------------------------


def test_temperature_zero_repeats(server: Server) -> None:
    first = complete(server, ALIGNED)
    again = together([lambda: complete(server, ALIGNED)] * 4)
    assert len(first.token_ids) == 21
    assert {tuple(choice.token_ids) for choice in again} == {tuple(first.token_ids)}


def test_seed_decides_alone_and_in_company(server: Server) -> None:
    def sample(seed: int) -> list[int]:
        return complete(server, [7], temperature=1, seed=seed).token_ids

    alone = [sample(seed) for seed in range(3)]
    assert [sample(seed) for seed in range(3)] == alone
    assert len(set(map(tuple, alone))) == 3
    done = threading.Event()

    def keep_busy(start: int) -> None:
        while not done.is_set():
            complete(
                server,
                ALIGNED[start:],
                temperature=1,
                max_tokens=450,
                vllm_xargs=STATIC,
            )

    with ThreadPoolExecutor(8) as pool:
        neighbours = [pool.submit(keep_busy, i) for i in range(8)]
        try:
            eventually(lambda: server.metric("vllm:num_requests_running") > 2, True)
            in_company = [sample(seed) for seed in range(3)]
        finally:
            done.set()
    for neighbour in neighbours:
        neighbour.result()
    assert in_company == alone


def test_n_samples_are_independent(server: Server) -> None:
    # Hot enough that three samples of a sure model differ.
    params = {"temperature": 2, "seed": 3, "max_tokens": 13}
    answer = create_completion(server, [7], n=3, **params)
    samples = [tuple(choice.token_ids) for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(samples)) == 3
    assert samples[0] == tuple(complete(server, [7], **params).token_ids)
    assert answer.usage.completion_tokens == 3 * 13


@pytest.mark.parametrize("temperature", [0, 1])
def test_completion_logprobs(server: Server, temperature: float) -> None:
    choice = complete(
        server,
        ALIGNED[:-3],
        temperature=temperature,
        seed=5,
        logprobs=4,
        return_tokens_as_token_ids=True,
    )
    got = choice.logprobs
    chosen = [f"token_id:{token}" for token in choice.token_ids]
    assert got.tokens == chosen
    assert len(got.token_logprobs) == len(got.top_logprobs) == 21
    for token, logprob, top in zip(
        chosen, got.token_logprobs, got.top_logprobs, strict=True
    ):
        assert logprob <= 0
        assert top[token] == logprob
        # The most likely ones, and the chosen one if it is not among them.
        assert 4 <= len(top) <= 5
        others = [value for key, value in top.items() if key != token]
        assert others == sorted(others, reverse=True)
        if len(top) == 5:
            assert logprob <= others[-1]
        if temperature == 0:
            assert logprob == max(top.values())
        assert sum(map(math.exp, top.values())) < 1 + 1e-4
    if temperature == 1:
        assert any(
            logprob < max(top.values())
            for logprob, top in zip(got.token_logprobs, got.top_logprobs, strict=True)
        )


def test_chat_logprobs(server: Server) -> None:
    (row,) = held_out("json", 1)
    plain = create_chat(server, row["prompt"])
    answer = create_chat(server, row["prompt"], logprobs=True, top_logprobs=3)
    assert answer.choices[0].message.content == plain.choices[0].message.content
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert entry.logprob <= 0
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.top_logprobs[0].token == entry.token
        assert values[0] == entry.logprob
    # A string of the answer is the answer: these are its own tokens.
    text = b"".join(bytes(entry.bytes) for entry in entries[:-1])
    assert text.decode() == answer.choices[0].message.content


def test_logprobs_are_of_the_model_not_of_the_bias(server: Server) -> None:
    """vLLM's default: log-probabilities before biases."""
    free = complete(server, ALIGNED, logprobs=1, vllm_xargs=STATIC, max_tokens=1)
    forced = 50
    assert free.token_ids != [forced]
    biased = complete(
        server,
        ALIGNED,
        logprobs=1,
        vllm_xargs=STATIC,
        max_tokens=1,
        logit_bias={str(forced): 100},
    )
    assert biased.token_ids == [forced]
    assert biased.logprobs.token_logprobs[0] < math.log(0.5)


# --- Tokens that must, may or must not come ---------------------------------------


def test_logit_bias_forces_and_bans(server: Server) -> None:
    free = complete(server, ALIGNED).token_ids
    common = max(free, key=free.count)
    forced, banned = together(
        [
            lambda: complete(server, ALIGNED, logit_bias={"77": 100}),
            lambda: complete(server, ALIGNED, logit_bias={str(common): -100}),
        ]
    )
    assert forced.token_ids == [77] * 21
    assert common not in banned.token_ids
    assert len(banned.token_ids) == 21


def words_of(
    tokenizer: PreTrainedTokenizerBase, ids: list[int]
) -> dict[int, tuple[str, list[int]]]:
    """By number of tokens, 1 to 3: a word of a text that tokenizes to itself."""
    words = {}
    for size in (1, 2, 3):
        for start in range(len(ids) - size + 1):
            part = ids[start : start + size]
            word = tokenizer.decode(part)
            # vLLM strips a bad word and tries it with one space before it.
            if (
                word == word.strip()
                and tokenizer.encode(word, add_special_tokens=False) == part
            ):
                words[size] = word, part
                break
    return words


def contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids)))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [STATIC, {"unmask_threshold": 0.0}],
    ids=["one at a time", "whole block at once"],
)
def test_bad_words(
    server: Server,
    tokenizer: PreTrainedTokenizerBase,
    record: list[int],
    options: dict[str, Any],
    size: int,
) -> None:
    params = {"max_tokens": 45, "vllm_xargs": options}
    free = complete(server, record, **params).token_ids
    word, part = words_of(tokenizer, free)[size]
    assert contains(free, part)
    choice = complete(server, record, bad_words=[word], **params)
    assert not contains(choice.token_ids, part)
    assert len(choice.token_ids) == 45


def test_allowed_token_ids(server: Server) -> None:
    allowed = [60, 61, 62, MASK]
    choice = complete(server, ALIGNED, temperature=2, seed=1, allowed_token_ids=allowed)
    assert len(choice.token_ids) == 21
    assert set(choice.token_ids) <= set(allowed) - {MASK}


# --- Where an output ends ---------------------------------------------------------


def test_min_tokens_holds_back_the_end(server: Server) -> None:
    """With a bias that would end the output at once."""
    params = {"ignore_eos": False, "logit_bias": {str(EOS): 100}, "max_tokens": 40}
    at_once, *later = together(
        [
            lambda n=n: complete(server, ALIGNED[2:], min_tokens=n, **params)
            for n in (0, 1, 5, BLOCK, 13)
        ]
    )
    assert at_once.token_ids == [EOS]
    assert at_once.finish_reason == "stop"
    for count, choice in zip((1, 5, BLOCK, 13), later, strict=True):
        assert choice.token_ids[count:] == [EOS]
        assert EOS not in choice.token_ids[:count]
        assert choice.finish_reason == "stop"


def test_min_tokens_past_the_natural_end(server: Server) -> None:
    (row,) = held_out("add", 1)
    short = create_chat(server, row["prompt"])
    count = short.usage.completion_tokens + 3
    longer = create_chat(server, row["prompt"], min_tokens=count, max_tokens=150)
    assert longer.usage.completion_tokens >= count
    assert EOS not in longer.choices[0].token_ids[: count - 1]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stop_string(
    server: Server,
    tokenizer: PreTrainedTokenizerBase,
    record: list[int],
    stream: bool,
) -> None:
    free = complete(server, record, max_tokens=40)
    # Begins in one block and ends in the next one.
    first = 2 * BLOCK - len(record) % BLOCK
    border = len(tokenizer.decode(free.token_ids[:first]))
    stop = free.text[border - 2 : border + 2]
    before = free.text[: free.text.index(stop)]
    for include in (False, True):
        answer = create_completion(
            server,
            record,
            max_tokens=40,
            stop=[stop, "never this"],
            include_stop_str_in_output=include,
            stream=stream,
        )
        if stream:
            texts, _, reason, _ = streamed(answer)
            got = "".join(texts)
        else:
            (choice,) = answer.choices
            got, reason = choice.text, choice.finish_reason
            assert choice.stop_reason == stop
        assert got == before + stop * include
        assert reason == "stop"


def test_stop_token_ids(server: Server, record: list[int]) -> None:
    free = complete(server, record, max_tokens=40).token_ids
    stop = next(token for token in free[BLOCK:] if token not in free[:BLOCK])
    choice = complete(server, record, max_tokens=40, stop_token_ids=[stop])
    assert choice.token_ids == free[: free.index(stop) + 1]
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == stop


@pytest.mark.parametrize("prompt", [[7], ALIGNED, ALIGNED[:-3]], ids=len)
def test_max_tokens_is_exact(server: Server, prompt: list[int]) -> None:
    budgets = (1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 13, 3 * BLOCK)
    answers = together(
        [lambda n=n: create_completion(server, prompt, max_tokens=n) for n in budgets]
    )
    longest = answers[-1].choices[0].token_ids
    for budget, answer in zip(budgets, answers, strict=True):
        (choice,) = answer.choices
        # Blocks do not depend on where the output will be cut.
        assert choice.token_ids == longest[:budget]
        assert choice.finish_reason == "length"
        assert answer.usage.completion_tokens == budget
        assert answer.usage.prompt_tokens == len(prompt)


def test_context_limit(server: Server) -> None:
    long = [100 + i % 200 for i in range(MAX_MODEL_LEN)]
    for left in (1, 5, BLOCK, 12):
        for asked in (left, left + 30):
            answer = create_completion(
                server, long[: MAX_MODEL_LEN - left], max_tokens=asked
            )
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage.completion_tokens == left
            assert answer.usage.total_tokens == MAX_MODEL_LEN


def test_chat_without_max_tokens_ends_with_the_context(server: Server) -> None:
    answer = create_chat(server, "7 x " * 80, max_tokens=None, ignore_eos=True)
    assert answer.usage.total_tokens == MAX_MODEL_LEN
    assert answer.choices[0].finish_reason == "length"


# --- Strategies and metrics -------------------------------------------------------

STEPS = "vllm:diffusion_num_denoising_steps_total"
POSITIONS = "vllm:diffusion_num_canvas_positions_total"
COMMITTED = "vllm:diffusion_num_committed_tokens_total"
THREE = 3 * BLOCK


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        pytest.param(STATIC, THREE, id="static"),
        pytest.param(STATIC | {"unmask_steps": 1}, 3, id="static-1"),
        pytest.param(STATIC | {"unmask_steps": BLOCK // 2}, THREE // 2, id="static-n"),
        pytest.param({"unmask_threshold": 1.0}, THREE, id="threshold-1"),
        pytest.param({"unmask_threshold": 0}, 3, id="threshold-0"),
    ],
)
def test_denoising_steps_of_a_strategy(
    server: Server, options: dict[str, Any], steps: int
) -> None:
    before = [server.metric(name) for name in (STEPS, COMMITTED)]
    positions = server.metric(POSITIONS)
    complete(server, ALIGNED, max_tokens=THREE, vllm_xargs=options)

    def since() -> list[float]:
        after = [server.metric(name) for name in (STEPS, COMMITTED)]
        return [new - old for new, old in zip(after, before, strict=True)]

    eventually(since, [steps, THREE])
    # Each step forwards the block it denoises.
    assert server.metric(POSITIONS) - positions >= steps * BLOCK


@pytest.mark.parametrize(("cache", "rows"), [("none", 8), ("sub_block", 5)])
def test_rows_of_sub_blocks(server: Server, cache: str, rows: int) -> None:
    """Two sub-blocks of four: each a step of eight rows, then three of four."""
    before = [server.metric(name) for name in (STEPS, POSITIONS)]
    options = {"unmask_strategy": "sub_blocks+static", "unmask_sub_block_length": 4}
    options |= {"unmask_cache": cache}
    complete(server, ALIGNED, max_tokens=THREE, vllm_xargs=options)

    def since() -> list[float]:
        after = [server.metric(name) for name in (STEPS, POSITIONS)]
        return [new - old for new, old in zip(after, before, strict=True)]

    # Two blocks are forwarded once more, to become final.
    eventually(since, [THREE, THREE * rows + 2 * BLOCK])


def test_default_strategy_reveals_several_tokens_a_step(server: Server) -> None:
    (row,) = held_out("json", 1)
    before = server.metric(STEPS)
    tokens = create_chat(server, row["prompt"]).usage.completion_tokens
    generated = server.metric("vllm:generation_tokens_total")
    eventually(lambda: server.metric("vllm:generation_tokens_total"), generated)
    assert 0 < server.metric(STEPS) - before < tokens / 1.5


def test_every_option_of_a_request_is_accepted(server: Server) -> None:
    options: list[dict[str, Any]] = [
        {"unmask_strategy": "threshold", "unmask_threshold": 0.5},
        {"unmask_steps": BLOCK, "unmask_strict": False},
        {"unmask_strict": True, "unmask_threshold": 0.25},
        {"unmask_confidence_from": "raw"},
        {"unmask_confidence_from": "transformed"},
        {"unmask_answer_block_length": 1, "unmask_answer_after": "e"},
        *(
            {"unmask_order": order} | STATIC
            for order in ("confidence", "margin", "entropy", "random")
        ),
        # Not ours, and not vLLM's.
        {"somebody_elses": 1},
    ]
    for choice in together(
        [lambda o=o: complete(server, ALIGNED, vllm_xargs=o) for o in options]
    ):
        assert len(choice.token_ids) == 21


# --- Company ----------------------------------------------------------------------


def test_sixteen_different_requests_at_once(server: Server) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"vllm_xargs": STATIC},
        {"vllm_xargs": STATIC | {"unmask_steps": 3}, "max_tokens": 50},
        {"temperature": 1, "seed": 1, "max_tokens": 50},
        {"temperature": 0.7, "seed": 2, "top_p": 0.8, "top_k": 30},
        {"temperature": 1.3, "seed": 3, "min_p": 0.02, "max_tokens": 35},
        {"logprobs": 2, "max_tokens": 30},
        {"logit_bias": {"200": 4.0}, "temperature": 1, "seed": 4},
        {"bad_words": ["a", "the"], "max_tokens": 30},
        {"allowed_token_ids": list(range(40, 90)), "temperature": 1, "seed": 5},
        {"min_tokens": 9, "ignore_eos": False, "logit_bias": {str(EOS): 100}},
        {"vllm_xargs": STATIC | {"unmask_order": "random"}, "seed": 6},
        {"vllm_xargs": STATIC | {"unmask_order": "margin"}, "max_tokens": 1},
        {"vllm_xargs": {"unmask_threshold": 0.3}, "max_tokens": 60},
        {"vllm_xargs": {"unmask_confidence_from": "raw"}, "max_tokens": 17},
        {"n": 2, "temperature": 1, "seed": 7},
    ]

    def run(index: int) -> list[Any]:
        prompt = [100 + (index * 7 + i) % 300 for i in range(1 + 5 * index)]
        answer = create_completion(server, prompt, **variants[index])
        return [(choice.token_ids, choice.finish_reason) for choice in answer.choices]

    alone = [run(index) for index in range(16)]
    assert together([lambda i=i: run(i) for i in range(16)]) == alone


def test_client_that_leaves_frees_its_request(server: Server) -> None:
    expected = complete(server, ALIGNED).token_ids
    name = "vllm:generation_tokens_total"
    # On a busy machine a request may be through before the server notices.
    for _ in range(8):
        before = server.metric(name)
        # Four at once take their time.
        long = {"n": 4, "temperature": 1.0, "max_tokens": 450, "stream": True}
        stream = create_completion(server, ALIGNED, vllm_xargs=STATIC, **long)
        received = sum(len(next(stream).choices[0].token_ids or []) for _ in range(2))
        assert received > 0
        stream.close()
        # The next one takes over the slot, maybe in the middle of a block.
        assert complete(server, ALIGNED).token_ids == expected
        eventually(lambda: server.metric("vllm:num_requests_running"), 0)
        if server.metric(name) - before < 4 * 450:
            return
    raise AssertionError("every request went on to its end")


# --- Wrong input ------------------------------------------------------------------


def unmask(**values: Any) -> dict[str, Any]:
    return {"vllm_xargs": {f"unmask_{name}": value for name, value in values.items()}}


# What is sent, and what the message must say.
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown option": (
        unmask(treshold=0.5),
        ["unmask_treshold=0.5", "unmask_threshold (nearest match)", "unmask_steps"],
    ),
    "cache of another model": (
        unmask(cache="dual"),
        ["unmask_cache='dual' has no effect", "expected none or sub_block"],
    ),
    "cache without sub-blocks": (
        unmask(cache="sub_block"),
        ["unmask_cache='sub_block'", "beside a strategy with sub_blocks"],
    ),
    "nothing like it": (unmask(zzz=1), ["unmask_zzz=1", "one of unmask_strategy"]),
    "hyphen": (
        {"vllm_xargs": {"unmask-steps": 3}},
        ["unmask-steps=3", "unmask_steps (nearest match)"],
    ),
    "capitals": (
        {"vllm_xargs": {"UNMASK_STEPS": 3}},
        ["UNMASK_STEPS=3", "unmask_steps (nearest match)"],
    ),
    "threshold type": (
        unmask(threshold="high"),
        ["unmask_threshold='high'", "a number from 0.0 to 1.0", "got str"],
    ),
    "threshold list": (
        unmask(threshold=[0.5]),
        ["unmask_threshold=[0.5]", "a number from 0.0 to 1.0", "got list"],
    ),
    "threshold high": (
        unmask(threshold=1.5),
        ["unmask_threshold=1.5", "a number from 0.0 to 1.0"],
    ),
    "threshold low": (
        unmask(threshold=-0.1),
        ["unmask_threshold=-0.1", "a number from 0.0 to 1.0"],
    ),
    "threshold null": (unmask(threshold=None), ["unmask_threshold", "valid number"]),
    "threshold unused": (
        unmask(strategy="static", threshold=0.5),
        ["unmask_threshold=0.5", "no effect", "only beside threshold"],
    ),
    "strict unused": (
        unmask(strategy="static", strict=False),
        ["unmask_strict=0", "no effect", "only beside threshold, local_leap"],
    ),
    "strict type": (unmask(strict=2), ["unmask_strict=2", "true or false"]),
    "steps zero": (unmask(steps=0), ["unmask_steps=0", "at least 1"]),
    "steps many": (
        unmask(steps=BLOCK + 1),
        [f"unmask_steps={BLOCK + 1}", f"from 1 to {BLOCK}, the block length"],
    ),
    "steps float": (unmask(steps=2.5), ["unmask_steps=2.5", "an integer"]),
    "steps text": (unmask(steps="4"), ["unmask_steps='4'", "an integer", "got str"]),
    "strategy": (
        unmask(strategy="treshold"),
        ["unmask_strategy='treshold'", "static", "did you mean 'threshold'"],
    ),
    "order": (unmask(order="best"), ["unmask_order='best'", "margin", "entropy"]),
    "confidence_from": (
        unmask(confidence_from="logits"),
        ["unmask_confidence_from='logits'", "transformed", "raw"],
    ),
    "vLLM's diffusion option": (
        {"vllm_xargs": {"diffusion_canvas_length": 4}},
        ["diffusion_canvas_length", "start with 'unmask_'"],
    ),
    "repetition_penalty": (
        {"repetition_penalty": 1.2},
        ["repetition_penalty is not supported", "expected 1"],
    ),
    "presence_penalty": (
        {"presence_penalty": 0.5},
        ["presence_penalty is not supported", "expected 0"],
    ),
    "frequency_penalty": (
        {"frequency_penalty": 0.5},
        ["frequency_penalty is not supported", "expected 0"],
    ),
    "prompt_logprobs": (
        {"prompt_logprobs": 1},
        ["prompt_logprobs is not supported", "expected unset"],
    ),
    "logprob_token_ids": (
        {"logprobs": 1, "logprob_token_ids": [5]},
        ["logprob_token_ids is not supported", "expected unset"],
    ),
    "mask in logit_bias": (
        {"logit_bias": {str(MASK): 5.0}},
        ["logit_bias", f"token {MASK}", "mask token"],
    ),
    "only the mask allowed": (
        {"allowed_token_ids": [MASK]},
        ["allowed_token_ids", "mask token", "at least one other token id"],
    ),
    "regex": (
        {"structured_outputs": {"regex": "("}},
        ["structured_outputs.regex", "parenthesis"],
    ),
    "n zero": ({"n": 0}, ["n must be at least 1"]),
    "n huge": ({"n": 10**6}, ["n must be at most"]),
    "n greedy": ({"n": 2}, ["n must be 1 when using greedy sampling"]),
    "top_p": ({"top_p": 0}, ["top_p must be in (0, 1]"]),
    "top_k": ({"top_k": -5}, ["top_k must be"]),
    "min_p": ({"min_p": 2}, ["min_p must be in [0, 1]"]),
    "temperature": ({"temperature": -1}, ["temperature must be non-negative"]),
    "max_tokens": ({"max_tokens": 0}, ["max_tokens must be at least 1"]),
    "min_tokens": ({"min_tokens": 50}, ["min_tokens must be less than or equal"]),
    "logprobs": ({"logprobs": 50}, ["logprobs of 50", "max allowed: 20"]),
    "token in logit_bias": ({"logit_bias": {"99999": 1}}, ["logit_bias", "99999"]),
    "allowed token": ({"allowed_token_ids": [99999]}, ["allowed_token_ids"]),
    "stop token": ({"stop_token_ids": [99999]}, ["stop_token_ids", "99999"]),
    "bad_words": ({"bad_words": [""]}, ["bad_words cannot contain an empty string"]),
    "prompt token": ({"prompt": [99999]}, ["Token id 99999 is out of vocabulary"]),
    "prompt long": (
        {"prompt": [5] * (MAX_MODEL_LEN + 1)},
        [f"maximum context length is {MAX_MODEL_LEN}"],
    ),
    "prompt full": ({"prompt": [5] * MAX_MODEL_LEN}, ["max_tokens must be at least 1"]),
}
# The same through the other endpoint.
WRONG_CHAT = ["unknown option", "threshold high", "repetition_penalty", "regex"]


def still_answers(server: Server) -> None:
    assert len(complete(server, [7], max_tokens=1).token_ids) == 1


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(server: Server, case: str) -> None:
    params, says = WRONG[case]
    params = {"prompt": ALIGNED} | params
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, **params)
    assert caught.value.status_code == 400
    for part in says:
        assert part in caught.value.message
    still_answers(server)


@pytest.mark.parametrize("case", WRONG_CHAT)
def test_wrong_input_to_chat(server: Server, case: str) -> None:
    params, says = WRONG[case]
    with pytest.raises(openai.BadRequestError) as caught:
        create_chat(server, "Add 1 and 2.", **params)
    for part in says:
        assert part in caught.value.message
    still_answers(server)


@pytest.mark.parametrize("case", WRONG_CHAT)
def test_wrong_input_to_a_stream(server: Server, case: str) -> None:
    """vLLM has answered 200 by then: the error is the stream's first event."""
    params, says = WRONG[case]
    with pytest.raises(openai.APIError) as caught:
        list(create_chat(server, "Add 1 and 2.", stream=True, **params))
    for part in says:
        assert part in caught.value.message
    still_answers(server)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_threshold_that_is_no_number(server: Server, value: str) -> None:
    response = server.post(
        "/v1/completions",
        f'{{"model": "{server.NAME}", "prompt": "a", "max_tokens": 1, '
        f'"vllm_xargs": {{"unmask_threshold": {value}}}}}',
    )
    assert response.status_code == 400
    assert "unmask_threshold=" in response.text
    assert "a number from 0.0 to 1.0" in response.text
    still_answers(server)
