# SPDX-License-Identifier: Apache-2.0
"""What a step forwards where every position sees every other one."""

from typing import Any

import pytest

from vllm_unmask.engine.full_scheduler import NEVER, CanvasPlan, refresh_period
from vllm_unmask.options import DecodingOptions


@pytest.mark.parametrize(
    ("options", "period"),
    [
        ({}, 1),
        ({"cache": "prefix"}, NEVER),
        ({"cache": "dual", "refresh": 3}, 3),
    ],
)
def test_steps_from_one_full_step_to_the_next(
    options: dict[str, Any], period: int
) -> None:
    assert refresh_period(DecodingOptions(**options)) == period


def plan(**fields: Any) -> CanvasPlan:
    """Blocks of 4 of a request that may fill the positions before 40."""
    defaults = {"period": NEVER, "dual": False, "window": 0}
    return CanvasPlan(**defaults | fields, block_length=4, end=40)


def test_every_step_forwards_everything_without_a_cache() -> None:
    assert {plan(period=1).query(12, step) for step in range(4)} == {(0, 40)}


@pytest.mark.parametrize(("dual", "rest"), [(False, (12, 40)), (True, (12, 16))])
def test_steps_after_the_first_leave_out_what_is_cached(
    dual: bool, rest: tuple[int, int]
) -> None:
    queries = [plan(dual=dual, period=2).query(12, step) for step in range(4)]
    assert queries == [(0, 40), rest, (0, 40), rest]
    assert plan(dual=dual).query(12, 2) == rest


@pytest.mark.parametrize(
    ("window", "end"), [(1, 16), (4, 16), (5, 20), (27, 40), (100, 40)]
)
def test_windows_are_whole_blocks(window: int, end: int) -> None:
    assert plan(window=window).query(12, 0) == (0, end)
    assert plan(window=window).query(12, 1) == (12, end)


@pytest.mark.parametrize(
    ("period", "repeating"), [(1, [0, 1, 2, 3]), (3, [1]), (2, []), (NEVER, [1, 2, 3])]
)
def test_steps_after_which_the_next_forwards_the_same(
    period: int, repeating: list[int]
) -> None:
    of = plan(period=period)
    assert [step for step in range(4) if of.repeats(step)] == repeating
    for step in repeating:
        assert of.query(12, step) == of.query(12, step + 1)


@pytest.mark.parametrize(
    ("window", "settled"), [(0, 0), (4, 36), (5, 32), (40, 0), (100, 0)]
)
def test_canvases_that_end_where_the_next_block_s_do(window: int, settled: int) -> None:
    of = plan(window=window, period=1)
    assert max(of.settled, 0) == settled
    for start in range(0, 36, 4):
        same = of.query(start, 0) == of.query(start + 4, 0)
        assert same == (start >= of.settled)


def test_last_block_may_be_short() -> None:
    short = plan(dual=True)._replace(end=38)
    assert short.query(36, 0) == (0, 38)
    assert short.query(36, 1) == (36, 38)
