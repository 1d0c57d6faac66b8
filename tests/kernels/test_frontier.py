# SPDX-License-Identifier: Apache-2.0
"""The frontier kernel against its definition and against plain Python."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_unmask.kernels.frontier import constrain_frontier, reference


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    seed = draw(st.integers(0, 2**32 - 1))
    block = draw(st.integers(1, 9))
    blocks = draw(st.integers(1, 4))
    vocab = draw(st.sampled_from([1, 2, 31, 32, 33, 64, 97, 500, 5001]))
    density = draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
    ties = draw(st.booleans())
    random = np.random.default_rng(seed)
    logits = random.normal(size=(blocks * block, vocab)).astype(np.float32)
    if ties:
        logits = np.round(logits)
    logits[random.random(logits.shape) < 0.1] = -np.inf
    chosen = random.permutation(blocks)[: random.integers(0, blocks + 1)]
    rows = chosen * block + random.integers(0, block, len(chosen))
    words = -(-vocab // 32) + draw(st.integers(0, 2))
    legal = random.random((len(chosen), 32 * words)) < density
    bitmask = np.packbits(legal, axis=1, bitorder="little").view(np.int32)
    silent = random.permutation(vocab)[: random.integers(0, min(vocab, 5) + 1)]
    return (
        torch.from_numpy(logits),
        torch.from_numpy(rows.astype(np.int64)),
        torch.from_numpy(bitmask.reshape(len(chosen), words)),
        torch.from_numpy(silent.astype(np.int64)),
        torch.tensor([block, min(draw(st.integers(1, 8)), vocab)]),
    )


@given(cases())
def test_kernel_is_its_definition(case: tuple[torch.Tensor, ...]) -> None:
    logits, rows, bitmask, silent, sizes = case
    block, count = sizes.tolist()
    ours, theirs = logits.clone(), logits.clone()
    best = constrain_frontier(ours, rows, bitmask, silent, block, count)
    expected = reference.constrain_frontier(theirs, rows, bitmask, silent, block, count)
    assert torch.equal(ours, theirs)
    assert torch.equal(best, expected)


@given(cases())
def test_definition_is_the_plain_loop(case: tuple[torch.Tensor, ...]) -> None:
    logits, rows, bitmask, silent, sizes = case
    block, count = sizes.tolist()
    expected = logits.clone()
    tokens = []
    for i, row in enumerate(rows.tolist()):
        first = row // block * block
        for other in range(first, first + block):
            if other != row:
                expected[other, silent] = -torch.inf
        for token in range(logits.shape[1]):
            if not int(bitmask[i, token // 32]) >> token % 32 & 1:
                expected[row, token] = -torch.inf
        values = expected[row].tolist()
        order = sorted(range(len(values)), key=lambda t: (-values[t], t))
        legal = [token for token in order if values[token] > -torch.inf]
        tokens.append((legal + [-1] * count)[:count])
    best = reference.constrain_frontier(logits, rows, bitmask, silent, block, count)
    assert torch.equal(logits, expected)
    assert best.tolist() == tokens


@pytest.mark.parametrize("vocab", [1, 31, 33, 512, 5001])
def test_a_bitmask_means_what_it_does_to_xgrammar(vocab: int) -> None:
    import xgrammar

    random = np.random.default_rng(vocab)
    words = -(-vocab // 32)
    bitmask = torch.from_numpy(
        random.integers(-(2**31), 2**31, (3, words)).astype(np.int32)
    )
    bitmask[1], bitmask[2] = 0, -1
    logits = torch.from_numpy(random.normal(size=(3, vocab)).astype(np.float32))
    expected = logits.clone()
    # xgrammar's own loop for CPU writes past the end of the last row where the bits
    # past the vocabulary are 0.
    xgrammar.apply_token_bitmask_inplace(expected, bitmask, backend="torch_native")
    none = torch.zeros(0, dtype=torch.int64)
    constrain_frontier(logits, torch.arange(3), bitmask, none, 1, 1)
    assert torch.equal(logits, expected)
