# SPDX-License-Identifier: Apache-2.0
"""Long blocks for the thoughts, short ones for the answer, on a real engine."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import answer_calls
import engine_calls
import jsonschema
import pytest
import structured_calls
from answer_reference import decode_answer, switch_after, two_grids_mask
from checkpoints import write_checkpoint
from dense_reference import choose_static, choose_threshold
from engine_process import EngineProcess
from family_references import REFERENCES
from transformers import AutoTokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DEMO = Path(__file__).parents[2] / "examples" / "demo_model" / "sdar"
BLOCK = 8
PAGE = 32
MAX_TOKENS = 37
# No whole number of blocks.
CONTEXT = 125
# Steps from one preemption to the next: more than a block has, which starts anew.
EVERY = BLOCK + 3
# Those of the demo model's tokenizer, behind which the random weights stand.
IDS = {"vocab_size": 512, "mask_token_id": 4, "eos_token_id": 1, "bos_token_id": None}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "colour": {"enum": ["red", "blue"]},
    },
    "required": ["name", "colour"],
    "additionalProperties": False,
}
RULES: dict[str, tuple[dict[str, Any], Any]] = {
    "static": ({"unmask_strategy": "static"}, choose_static),
    "threshold": (
        {"unmask_strategy": "threshold", "unmask_threshold": 0.5},
        partial(choose_threshold, threshold=0.5),
    ),
    # The same rule as a composition, as `credit` without weight adds nothing.
    "composed": (
        {
            "unmask_strategy": "credit+threshold",
            "unmask_threshold": 0.5,
            "unmask_credit_weight": 0.0,
        },
        partial(choose_threshold, threshold=0.5),
    ),
}


class Served:
    """An engine, and what it should compute."""

    def __init__(self, architecture: str, path: Path, asynchronous: bool) -> None:
        self.reference = REFERENCES[architecture]
        self.config = self.reference.config(BLOCK, **IDS)
        self.weights = write_checkpoint(path, self.config)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / file, path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.known: dict[str, list[str]] = {}
        self.texts = [tokenizer.decode([token]) for token in range(IDS["vocab_size"])]
        self.engine = EngineProcess(
            model=str(path),
            skip_tokenizer_init=False,
            block_size=PAGE,
            max_model_len=CONTEXT,
            # Too few for all prompts at once.
            num_gpu_blocks_override=14,
            async_scheduling=asynchronous,
        )

    def render(self, output: list[int]) -> str:
        """A text whose characters are those of ASCII tokens."""
        return "".join(self.texts[token] for token in output)

    def found(self, text: str) -> Callable[[list[int]], bool]:
        return lambda output: text in self.render(output)

    def generate(self, prompts: list[list[int]], params: Any) -> list[list[int]]:
        outputs = self.engine.run(engine_calls.generate, prompts, params)
        return [output["tokens"] for output in outputs]

    def decode(
        self, prompt: list[int], rule: str, short: int, text: str
    ) -> tuple[list[int], int | None]:
        return decode_answer(
            self.config,
            self.weights,
            prompt,
            MAX_TOKENS,
            block=BLOCK,
            short=short,
            found=self.found(text),
            choose=RULES[rule][1],
            order=self.reference.order,
            logits_of=self.reference.logits,
            max_model_len=CONTEXT,
        )

    def endings(self, rule: str) -> list[str]:
        """For each prompt a text that its output has early, in two tokens."""
        if rule not in self.known:
            outputs = self.generate(prompts(), greedy(RULES[rule][0]))
            self.known[rule] = [self._ending(output) for output in outputs]
        return self.known[rule]

    def _ending(self, output: list[int]) -> str:
        for place in range(2, len(output) - 1):
            left, right = (self.texts[t] for t in output[place : place + 2])
            if (left + right).isascii() and (left + right).isprintable():
                # It begins within the one and ends within the other, if they are long.
                return left[len(left) // 2 :] + right[: (len(right) + 1) // 2]
        raise AssertionError(output)


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [
        [rng.randrange(5, 512) for _ in range(length)] for length in (1, 7, 8, 41, 95)
    ]


def greedy(extra: dict[str, Any], **params: Any) -> dict[str, Any]:
    return {
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": MAX_TOKENS,
        "extra_args": extra,
    } | params


def answering(rule: str, short: int, text: str) -> dict[str, Any]:
    asked = {"unmask_answer_block_length": short, "unmask_answer_after": text}
    return greedy(RULES[rule][0] | asked)


@pytest.fixture(
    scope="module",
    params=[
        ("SDARForCausalLM", False),
        ("SDARForCausalLM", True),
        ("Fast_dLLM_QwenForCausalLM", False),
    ],
    ids=["sync", "async", "shifted"],
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    served = Served(
        request.param[0], tmp_path_factory.mktemp("answer"), request.param[1]
    )
    with served.engine:
        yield served


@pytest.mark.parametrize("rule", RULES)
def test_output_is_that_of_two_grids(served: Served, rule: str) -> None:
    """Batched with others of every length, some of them preempted."""
    asked, expected = [], []
    for short in (4, 2, 1):
        for prompt, text in zip(prompts(), served.endings(rule), strict=True):
            asked.append((prompt, answering(rule, short, text)))
            expected.append(served.decode(prompt, rule, short, text))
    outputs, counts = served.engine.run(
        engine_calls.generate_counting, *map(list, zip(*asked, strict=True))
    )
    assert counts["preemptions"] > 0
    assert [output["tokens"] for output in outputs] == [e[0] for e in expected]
    # All of them switch, and most of what comes after that is another text.
    assert all(switch is not None for _, switch in expected)
    plain = served.generate(prompts(), greedy(RULES[rule][0]))
    assert sum(tokens not in plain for tokens, _ in expected) > 10


def test_keys_and_values_are_those_of_two_grids(served: Served) -> None:
    """Every logit, preempted again and again in thoughts and answer, and not."""
    for every in (0, EVERY):
        asked = [
            answering("threshold", short, text)
            for short, text in zip(
                (4, 2, 1, 2, 1), served.endings("threshold"), strict=True
            )
        ]
        outputs, records, preempted = served.engine.run(
            answer_calls.generate_preempted, prompts(), asked, every
        )
        assert bool(preempted) == bool(every)
        names = sorted({r["request"] for r in records}, key=answer_calls.number_of)
        worst, switched = 0.0, 0
        for record in records:
            place = names.index(record["request"])
            prompt, output = prompts()[place], outputs[place]["tokens"]
            extra = asked[place]["extra_args"]
            text = extra["unmask_answer_after"]
            switch = switch_after(prompt, output, BLOCK, served.found(text))
            ids, start = record["prefix"] + record["active"], len(record["prefix"])
            mask = two_grids_mask(
                len(ids), BLOCK, extra["unmask_answer_block_length"], switch
            )
            expected = served.reference.logits(
                served.config, served.weights, ids, mask
            )[start:]
            first = int(served.reference.shifted and record["num_fixed"] > 0)
            worst = max(worst, float((record["logits"] - expected)[first:].abs().max()))
            switched += switch is not None and start >= switch
        assert worst < 2e-4
        assert switched > 40


def test_pages_of_two_grids_are_not_shared(served: Served) -> None:
    """Neither does another request read an answer's, nor an answer another's."""
    prompt, text = prompts()[3], served.endings("threshold")[3]
    asked = answering("threshold", 1, text)
    expected, switch = served.decode(prompt, "threshold", 1, text)
    assert switch is not None and switch < len(prompt) + MAX_TOKENS - PAGE // 2
    longer = prompt + expected[:-1]
    served.engine.run(engine_calls.reset_prefix_cache)
    assert served.generate([prompt], asked) == [expected]
    plain = greedy(RULES["threshold"][0], max_tokens=9)
    (warm,) = served.engine.run(engine_calls.generate, [longer], plain)
    assert warm["num_cached_tokens"] == len(prompt) // PAGE * PAGE > 0
    served.engine.run(engine_calls.reset_prefix_cache)
    (cold,) = served.engine.run(engine_calls.generate, [longer], plain)
    assert warm["tokens"] == cold["tokens"]
    # The long-block pages of the answer's tokens are in the cache now.
    outputs, _, preempted = served.engine.run(
        answer_calls.generate_preempted,
        [prompts()[0], prompt],
        [greedy(RULES["static"][0], max_tokens=80), asked],
        EVERY,
    )
    assert preempted and outputs[1]["tokens"] == expected


@pytest.mark.parametrize("strategy", ["threshold", "threshold+edit", "lookahead"])
def test_the_block_length_is_no_switch(served: Served, strategy: str) -> None:
    text = served.endings("threshold")[1]
    extra = {"unmask_strategy": strategy}
    same = {"unmask_answer_block_length": BLOCK, "unmask_answer_after": text}
    outputs = served.generate(
        prompts() * 2, [greedy(extra)] * 5 + [greedy(extra | same)] * 5
    )
    assert outputs[:5] == outputs[5:]


@pytest.mark.parametrize(
    "strategy",
    [
        "bacd",
        "klass",
        "ccd",
        "cad",
        "dimple",
        "hierarchy",
        "sub_blocks+factor",
        "adablock+local_leap",
        "entropy_distance",
    ],
)
def test_one_at_a_time_is_autoregressive(served: Served, strategy: str) -> None:
    """In parts of one position no rule has a choice: their answers are the same."""
    # Of the first block's end, whatever it is: thoughts that all of them share.
    prompt = prompts()[2]
    thoughts = {
        "diffusion_seed_canvas": [60] * BLOCK,
        "diffusion_pinned": [*range(BLOCK)],
    }
    text = served.texts[60] * 2
    extra = {"unmask_answer_block_length": 1, "unmask_answer_after": text} | thoughts
    one, other = served.generate(
        [prompt] * 2,
        [greedy({"unmask_strategy": name} | extra) for name in ("static", strategy)],
    )
    assert one == other and one[:BLOCK] == [60] * BLOCK


def test_sampled_answers_do_not_depend_on_company(served: Served) -> None:
    text = served.endings("threshold")[0][:1]
    params = [
        answering("threshold", short, text) | {"temperature": 0.9, "seed": short}
        for short in (1, 2, 4, 8, 1)
    ]
    together = served.generate(prompts(), params)
    for prompt, param, tokens in zip(prompts(), params, together, strict=True):
        assert served.generate([prompt], param) == [tokens]


def test_structured_answer(served: Served) -> None:
    """A grammar verifies in parts as in blocks, and its guard writes across them."""
    extra = {"unmask_answer_block_length": 2, "unmask_answer_after": '"name'}
    params = [
        greedy(
            extra,
            structured_outputs={"json": SCHEMA},
            temperature=temperature,
            seed=5,
            ignore_eos=False,
            max_tokens=max_tokens,
        )
        for temperature in (0.0, 1.0)
        for max_tokens in (60, 34)
    ]
    messages = ["one", "two", "three", "four"]
    for answer in served.engine.run(structured_calls.chat, messages, params):
        jsonschema.validate(json.loads(answer["text"]), SCHEMA)


def test_what_changes_more_than_a_part_is_refused(served: Served) -> None:
    beyond = ["lookahead", "freedave", "s2d2", "prophet", "sched"]
    for filler in [*beyond, "edit", "remdm", "rcr"]:
        extra = {"unmask_answer_block_length": 2, "unmask_strategy": f"static+{filler}"}
        said = f"answer_block_length=2 is .*expected.* a strategy without {filler}"
        with pytest.raises(RuntimeError, match=said):
            served.generate([[5]], greedy(extra))
    extra = {"unmask_answer_block_length": 2, "unmask_strategy": "sub_blocks"}
    extra |= {"unmask_cache": "sub_block"}
    with pytest.raises(RuntimeError, match="not possible with cache=sub_block"):
        served.generate([[5]], greedy(extra))
