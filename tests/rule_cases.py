# SPDX-License-Identifier: Apache-2.0
"""Batches for the decoding rules, and the comparison with one request at a time."""

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

INF = math.inf
# Few values, so that ties are common; exact in float32, and so is what the rules
# compute from them.
CONFIDENCE = st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.875, 1.0])
ORDER = st.sampled_from([-INF, -2.0, -0.0, 0.0, 0.25, 0.5, 1.0])
# Below, at and between the confidences, and above all of them.
THRESHOLD = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.625, 0.75, 1.0, 2.0])

Row = list[Any]


class Batch:
    """Draws the tensors of a few requests that have equally long blocks."""

    def __init__(self, data: st.DataObject, longest: int = 8) -> None:
        self.draw = data.draw
        self.rows = data.draw(st.integers(1, 4), label="requests")
        self.length = data.draw(st.integers(1, longest), label="block")

    def each(self, values: st.SearchStrategy) -> torch.Tensor:
        """One value a request."""
        drawn = self.draw(st.lists(values, min_size=self.rows, max_size=self.rows))
        return torch.tensor(drawn)

    def table(self, values: st.SearchStrategy) -> torch.Tensor:
        """One value a position."""
        row = st.lists(values, min_size=self.length, max_size=self.length)
        drawn = self.draw(st.lists(row, min_size=self.rows, max_size=self.rows))
        return torch.tensor(drawn)

    def masked(self) -> torch.Tensor:
        """Any positions; often none, all, or a single one."""
        length = self.length
        single = st.integers(0, length - 1).map(
            lambda column: [c == column for c in range(length)]
        )
        row = st.one_of(
            st.lists(st.booleans(), min_size=length, max_size=length),
            st.just([True] * length),
            st.just([False] * length),
            single,
        )
        drawn = self.draw(st.lists(row, min_size=self.rows, max_size=self.rows))
        return torch.tensor(drawn)


def where(flags: Row) -> list[int]:
    return [column for column, flag in enumerate(flags) if flag]


def flags(columns: set[int] | list[int], like: Row) -> list[bool]:
    return [column in columns for column in range(len(like))]


def best(order: Row, columns: list[int], count: int) -> list[int]:
    """The ``count`` best of some columns, the best first."""
    return sorted(columns, key=lambda c: (-order[c], c))[: max(count, 0)]


def check_blind(
    rule: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    *arguments: torch.Tensor,
) -> None:
    """Run a rule on tensors without values.

    Whatever waits for a value, or gives a result whose shape depends on one, fails
    here, and would stop the CPU until a GPU is done.
    """

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = rule(*inputs)
        return (result,) if isinstance(result, torch.Tensor) else result

    expected = run(*(argument.clone() for argument in arguments))
    blind = run(*(argument.to("meta") for argument in arguments))
    for got, want in zip(blind, expected, strict=True):
        assert got.device.type == "meta"
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


def check(
    rule: Callable[..., torch.Tensor],
    specification: Callable[..., object],
    *arguments: torch.Tensor,
) -> torch.Tensor:
    """Compare a rule with what it should give for each request.

    Also that it gives the same for a request alone and in another order of the
    requests, that it writes to no argument and waits for none.

    Args:
        rule: takes and returns tensors whose first dimension is the requests.
        specification: the same for one request, with numbers and lists.
        arguments: of the rule.
    """
    before = [argument.clone() for argument in arguments]
    result = rule(*arguments)
    for row in range(len(result)):
        expected = specification(*(argument[row].tolist() for argument in arguments))
        assert result[row].tolist() == expected
        alone = rule(*(argument[row : row + 1] for argument in arguments))
        assert torch.equal(alone[0], result[row])
    backwards = rule(*(argument.flip(0) for argument in arguments))
    assert torch.equal(backwards.flip(0), result)
    for argument, old in zip(arguments, before, strict=True):
        assert torch.equal(argument, old)
    check_blind(rule, *arguments)
    return result
