# SPDX-License-Identifier: Apache-2.0
"""What a grammar bans, written into the logits and beside them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm_unmask.decoding.reading import score
from vllm_unmask.engine.grammar import Grammars
from vllm_unmask.engine.grammar_step import GrammarStep
from vllm_unmask.engine.rows import positions_read
from vllm_unmask.engine.states import BlockGeometry

VOCAB, LENGTH, MASK = 83, 4, 82


class State:
    """A grammar that allows some tokens."""

    def __init__(self, legal: list[int]) -> None:
        self.legal = legal

    def frontier_mask(self, mask: np.ndarray[Any, Any]) -> None:
        for token in self.legal:
            mask[token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))


def grammar_step(*members: tuple[int, list[int] | None, int]) -> GrammarStep:
    """A step of requests: row, legal tokens (None while it compiles), frontier."""
    grammars: Any = Grammars.__new__(Grammars)
    grammars.geometry = BlockGeometry(LENGTH, MASK)
    grammars.vocab_size = VOCAB
    grammars.vocabulary = SimpleNamespace(
        mask_id=MASK, special_ids=[0, 40], stop_ids=[1]
    )
    grammars._silent_ids = grammars._silent_mask = None
    requests: list[Any] = [
        (
            row,
            SimpleNamespace(
                state=None if legal is None else State(legal),
                frontier=frontier,
                nanoseconds=0,
            ),
        )
        for row, legal, frontier in members
    ]
    return GrammarStep(grammars, requests)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_constraints_ban_what_constrain_does(sampled: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(5 * LENGTH, VOCAB, generator=generator)).to(dtype)
    members: list[tuple[int, list[int] | None, int]] = [
        (1, [3, 40, 64], 2),
        (2, None, 0),
        (4, [1], 0),
        (0, [7, 31, 32], 3),
    ]
    rows: Any = None
    if sampled:
        count = len(logits)
        rows = SimpleNamespace(
            temperature=torch.full((count,), 0.8),
            seeds=torch.arange(count),
            positions=torch.arange(count),
            steps=torch.zeros(count, dtype=torch.int64),
            top_k=torch.full((count,), VOCAB),
            top_p=torch.full((count,), 0.9),
            min_p=torch.zeros(count),
        )
    plain: Any = {
        "sampled": sampled,
        "raw_confidence": torch.zeros(len(logits), dtype=torch.bool),
        "orders": None,
        "orders_used": frozenset({0}),
    }
    written, beside = grammar_step(*members), grammar_step(*members)
    wide = logits.float()
    written.constrain(wide)
    expected = score(wide, rows, **plain)
    before = logits.clone()
    found = score(
        logits, rows, **plain, constraints=beside.constraints(logits, 5, None)
    )
    assert torch.equal(logits, before)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(beside.candidates, written.candidates)
    # The frontier takes what is legal, silent or not; the others nothing silent.
    assert found.tokens[1 * LENGTH + 2] in (3, 40, 64)
    assert found.tokens[4 * LENGTH] == 1


def test_no_grammar_is_ready() -> None:
    logits = torch.randn(LENGTH, VOCAB)
    constraints = grammar_step((0, None, 0)).constraints(logits, 1, None)
    assert constraints.bitmasks is None


def test_constraints_of_the_positions_that_are_read() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(4 * LENGTH, VOCAB, generator=generator)
    members: list[tuple[int, list[int] | None, int]] = [
        (1, [3, 40, 64], 2),
        (2, None, 0),
        (3, [7, 31], 9),
    ]
    every, some = grammar_step(*members), grammar_step(*members)
    masked = torch.rand(4, LENGTH, generator=generator) < 0.5
    expected = masked.clone()
    expected[1, 2:] = expected[2, :] = expected[3, -1] = True
    read_np = positions_read(masked.numpy(), some.members)
    assert read_np is not None
    read = torch.from_numpy(read_np)
    assert torch.equal(read, expected.view(-1).nonzero().squeeze(1))
    whole = every.constraints(logits, 4, None)
    found = some.constraints(logits[read], 4, read)
    assert whole.bitmasks is not None and whole.bitmask_rows is not None
    assert found.bitmasks is not None and found.bitmask_rows is not None
    assert torch.equal(found.bitmasks, whole.bitmasks)
    assert torch.equal(found.bitmask_rows, whole.bitmask_rows[read])
    assert torch.equal(some.candidates, every.candidates)


def test_all_or_no_position_is_read() -> None:
    assert positions_read(np.ones((2, LENGTH), np.bool_), []) is None
    assert positions_read(np.zeros((2, LENGTH), np.bool_), []) is None
