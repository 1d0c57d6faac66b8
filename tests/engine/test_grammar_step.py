# SPDX-License-Identifier: Apache-2.0
"""Applying a bitmask to logits."""

import numpy as np
import pytest
import torch
import xgrammar


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 512, 5001])
def test_bitmask_is_applied_as_xgrammar_does(vocab: int) -> None:
    # On CPU, vLLM's worker replaces what the runner's modules import by name.
    import vllm.v1.worker.cpu.shm  # noqa: F401

    from vllm_unmask.engine.grammar_step import apply_bitmask

    random = np.random.default_rng(vocab)
    words = -(-vocab // 32)
    bitmask = random.integers(-(2**31), 2**31, (3, words)).astype(np.int32)
    bitmask[1], bitmask[2] = 0, -1
    logits = torch.from_numpy(random.normal(size=(3, vocab)).astype(np.float32))
    expected = logits.clone()
    # xgrammar's own loop for CPU writes past the end of the last row where the bits
    # past the vocabulary are 0.
    xgrammar.apply_token_bitmask_inplace(
        expected, torch.from_numpy(bitmask), backend="torch_native"
    )
    apply_bitmask(logits, bitmask)
    assert torch.equal(logits, expected)
    assert logits[1].isinf().all() and logits[2].isfinite().all()
