# SPDX-License-Identifier: Apache-2.0
"""Whole strategies over whole blocks: what holds for every composition."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from composed_blocks import FINITE, Opening, Request, draw_requests, join, options_of
from composed_runs import Step, read, run
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unmask.decoding.composition import Evidence, decide
from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.decoding.strategy import Block
from vllm_unmask.presets import FILLERS, StrategyError, compose

SEEDS = st.integers(0, 1 << 32).map(random.Random)


def is_allowed(strategy: str) -> bool:
    try:
        compose(strategy)
    except StrategyError:
        return False
    return True


# Speculation is about several steps, and the engine's.
STEPS = {name: f for name, f in FILLERS.items() if f.slot != "speculate"}


def strategies(filler: str) -> st.SearchStrategy[str]:
    """Strategies with a filler, and with any others that it goes with."""

    def composed(others: list[str]) -> str:
        names = [filler]
        for other in others:
            if is_allowed(join(*names, other)):
                names.append(other)
        return join(*names)

    others = sorted(STEPS.keys() - {filler})
    return st.lists(st.sampled_from(others), max_size=8, unique=True).map(composed)


def check_step(request: Request, step: Step, opening: Opening, first: bool) -> None:
    fillers = compose(request.strategy).fillers
    mask = request.mask_id
    masked = opening.output & (step.before == mask)
    assert not (step.accepted & ~masked).any()
    assert not masked.any() or step.accepted.any()
    assert (step.after[step.accepted] != mask).all()
    assert torch.equal(step.after[~opening.live], step.before[~opening.live])

    changed = step.ids != step.before
    again = changed & (step.ids == mask)
    assert not (changed & masked).any()
    doubted = opening.injected if first else torch.zeros_like(changed)
    if "edit" not in fillers:
        assert not (changed & ~again).any()
    if fillers.isdisjoint({"remdm", "rcr"}):
        assert not (again & ~doubted).any()
    left = opening.output & (step.after == mask)
    if "remdm" not in fillers and masked.any():
        assert left.sum() < masked.sum() + (again & doubted).sum()
    assert not step.held or "edit" in fillers


@pytest.mark.parametrize("filler", STEPS)
@settings(max_examples=15)
@given(data=st.data(), rng=SEEDS, injects=st.booleans())
def test_every_composition(
    filler: str, data: st.DataObject, rng: random.Random, injects: bool
) -> None:
    """What a step may do, when a block ends, and that its batch changes nothing.

    Nor does what is remembered of another block. ``run`` raises where a block takes
    too long.
    """
    requests = draw_requests(rng, data.draw(strategies(filler)), injects)
    histories = run(requests, poisoned=True)
    for request, history in zip(requests, histories, strict=True):
        for opening, steps in zip(request.openings, history, strict=True):
            for number, step in enumerate(steps):
                check_step(request, step, opening, number == 0)
    check_same(histories, [run([request])[0] for request in requests])
    check_same(histories, run(requests[::-1])[::-1])


def check_same(histories: list[Any], others: list[Any]) -> None:
    """Same tokens in the same steps."""
    for blocks, other_blocks in zip(histories, others, strict=True):
        for steps, other_steps in zip(blocks, other_blocks, strict=True):
            assert len(steps) == len(other_steps)
            for step, other in zip(steps, other_steps, strict=True):
                assert torch.equal(step.after, other.after)
                assert torch.equal(step.accepted, other.accepted)


HUGE = {"gap_high": 1e30, "gap_low": 1e30}
WHOLE = {"sub_block_length": "length"}
SURE = {"threshold": 0.5}
# A strategy whose options make it another one.
SAME = [
    ("credit+threshold", {"credit_weight": 0.0}, "threshold", {}),
    ("eos_rejection+threshold", {"end_floor": 1.0}, "threshold", {}),
    ("prophet+threshold", HUGE, "threshold", {}),
    ("sched+threshold", HUGE, "threshold", {}),
    ("sub_blocks+threshold", WHOLE, "threshold", {}),
    ("edit+threshold", {"edit_threshold": 1.0, "post_steps": 0}, "threshold", {}),
    ("remdm+threshold", {"remask": "cap", "remask_rate": 0.0}, "threshold", {}),
    ("remdm+threshold", {"remask": "rescale", "remask_rate": 0.0}, "threshold", {}),
    ("lookahead+threshold", {}, "threshold", {}),
    ("threshold", {"threshold": 1.0}, "static", {}),
    ("learned", {"threshold": 1.0}, "static", {}),
    ("ccd", {"warm_up": 99}, "static", {}),
    ("entropy_bounded", {"entropy_bound": 0.0, "whole_entropy": True}, "static", {}),
    ("factor", {"factor": 0.0}, "threshold", {"threshold": 1.0, "strict": False}),
    ("klass", SURE | {"kl_history": 0}, "threshold", SURE),
    ("local_leap", SURE | {"radius": 0, "strict": True}, "threshold", SURE),
    ("hierarchy", SURE | {"low_threshold": 1.0}, "threshold", SURE),
    (
        "bacd",
        {"low_threshold": 0.5, "high_threshold": 0.5},
        "threshold",
        SURE | {"strict": False},
    ),
    (
        "cad",
        SURE | {"max_reveals": 99, "end_gate": 0.0},
        "threshold",
        SURE | {"strict": False},
    ),
    ("static", {"doubt": 0.0}, "static", {}),
]


def with_options(
    requests: list[Request], strategy: str, given: dict[str, Any]
) -> list[Request]:
    length = requests[0].length
    given = {k: length if v == "length" else v for k, v in given.items()}
    options = options_of(strategy, given, length)
    return [replace(r, strategy=strategy, options=options) for r in requests]


@pytest.mark.parametrize(
    ("strategy", "options", "other", "other_options"),
    SAME,
    ids=lambda value: value if isinstance(value, str) else "",
)
@settings(max_examples=15)
@given(rng=SEEDS)
def test_degenerate_options(
    strategy: str,
    options: dict[str, Any],
    other: str,
    other_options: dict[str, Any],
    rng: random.Random,
) -> None:
    # A row with one token left has an endless gap, over any threshold.
    requests = draw_requests(rng, strategy, kinds=FINITE)
    check_same(
        run(with_options(requests, strategy, options)),
        run(with_options(requests, other, other_options)),
    )


@settings(max_examples=25)
@given(rng=SEEDS, strategy=st.sampled_from(["end_of_text", "eos_rejection", "cad"]))
def test_without_stop_tokens(rng: random.Random, strategy: str) -> None:
    """What is about stop tokens does nothing without one."""
    requests = [replace(r, stop_ids=()) for r in draw_requests(rng, strategy)]
    if strategy == "cad":
        with_gate, without = {"end_gate": 1.0}, {"end_gate": 0.0}
        check_same(
            run(with_options(requests, strategy, with_gate)),
            run(with_options(requests, strategy, without)),
        )
        return
    check_same(
        run(with_options(requests, f"{strategy}+threshold", {})),
        run(with_options(requests, "threshold", {})),
    )


@settings(max_examples=25)
@given(rng=SEEDS)
def test_no_doubt_at_threshold_zero(rng: random.Random) -> None:
    requests = with_options(draw_requests(rng, "static", True), "static", {})
    openings = [
        tuple(
            o._replace(injected=torch.zeros_like(o.injected)) for o in request.openings
        )
        for request in requests
    ]
    plain = [replace(r, openings=o) for r, o in zip(requests, openings, strict=True)]
    check_same(run(requests), run(plain))


@settings(max_examples=30)
@given(rng=SEEDS)
def test_nothing_but_stop_tokens_right_of_one(rng: random.Random) -> None:
    """end_of_text: no mask stays right of a revealed stop token."""
    for request, history in _runs(rng, "end_of_text"):
        stops = torch.tensor(request.stop_ids, dtype=torch.int64)
        for opening, steps in zip(request.openings, history, strict=True):
            for step in steps:
                ended = torch.isin(step.after, stops) & opening.output
                right = ended.cumsum(0) > 0
                left = opening.output & (step.after == request.mask_id)
                assert not (right & left).any()


def test_a_doubted_stop_token_ends_nothing() -> None:
    """What is right of a seeded stop token waits until the seed is believed."""
    stop, mask = 7, 9
    ids = torch.tensor([[stop, mask, mask]])
    zeros = torch.zeros(1, dtype=torch.int64)
    block = Block(
        ids=ids,
        masked=ids == mask,
        output=torch.ones_like(ids, dtype=torch.bool),
        live=torch.ones_like(ids, dtype=torch.bool),
        num_masks=zeros + 2,
        step=zeros,
        stop_ids=torch.tensor([[stop]]),
        progress=torch.zeros(1),
        seeds=zeros,
        positions=torch.tensor([[0, 1, 2]]),
        injected=ids == stop,
    )
    sure = torch.tensor([[0.1, 0.6, 0.5]])
    scores = Scores(torch.tensor([[3, 4, 5]]), sure, sure)
    given = {"threshold": 0.9, "strict": 1, "steps": 3, "step_sizes": 0, "order": 0}
    for doubt, after in ((0.5, [mask, mask, mask]), (0.0, [stop, mask, mask])):
        p = {k: torch.tensor([float(v)]) for k, v in (given | {"doubt": doubt}).items()}
        evidence = Evidence(None, torch.tensor([[0.1, 0.0, 0.0]]))
        fillers = frozenset({"threshold", "end_of_text"})
        decision = decide(fillers, block, scores, evidence, p, {}, mask)
        assert decision.ids.tolist() == [after]
        filled = decision.accepted & (decision.tokens == stop)
        assert filled.tolist() == [[False, False, doubt == 0]]


@settings(max_examples=30)
@given(rng=SEEDS)
def test_parts_open_from_left_to_right(rng: random.Random) -> None:
    """sub_blocks: a part is unmasked only when those left of it are complete."""
    for request, history in _runs(rng, "sub_blocks"):
        width = int(request.number("sub_block_length"))
        for opening, steps in zip(request.openings, history, strict=True):
            for step in steps:
                masked = (step.before == request.mask_id) & opening.output
                if masked.any():
                    part = int(masked.nonzero()[0]) // width
                    unmasked = step.accepted.nonzero() // width
                    assert (unmasked == part).all()


def test_remasking_ends() -> None:
    """Masking all again that was unmasked would go on for ever."""
    length = 8
    everywhere = torch.ones(length, dtype=torch.bool)
    opening = Opening(torch.zeros(length).long(), everywhere, everywhere, ~everywhere)
    options = options_of("remdm+static", {"remask": "cap", "remask_rate": 1.0}, length)
    request = Request("remdm+static", options, (opening, opening), 0, 1, (), 0.0)
    for steps in run([request])[0]:
        assert 2 * length < len(steps) <= request.most_steps(opening) == 3 * length
        assert all(
            (step.after == 0).sum() >= length - 1 for step in steps[: 2 * length]
        )


@settings(max_examples=30)
@given(rng=SEEDS)
def test_rcr_follows_the_schedule(rng: random.Random) -> None:
    """As many are left as the static schedule leaves, whichever they are."""
    requests = draw_requests(rng, "rcr")
    for ours, plain in zip(
        run(requests),
        run([replace(request, strategy="static") for request in requests]),
        strict=True,
    ):
        assert [len(steps) for steps in ours] == [len(steps) for steps in plain]


def _runs(rng: random.Random, strategy: str) -> list[tuple[Request, list[list[Step]]]]:
    requests = draw_requests(rng, strategy)
    return list(zip(requests, run(requests), strict=True))


@pytest.mark.parametrize(
    ("strategy", "orders"),
    [
        ("threshold", set()),
        # The kernel of a CPU reads more than they ask for.
        ("prophet", {0, 1, 2}),
        ("edit", {0, 1, 2}),
        ("entropy_bounded", {0, 1, 2}),
        ("edit+entropy_threshold", {0, 1, 2}),
        ("credit+entropy_bounded", set()),
    ],
)
def test_what_was_read_gives_the_scores(strategy: str, orders: set[int]) -> None:
    """Where a strategy has read enough, and has not changed it since."""
    requests = draw_requests(random.Random(3), strategy)
    assert read(requests).orders == orders
