# SPDX-License-Identifier: Apache-2.0
"""A streaming window on a real engine: WeDLM's decoding, traces, and what is refused.

The tiny model is of the kind without biases and with norms, that of the 8B release.
"""

import random
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import engine_calls
import pytest
import torch
from checkpoints import EOS, MASK, Weights, wedlm_config, write_checkpoint
from dense_reference import choose_near, decode_streaming, dense_logits, entropy_of
from engine_process import EngineProcess

pytestmark = pytest.mark.e2e

WINDOW = 16
CONTEXT = 160
MAX_TOKENS = 50
WEDLM = {"unmask_strategy": "wedlm"}
NORMS = {"attention_bias": False, "qk_norm": True, "head_dim": 32, "hidden_size": 96}


class Served(NamedTuple):
    engine: EngineProcess
    config: dict[str, Any]
    weights: Weights

    def decode(self, prompt: list[int], **options: Any) -> tuple[list[int], int]:
        """Tokens and forwards of WeDLM's loop."""
        rule = {"bound": 0.4, "penalty": 0.02}
        rule |= {name: options.pop(name) for name in rule if name in options}
        return decode_streaming(
            self.config,
            self.weights,
            prompt,
            block=WINDOW,
            choose=partial(choose_near, **rule),
            max_model_len=CONTEXT,
            sureness=entropy_of,
            **{"max_tokens": MAX_TOKENS} | options,
        )

    def generate(self, prompts: list[list[int]], params: Any) -> list[list[int]]:
        outputs = self.engine.run(engine_calls.generate, prompts, params)
        return [output["tokens"] for output in outputs]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("wedlm")
    config = wedlm_config(**NORMS)
    weights = write_checkpoint(path, config, seed=2)
    with EngineProcess(
        model=str(path),
        block_size=32,
        max_model_len=CONTEXT,
        # A long prompt takes several steps, and six requests do not fit.
        max_num_batched_tokens=100,
        num_gpu_blocks_override=14,
        additional_config={"unmask": {"strategy": "wedlm"}},
    ) as engine:
        yield Served(engine, config, weights)


def prompts() -> list[list[int]]:
    rng = random.Random(6)
    lengths = (1, 3, 16, 31, 32, 60, 105)
    return [[rng.randrange(EOS) for _ in range(n)] for n in lengths]


def greedy(**params: Any) -> dict[str, Any]:
    return {"temperature": 0, "ignore_eos": True, "max_tokens": MAX_TOKENS} | params


@pytest.mark.parametrize("bound", [0.4, 1.5])
def test_output_equals_the_published_loop(served: Served, bound: float) -> None:
    """In a batch, with preemptions and prompts in chunks."""
    extra = {"unmask_entropy_bound": bound}
    outputs, counts = served.engine.run(
        engine_calls.generate_counting, prompts(), greedy(extra_args=extra)
    )
    expected = [served.decode(prompt, bound=bound) for prompt in prompts()]
    assert [output["tokens"] for output in outputs] == [ids for ids, _ in expected]
    assert counts["preemptions"] > 0
    tokens = sum(len(ids) for ids, _ in expected)
    forwards = sum(number for _, number in expected)
    # What random weights are sure of is little.
    assert (tokens / forwards > 1.5) == (bound > 1)


def test_rows_that_a_step_forwards(served: Served) -> None:
    """The tokens that the step before reported, then the window."""
    prompt = prompts()[1]
    extra = {"unmask_entropy_bound": 1.5}
    (output,), records = served.engine.run(
        engine_calls.generate_recorded, [prompt], greedy(extra_args=extra)
    )
    assert (output["tokens"], len(records)) == served.decode(prompt, bound=1.5)
    starts = [len(record["prefix"]) for record in records]
    reported = [b - a for a, b in pairwise(starts)]
    assert [record["rows"] - WINDOW for record in records] == [len(prompt), *reported]


def test_one_position_a_step(served: Served) -> None:
    """The surest, or by a large penalty the first: then a mask behind what is known."""
    prompt = prompts()[2]
    surest = greedy(extra_args={"unmask_entropy_bound": 0.0}, max_tokens=20)
    first = {"unmask_entropy_bound": 0.0, "unmask_distance_penalty": 1000.0}
    outputs = served.generate([prompt] * 2, [surest, surest | {"extra_args": first}])
    assert outputs[0] == served.decode(prompt, bound=0.0, max_tokens=20)[0]
    ids = list(prompt)
    for _ in range(20):
        seen = [*ids, MASK]
        causal = torch.ones((len(seen), len(seen)), dtype=torch.bool).tril()
        logits = dense_logits(served.config, served.weights, seen, causal)[-1]
        logits[MASK] = -torch.inf
        ids.append(int(logits.argmax()))
    assert outputs[1] == ids[len(prompt) :]


def test_keys_and_values_of_what_was_reported_are_final(served: Served) -> None:
    """Another request finds them in the prefix cache, in a window's midst too."""
    served.engine.run(engine_calls.reset_prefix_cache)
    prompt = prompts()[5]
    (tokens,) = served.generate([prompt], greedy(max_tokens=60))
    longer = prompt + tokens[:40]
    (output,) = served.engine.run(engine_calls.generate, [longer], greedy())
    assert output["num_cached_tokens"] == 96
    assert output["tokens"] == served.decode(longer)[0]


def test_window_that_the_context_cuts(served: Served) -> None:
    rng = random.Random(8)
    for room in (1, 10, 23):
        prompt = [rng.randrange(EOS) for _ in range(CONTEXT - room)]
        (output,) = served.engine.run(
            engine_calls.generate, [prompt], greedy(max_tokens=None)
        )
        assert (len(output["tokens"]), output["finish_reason"]) == (room, "length")
        assert output["tokens"] == served.decode(prompt, max_tokens=room)[0]


def test_preempted_requests_keep_what_they_have_decided(served: Served) -> None:
    """Sampled tokens, log-probabilities and traces are those of a request alone."""
    rng = random.Random(9)
    many = [[rng.randrange(EOS) for _ in range(30 + i)] for i in range(7)]
    params = [
        greedy(
            temperature=0.8,
            seed=i,
            logprobs=1,
            extra_args={"unmask_trace": True, "unmask_entropy_bound": 1.0},
        )
        for i in range(len(many))
    ]
    together, counts = served.engine.run(engine_calls.generate_counting, many, params)
    assert counts["preemptions"] > 0
    for prompt, param, output in zip(many, params, together, strict=True):
        (alone,) = served.engine.run(engine_calls.generate, [prompt], param)
        assert output["tokens"] == alone["tokens"]
        assert told(output) == told(alone)
        for place, expected in enumerate(alone["logprobs"]):
            assert output["tokens"][place] in expected
            for token, (logprob, rank) in expected.items():
                found = output["logprobs"][place][token]
                assert found == (pytest.approx(logprob, abs=1e-4), rank)


def told(output: dict[str, Any]) -> list[list[tuple[int, str]]]:
    """Of each token what happened to it, and in which step."""
    trace = output["trace"]["tokens"]
    return [[(e["step"], e["event"]) for e in of["events"]] for of in trace]


@pytest.mark.parametrize(
    "strategy",
    [
        "static",
        "threshold+end_of_text",
        "factor",
        "entropy_bounded",
        "entropy_threshold",
        "local_leap",
        "hierarchy",
        "cad+eos_rejection",
    ],
)
def test_other_rules_end_every_window(served: Served, strategy: str) -> None:
    hot = greedy(temperature=0.7, seed=3, extra_args={"unmask_strategy": strategy})
    first, again = served.generate([prompts()[3]] * 2, hot)
    assert len(first) == MAX_TOKENS and first == again
    assert MASK not in first


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"unmask_strategy": "lookahead"}, "strategy=.*needs blocks.*window"),
        ({"unmask_strategy": "freedave"}, "expected a strategy without freedave"),
        ({"unmask_strategy": "threshold+edit"}, "expected a strategy without edit"),
        ({"unmask_strategy": "klass"}, "expected a strategy without klass"),
        (
            {"unmask_strategy": "static", "unmask_step_sizes": "cosine"},
            "step_sizes='cosine' needs blocks.*expected linear",
        ),
        ({"unmask_cache": "dual"}, "unmask_cache='dual' has no effect"),
        ({"unmask_answer_block_length": 1}, "has a window that moves on"),
        ({"diffusion_seed_canvas": [1, 2]}, "diffusion_seed_canvas=.*no seeds"),
    ],
)
def test_refused_requests(served: Served, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        served.generate([[1]], greedy(extra_args=extra))
