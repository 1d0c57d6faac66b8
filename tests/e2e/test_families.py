# SPDX-License-Identifier: Apache-2.0
"""Every family on one engine: its network, its loading, and every feature on it."""

import itertools
import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import engine_calls
import family_calls
import jsonschema
import pytest
import structured_calls
import torch
from checkpoints import Weights, write_checkpoint
from dense_reference import (
    block_causal_mask,
    choose_static,
    choose_threshold,
    streaming_mask,
)
from engine_process import EngineProcess
from family_references import REFERENCES, Config, Reference
from verified_reference import decode_verified

from vllm_unmask.families import FAMILIES, family_of

pytestmark = pytest.mark.e2e

DEMO = Path(__file__).parents[2] / "examples" / "demo_model" / "sdar"
BLOCK = 4
PAGE = 32
MAX_TOKENS = 27
# Those of the demo model's tokenizer, behind which the random weights stand.
IDS = {"vocab_size": 512, "mask_token_id": 4, "eos_token_id": 1, "bos_token_id": None}
STATIC = {"unmask_strategy": "static"}
THRESHOLD = {"unmask_strategy": "threshold", "unmask_threshold": 0.5}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}


class Served(NamedTuple):
    """An engine, and what it should compute."""

    architecture: str
    engine: EngineProcess
    config: Config
    weights: Weights
    reference: Reference

    @property
    def attention(self) -> str:
        """What a position sees."""
        return family_of(self.architecture).attention

    @property
    def is_full(self) -> bool:
        """Whether every position of the model sees every other one."""
        return self.attention == "full"

    @property
    def edits(self) -> bool:
        """Whether it has blocks, in which a token may be replaced."""
        return self.attention != "causal"

    @property
    def speculates(self) -> bool:
        """Whether its KV is final where self-speculation needs that."""
        return family_of(self.architecture).attention == "block_causal"

    def logits(self, record: dict[str, Any]) -> torch.Tensor:
        """Of the open block of a step."""
        ids = record["prefix"] + record["active"]
        end, mask = len(ids), block_causal_mask(len(ids), BLOCK)
        if self.is_full:
            ids = ids + [self.config["mask_token_id"]] * (record["rows"] - len(ids))
            mask = torch.ones((len(ids), len(ids)), dtype=torch.bool)
        if self.attention == "causal":
            start, mask_id = len(record["prefix"]), self.config["mask_token_id"]
            mask = streaming_mask(ids, start, mask_id)
        logits = self.reference.logits(self.config, self.weights, ids, mask)
        return logits[len(record["prefix"]) : end]

    def decode(self, prompt: list[int], choose: Any, **options: Any) -> list[int]:
        options = {"max_tokens": MAX_TOKENS} | options
        output, _ = self.reference.decode(
            self.config,
            self.weights,
            prompt,
            block=BLOCK,
            choose=self.reference.order(choose),
            logits_of=self.reference.logits,
            **options,
        )
        return output

    def generate(self, prompts: list[list[int]], params: Any) -> list[list[int]]:
        outputs = self.engine.run(engine_calls.generate, prompts, params)
        return [output["tokens"] for output in outputs]


@pytest.fixture(scope="module", params=[f.architecture for f in FAMILIES])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    path = tmp_path_factory.mktemp(request.param)
    reference = REFERENCES[request.param]
    config = reference.config(BLOCK, **IDS)
    weights = write_checkpoint(path, config)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / file, path)
    with EngineProcess(
        model=str(path),
        skip_tokenizer_init=False,
        block_size=PAGE,
        # Too few pages for eight requests.
        num_gpu_blocks_override=12,
        # As deep as there is room, however long that takes here.
        additional_config={"unmask": {"adaptive_candidates": False}},
    ) as engine:
        yield Served(request.param, engine, config, weights, reference)


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [
        [rng.randrange(5, 512) for _ in range(length)]
        for length in (1, 3, 4, 5, 8, 23, 41)
    ]


def greedy(extra: dict[str, Any], **params: Any) -> dict[str, Any]:
    return {
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": MAX_TOKENS,
        "extra_args": extra,
    } | params


def test_every_logit_equals_the_dense_reference(
    served: Served, record_property: Any
) -> None:
    _, records = served.engine.run(
        engine_calls.generate_recorded, prompts(), greedy(THRESHOLD)
    )
    worst = largest = 0.0
    for record in records:
        expected = served.logits(record)
        # Nothing scores a position of the prompt that no row of the block is for.
        first = int(served.reference.shifted and record["num_fixed"] > 0)
        difference = (record["logits"] - expected)[first:]
        worst = max(worst, float(difference.abs().max()))
        largest = max(largest, float(expected.abs().max()))
    print(
        f"{served.architecture}: largest logit difference {worst:.1e} of {largest:.1f} "
        f"in {len(records)} steps"
    )
    record_property("largest_logit_difference", worst)
    assert worst < 2e-4
    assert not served.engine.run(family_calls.trusts_remote_code)


@pytest.mark.parametrize("rule", ["static", "threshold"])
def test_output_equals_whole_sequence_decoding(served: Served, rule: str) -> None:
    extra, choose = {
        "static": (STATIC, choose_static),
        "threshold": (THRESHOLD, partial(choose_threshold, threshold=0.5)),
    }[rule]
    outputs = served.generate(prompts(), greedy(extra))
    assert outputs == [served.decode(prompt, choose) for prompt in prompts()]
    # Random weights that always say the same would prove little.
    assert len(set(sum(outputs, []))) > 15


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", [STATIC, THRESHOLD], ids=["static", "threshold"])
def test_speculation_saves_forwards_and_changes_nothing(
    served: Served, rule: dict[str, Any], temperature: float
) -> None:
    if not served.speculates:
        pytest.skip("refused: tests/test_options.py")
    faster = rule | {"unmask_strategy": rule["unmask_strategy"] + "+freedave"}
    answers, forwards = [], []
    for extra in (rule, faster):
        outputs, counts = served.engine.run(
            engine_calls.generate_counting,
            [prompts()[i] for i in (2, 5)],
            greedy(extra, temperature=temperature, seed=3),
        )
        answers.append([output["tokens"] for output in outputs])
        forwards.append(counts["steps"])
    assert answers[0] == answers[1]
    assert forwards[1] < forwards[0]


def test_verified_and_edited_as_published(served: Served) -> None:
    """S2D2 beside token editing: edits belong to the draft that is verified."""
    if not served.speculates:
        pytest.skip("refused: tests/test_options.py")
    if served.reference.shifted:
        pytest.skip("the reference verifies with masks; the sweep has shifted logits")
    values = {"threshold": 0.3, "edit_threshold": 0.05, "post_steps": 3, "min_span": 2}
    extra = {f"unmask_{name}": value for name, value in values.items()}
    extra |= {"unmask_strategy": "threshold+edit+s2d2", "unmask_route": "span_length"}
    num_edits = 0
    for prompt, output in zip(
        prompts(), served.generate(prompts(), greedy(extra)), strict=True
    ):
        expected, edited = decode_verified(
            served.config,
            served.weights,
            prompt,
            MAX_TOKENS,
            block=BLOCK,
            logits_of=served.reference.logits,
            **values,
        )
        assert output == expected
        num_edits += edited
    assert num_edits > 0


def test_nothing_is_left_of_edits_that_are_off(served: Served) -> None:
    """LLaDA2.1 is LLaDA2.0 then: the same network by the rule of the reference."""
    if not served.edits:
        pytest.skip("refused: tests/e2e/test_streaming.py")
    expected = [
        served.decode(prompt, partial(choose_threshold, threshold=0.7))
        for prompt in prompts()
    ]
    for post_steps in (0, 16):
        off: dict[str, Any] = {"unmask_strategy": "llada21_quality"}
        off |= {"unmask_edit_threshold": 1.0, "unmask_post_steps": post_steps}
        assert served.generate(prompts(), greedy(off)) == expected
    on = {"unmask_strategy": "llada21_quality", "unmask_edit_threshold": 0.0}
    assert served.generate(prompts(), greedy(on)) != expected


def test_nothing_edits_the_prompt_or_what_is_committed(served: Served) -> None:
    """And the keys and values of a committed block are those of its last edit."""
    if not served.edits:
        pytest.skip("refused: tests/e2e/test_streaming.py")
    extra = {"unmask_strategy": "llada21_speed", "unmask_threshold": 0.2}
    outputs, records = served.engine.run(
        engine_calls.generate_recorded, prompts(), greedy(extra)
    )
    mask_id, num_edits = served.config["mask_token_id"], 0
    blocks = by_block(records)
    assert len({request for request, _ in blocks}) == len(prompts())
    for request, output in enumerate(outputs):
        known = prompts()[request] + output["tokens"]
        mine = [steps for (row, _), steps in blocks.items() if row == request]
        assert mine
        for steps in mine:
            for record in steps:
                start, fixed = len(record["prefix"]), record["num_fixed"]
                assert record["prefix"] == known[:start]
                assert record["active"][:fixed] == known[start : start + fixed]
                first = int(served.reference.shifted and fixed > 0)
                difference = (record["logits"] - served.logits(record))[first:]
                assert float(difference.abs().max()) < 2e-4
            held = [record["active"] for record in steps]
            for before, after in itertools.pairwise(held):
                pairs = zip(before, after, strict=True)
                num_edits += sum(mask_id != old != new for old, new in pairs)
    assert num_edits > 20


@pytest.mark.parametrize("post_steps", [0, 1, 16, 64])
def test_edits_that_never_settle_end(served: Served, post_steps: int) -> None:
    """Each block after its steps with masks and ``post_steps`` more."""
    if not served.edits:
        pytest.skip("refused: tests/e2e/test_streaming.py")
    mask_id, max_tokens = served.config["mask_token_id"], 9
    follows = {mask_id: 7, 7: 8, 8: 7}
    extra = {"unmask_strategy": "llada21_quality", "unmask_post_steps": post_steps}
    asked = greedy(extra, max_tokens=max_tokens)
    flipping = [[7, 8] * 3 + [7] * tail for tail in range(BLOCK)]
    outputs, records = served.engine.run(
        family_calls.generate_flipping, flipping, asked, follows
    )
    blocks = by_block(records)
    assert len(blocks) >= 2 * len(flipping)
    for (request, start), steps in blocks.items():
        known = flipping[request] + outputs[request]["tokens"]
        held = [record["active"] for record in steps]
        assert sum(mask_id not in active for active in held) == post_steps
        fixed = steps[0]["num_fixed"]
        for active, after in itertools.pairwise(held):
            for old, new in zip(active[fixed:], after[fixed:], strict=True):
                assert old == new == mask_id or new == follows[old]
        reported = known[start + fixed : start + BLOCK]
        last = [follows[token] for token in held[-1][fixed:]]
        assert reported == last[: len(reported)]
        assert all(active[:fixed] == known[start : start + fixed] for active in held)
    for output in outputs:
        assert len(output["tokens"]) == max_tokens
    # The engine goes on.
    free = prompts()[5]
    assert served.generate([free], greedy(STATIC)) == [
        served.decode(free, choose_static)
    ]


def by_block(
    records: list[dict[str, Any]],
) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """(place of the request, first position of its block) -> steps, in order."""
    names = sorted({record["request"] for record in records}, key=name_order)
    blocks: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for record in records:
        key = names.index(record["request"]), len(record["prefix"])
        blocks.setdefault(key, []).append(record)
    return blocks


def name_order(request: str) -> int:
    """vLLM numbers the requests of a call."""
    return int(request.partition("-")[0])


def kinds(weights: Weights) -> dict[str, str]:
    """Kind of a weight (its name without numbers) -> the last one of that kind."""
    return {
        ".".join(part for part in name.split(".") if not part.isdigit()): name
        for name in weights
    }


def test_missing_weights_are_errors(served: Served) -> None:
    """One of each kind, down to one projection of one expert."""

    def error(weights: Weights, **options: Any) -> str | None:
        return served.engine.run(family_calls.loading_error, weights, **options)

    assert error(served.weights) is None
    # A trainer's update, after the first loading, comes in parts.
    assert error(served.weights, parts=3) is None
    for name in kinds(served.weights).values():
        rest = {n: w for n, w in served.weights.items() if n != name}
        assert f"checkpoint lacks 1 weight ({name})" in str(error(rest))
        module, _, kind = name.rpartition(".")
        if kind == "weight":
            found = str(error(rest, quantized=True))
            assert f"checkpoint lacks 1 weight ({module})" in found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.9.input_layernorm.weight", "layers.9"),
        ("model.layers.0.input_layernorm.bias", "model.layers.0.input_layernorm.bias"),
        ("model.layers.0.extra.weight", "extra"),
        ("score.weight", "score"),
    ],
)
def test_unexpected_weights_are_errors(served: Served, name: str, said: str) -> None:
    more = {**served.weights, name: torch.zeros(96)}
    assert said in str(served.engine.run(family_calls.loading_error, more))


def test_what_old_exporters_add_is_dropped(served: Served) -> None:
    name = "model.layers.0.attention.rotary_emb.inv_freq"
    more = {**served.weights, name: torch.zeros(16)}
    assert served.engine.run(family_calls.loading_error, more) is None


def test_head_of_a_tied_model_may_be_there(served: Served) -> None:
    heads = ("lm_head.weight", "model.transformer.ff_out.weight")
    without = {n: w for n, w in served.weights.items() if n not in heads}
    assert len(without) < len(served.weights)
    for weights in (served.weights, without):
        error = served.engine.run(family_calls.loading_error, weights, tied=True)
        assert error is None


@pytest.mark.parametrize("factor", [0.5, 2])
def test_wrong_shapes_are_errors(served: Served, factor: float) -> None:
    for name in kinds(served.weights).values():
        weight = torch.cat((served.weights[name], served.weights[name]))
        weight = weight[: int(factor * len(weight) / 2)].clone()
        wrong = {**served.weights, name: weight}
        assert served.engine.run(family_calls.loading_error, wrong), name


def test_prefix_cache_hit_equals_cold_run(served: Served) -> None:
    prompt = prompts()[-1]
    served.engine.run(engine_calls.reset_prefix_cache)
    cold, warm = (
        served.engine.run(engine_calls.generate, [prompt], greedy(STATIC))[0]
        for _ in range(2)
    )
    hit = 0 if served.is_full else PAGE
    assert (cold["num_cached_tokens"], warm["num_cached_tokens"]) == (0, hit)
    assert warm["tokens"] == cold["tokens"] == served.decode(prompt, choose_static)
    if served.is_full:
        return
    # What was generated is in the cache as well.
    longer = (prompt + cold["tokens"])[:-1]
    (output,) = served.engine.run(engine_calls.generate, [longer], greedy(STATIC))
    assert output["num_cached_tokens"] == 2 * PAGE
    assert output["tokens"] == served.decode(longer, choose_static)


@pytest.mark.parametrize("length", [PAGE, PAGE + 1, PAGE + BLOCK, 2 * PAGE])
def test_prompts_that_are_in_the_cache(served: Served, length: int) -> None:
    """Up to their end, as far as vLLM lets them: what precedes a block is there."""
    if served.is_full:
        pytest.skip("has no prefix cache")
    rng = random.Random(length)
    prompt = [rng.randrange(5, 512) for _ in range(length)]
    for cached in (0, (length - 1) // PAGE * PAGE):
        (output,) = served.engine.run(
            engine_calls.generate, [prompt], greedy(STATIC, max_tokens=5)
        )
        assert output["num_cached_tokens"] == cached
        assert output["tokens"] == served.decode(prompt, choose_static, max_tokens=5)


def test_alone_equals_batched(served: Served) -> None:
    """Strategies and temperatures of a batch change nobody's output."""
    presets = next(f for f in FAMILIES if f.architecture == served.architecture).presets
    params = [
        greedy(STATIC, max_tokens=9),
        greedy(STATIC, temperature=1.0, seed=7),
        greedy(THRESHOLD, temperature=0.7, seed=8, top_p=0.9, top_k=20),
        greedy({**THRESHOLD, "unmask_order": "entropy"}, temperature=0.5, seed=3),
        *(greedy({"unmask_strategy": preset}) for preset in presets),
    ]
    each = [prompts()[i % len(prompts())] for i in range(len(params))]
    together = served.generate(each, params)
    for prompt, param, tokens in zip(each, params, together, strict=True):
        assert served.generate([prompt], param) == [tokens], param


def test_stop_tokens(served: Served) -> None:
    """Those of the checkpoint, which vLLM reads, and those of a request."""
    prompt = prompts()[4]
    biased = greedy(STATIC, logit_bias={1: 100.0}, ignore_eos=False)
    (output,) = served.engine.run(engine_calls.generate, [prompt], biased)
    assert (output["tokens"], output["finish_reason"]) == ([1], "stop")
    free = served.decode(prompt, choose_static)
    stop = free[len(free) // 2]
    (output,) = served.engine.run(
        engine_calls.generate, [prompt], greedy(STATIC, stop_token_ids=[stop])
    )
    assert output["tokens"] == free[: free.index(stop) + 1]
    assert output["finish_reason"] == "stop"


def test_sampling_parameters(served: Served) -> None:
    prompt = prompts()[5]
    hot = greedy(STATIC, temperature=1.5, seed=1)
    first, again, other = served.generate([prompt] * 3, [hot, hot, hot | {"seed": 2}])
    assert first == again != other
    # With one candidate all positions are equally sure: from left to right.
    (only,) = served.generate([prompt], hot | {"top_k": 1})
    assert only == served.decode(prompt, lambda masked, *_: masked[:1])
    allowed = [7, 8, 9]
    (few,) = served.generate([prompt], hot | {"allowed_token_ids": allowed})
    assert set(few) <= set(allowed) and len(few) == MAX_TOKENS
    (output,) = served.engine.run(
        engine_calls.generate, [prompt], greedy(STATIC, logprobs=2)
    )
    assert output["tokens"] == served.decode(prompt, choose_static)
    for token, entries in zip(output["tokens"], output["logprobs"], strict=True):
        assert entries[token][1] == 1 and len(entries) == 2


def test_grammar_with_random_weights(served: Served) -> None:
    """Valid by the grammar alone, through the chat template."""
    params = [
        {
            "structured_outputs": {"json": SCHEMA},
            "temperature": temperature,
            "seed": 5,
            "max_tokens": 60,
            "extra_args": extra,
        }
        for temperature in (0.0, 1.0)
        for extra in (STATIC, THRESHOLD)
    ]
    messages = ["one", "two", "three", "four"]
    answers = served.engine.run(structured_calls.chat, messages, params)
    for answer in answers:
        jsonschema.validate(json.loads(answer["text"]), SCHEMA)
    if served.attention == "causal":
        # What is decided and not verified yet is kept.
        again, preempted = served.engine.run(
            structured_calls.chat_preempted, messages, params, 3
        )
        assert preempted
        assert [a["tokens"] for a in again] == [a["tokens"] for a in answers]


def test_preempted_requests_go_on_as_if_nothing_happened(served: Served) -> None:
    rng = random.Random(31)
    many = [[rng.randrange(5, 512) for _ in range(24 + i)] for i in range(8)]
    # Else a request with full attention has all of its pages from the start.
    window = {"window": 3} if served.is_full else {}
    extra = STATIC | {f"unmask_{name}": value for name, value in window.items()}
    outputs, counts = served.engine.run(
        engine_calls.generate_counting, many, greedy(extra, max_tokens=36)
    )
    assert counts["preemptions"] > 0
    for prompt, output in zip(many, outputs, strict=True):
        expected = served.decode(prompt, choose_static, max_tokens=36, **window)
        assert output["tokens"] == expected
