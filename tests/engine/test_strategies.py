# SPDX-License-Identifier: Apache-2.0
"""Strategies, seeds and traces of request slots, without an engine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

# On CPU, vLLM's worker replaces what the runner's modules import by name.
import vllm.v1.worker.cpu.shm  # noqa: F401
from vllm import SamplingParams

from vllm_unmask.decoding.canvas import Canvas
from vllm_unmask.decoding.history import Stability
from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.engine.openings import Openings
from vllm_unmask.engine.states import BlockGeometry
from vllm_unmask.engine.strategies import Strategies
from vllm_unmask.engine.strategy_data import find_filter
from vllm_unmask.engine.tracing import Tracer, forget_trace, read_trace
from vllm_unmask.options import DecodingOptions
from vllm_unmask.seeds import Seeds

CPU = torch.device("cpu")
GEOMETRY = BlockGeometry(4, 9)
NO_FILTER: Any = None
NO_DELIMITERS: Any = None


def strategies() -> Strategies:
    return Strategies(8, GEOMETRY, CPU, NO_FILTER, NO_DELIMITERS)


def options(strategy: str, **values: Any) -> DecodingOptions:
    return DecodingOptions(strategy=strategy, **values)


@pytest.mark.parametrize("strategy", ["static", "threshold", "sdar", "fast_dllm"])
def test_a_plain_strategy_is_left_to_the_canvas_operations(strategy: str) -> None:
    known = strategies()
    known.add_request(2, "a", options("credit"), SamplingParams(), 3, None)
    known.add_request(2, "b", options(strategy), SamplingParams(), 3, None)
    assert known.groups(np.array([2, 5])) == []


GREEDY = {"temperature": 0.0}
SEEDS = Seeds(np.array([3]), np.array([True]))


@pytest.mark.parametrize(
    ("decoding", "sampling", "seeds", "expected"),
    [
        (options("threshold"), GREEDY, None, True),
        (options("static"), GREEDY | {"stop_token_ids": [5]}, None, True),
        (options("threshold"), {"temperature": 1.0}, None, False),
        (options("threshold"), GREEDY | {"logprobs": 1}, None, False),
        (options("threshold"), GREEDY | {"min_tokens": 2}, None, False),
        (options("threshold"), GREEDY | {"logit_bias": {5: 1.0}}, None, False),
        (options("threshold"), GREEDY | {"bad_words": ["x"]}, None, False),
        (options("threshold"), GREEDY | {"allowed_token_ids": [5]}, None, False),
        (options("threshold"), GREEDY, SEEDS, False),
        (options("threshold", trace=True), GREEDY, None, False),
        (options("static", order="margin"), GREEDY, None, False),
        (options("threshold", answer_block_length=2), GREEDY, None, False),
        (options("threshold+freedave"), GREEDY, None, False),
        (options("threshold+s2d2"), GREEDY, None, False),
        (options("credit"), GREEDY, None, False),
    ],
)
def test_whose_steps_are_one_call(
    decoding: DecodingOptions,
    sampling: dict[str, Any],
    seeds: Seeds | None,
    expected: bool,
) -> None:
    known = strategies()
    # The slot's last request was the other kind.
    known.greedy[2] = not expected
    known.add_request(2, "a", decoding, SamplingParams(**sampling), 3, seeds)
    assert known.greedy[2] == expected


def test_groups_share_fillers_and_keep_their_parameters() -> None:
    known = strategies()
    stops = SamplingParams(stop_token_ids=[5, 6, 7])
    known.add_request(1, "a", options("factor"), SamplingParams(), 3, None)
    known.add_request(4, "b", options("factor", factor=0.5), stops, 3, None)
    known.add_request(6, "c", options("credit"), SamplingParams(), 3, None)
    groups = {group.fillers: group for group in known.groups(np.array([4, 0, 6, 1]))}
    factor = groups[frozenset({"factor"})]
    assert factor.rows.tolist() == [0, 3]
    assert factor.slots.tolist() == [4, 1]
    assert factor.parameters["factor"].tolist() == [0.5, 1.0]
    assert factor.parameters["steps"].tolist() == [4, 4]
    assert groups[frozenset({"credit", "threshold"})].slots.tolist() == [6]
    assert known.stop_ids[[4, 1]].tolist() == [[5, 6, 7], [-1, -1, -1]]


def test_what_a_group_remembers_is_its_slots() -> None:
    known = strategies()
    for slot in (1, 3):
        known.add_request(
            slot, str(slot), options("ccd+sched"), SamplingParams(), 3, None
        )
    (both,) = known.groups(np.array([3, 1]))
    known.remember(both, {"previous": torch.tensor([[3] * 4, [1] * 4])})
    (one,) = known.groups(np.array([1]))
    assert known.recall(one)["previous"].tolist() == [[1] * 4]
    assert known.recall(both)["previous"].tolist() == [[3] * 4, [1] * 4]


def test_a_step_that_waits_is_not_remembered() -> None:
    """Neither is a distribution, which has a memory of its own."""
    known = strategies()
    for slot in (1, 3):
        known.add_request(
            slot, str(slot), options("klass+sched"), SamplingParams(), 3, None
        )
    (both,) = known.groups(np.array([3, 1]))
    wait = torch.tensor([True, False])

    def state(value: int) -> dict[str, Any]:
        settled = torch.full((2, 4, 5), float(value)), torch.full((2, 4, 2), value)
        return {
            "previous": torch.full((2, 4), value),
            "stability": Stability(*settled),
        }

    known.remember(both, state(7), wait)
    recalled = known.recall(both)
    assert recalled["previous"][:, 0].tolist() == [0, 7]
    assert recalled["stability"][0][:, 0, 0].tolist() == [0, 7]
    known.remember(both, state(8))
    known.remember(both, state(9), wait)
    recalled = known.recall(both)
    assert recalled["previous"][:, 0].tolist() == [8, 9]
    assert recalled["stability"][0][:, 0, 0].tolist() == [8, 9]


def test_distributions_go_with_their_request() -> None:
    known = strategies()
    known.add_request(1, "a", options("klass"), SamplingParams(), 3, None)
    (group,) = known.groups(np.array([1]))
    assert known.recall(group)["stability"] is None
    kept = Stability(torch.rand(1, 4, 10), torch.ones(1, 4, dtype=torch.int64))
    known.remember(group, {"stability": kept})
    assert torch.equal(known.recall(group)["stability"].probs, kept.probs)
    known.remove_request("a")
    assert known.distributions == {}


def canvas() -> Canvas:
    ids = torch.full((8, 8), 9)
    zeros = torch.zeros(8, dtype=torch.int64)
    return Canvas(ids, zeros.bool(), zeros.clone(), zeros.clone(), zeros.clone())


def test_seeds_lie_behind_the_prompt() -> None:
    openings, state = Openings(8, GEOMETRY, CPU), canvas()
    state.ids[3, :2] = torch.tensor([1, 2])
    state.num_fixed[3] = 2
    seeds = Seeds((9, 5, 6, 9, 7), (False, True, False, False, False))
    openings.add_request(3, "a", seeds, False, 6, 6, state)
    assert state.ids[3].tolist() == [1, 2, 9, 5, 6, 9, 7, 9]
    assert state.num_masks[3] == 1
    ids, pinned = openings.seeded(np.array([3]), torch.tensor([4]))
    assert ids.tolist() == [[9, 9, 9, 5]]
    assert pinned.tolist() == [[False, False, False, True]]


def test_a_preempted_request_goes_on_from_what_it_had_unmasked_ahead() -> None:
    openings, state = Openings(2, GEOMETRY, CPU), canvas()
    state.num_fixed[3] = 2
    openings.add_request(3, "a", None, True, 6, 6, state)
    state.pending[3] = True
    openings.keep(torch.tensor([3]), torch.tensor([[5, 9, 9, 6]]), state.pending)
    openings.remove_request("a")
    openings.add_request(1, "a", None, True, 6, 8, state)
    assert state.ids[1].tolist() == [5, 9, 9, 6, 9, 9, 9, 9]
    assert state.num_masks[1] == 2
    for name in "bcd":
        openings.add_request(0, name, None, True, 6, 8, state)
        openings.remove_request(name)
    assert list(openings.left) == ["c", "d"]


def test_trace_of_a_request_that_comes_back(tmp_path: Path) -> None:
    """Steps go on after a preemption; blocks behind the output are left out."""
    tracer = Tracer(str(tmp_path), True, *GEOMETRY)
    slots = SimpleNamespace(slots_np=np.array([3]))
    none: Any = SimpleNamespace(requests={})

    half = torch.full((1, 4), 0.5)
    scores = Scores(torch.zeros((1, 4), dtype=torch.int64), half, half)

    def step(
        before: list[int], after: list[int], reported: int, last: bool = True
    ) -> None:
        tracer.observe(
            slots,  # type: ignore[arg-type]
            torch.tensor([before]),
            torch.tensor([after]),
            scores,
            None,
            before == [7, 9, 9, 9],
            torch.tensor([4]),
            None,
            torch.tensor([0]),
            torch.tensor([reported]),
            none,
            None,
        )
        if last:
            tracer.end_forward(slots)  # type: ignore[arg-type]

    tracer.add_request(3, "../name", True, False)
    step([9, 9, 9, 9], [9, 5, 5, 5], 0)
    step([9, 5, 5, 5], [6, 5, 5, 5], 4)
    step([9, 9, 9, 9], [7, 9, 9, 9], 0)
    tracer.add_request(3, "../name", True, False)
    step([9, 9, 9, 9], [7, 7, 7, 7], 4)
    step([9, 9, 9, 9], [8, 8, 8, 8], 4)
    trace = read_trace(str(tmp_path), "../name", [6, 5, 5, 5, 7])
    assert trace["num_steps"] == 3
    assert [t["events"][0]["step"] for t in trace["tokens"]] == [1, 0, 0, 0, 2]
    forget_trace(str(tmp_path), "../name")
    assert list(tmp_path.iterdir()) == []
    # A request that speculates: the second forward goes on in the next block.
    tracer.add_request(3, "c", True, True)
    step([9, 9, 9, 9], [7, 9, 9, 9], 0)
    tracer.candidates(np.array([5, 3]), torch.tensor([8, 2]))
    step([7, 9, 9, 9], [7, 7, 7, 7], 4, last=False)
    step([7, 9, 9, 9], [7, 7, 9, 9], 0)
    step([7, 7, 9, 9], [7, 7, 7, 7], 4)
    trace = read_trace(str(tmp_path), "c", [7, 7, 7, 7])
    assert [list(forward.values()) for forward in trace["forwards"]] == [
        [1, 0, 0],
        [1, 2, 1],
    ]
    trace = read_trace(str(tmp_path), "c", [7] * 8)
    assert [forward["steps"] for forward in trace["forwards"]] == [1, 2, 1]
    tracer.add_request(3, "b", False, True)
    assert not tracer.concern(slots)  # type: ignore[arg-type]


def test_a_filter_that_does_not_fit(tmp_path: Path) -> None:
    assert find_filter(None, str(tmp_path), 4) is None
    (tmp_path / "unmask").mkdir()
    (tmp_path / "unmask" / "filter.safetensors").write_bytes(b"x")
    assert find_filter(None, str(tmp_path), 4) is None
    with pytest.raises(ValueError, match="cannot be read"):
        find_filter(str(tmp_path / "unmask" / "filter.safetensors"), "", 4)
