# SPDX-License-Identifier: Apache-2.0
"""The cut of a batch into virtual rows, against the mask it stands for."""

import numpy as np
import torch
from dense_reference import block_causal_mask
from hypothesis import given
from hypothesis import strategies as st

from vllm_unmask.engine.attention import plan_rows


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.lists(st.integers(0, 5), min_size=6, max_size=6),
    st.integers(1, 16),
)
def test_rows_see_what_the_block_causal_mask_shows(
    query_lens: list[int], computed_blocks: list[int], block: int
) -> None:
    plan = plan_rows(np.array(query_lens), block)
    query_start = np.concatenate(([0], np.cumsum(query_lens)))
    assert plan.query_start[-1] == query_start[-1]
    seen = 0
    for row, request in enumerate(plan.request.tolist()):
        computed = computed_blocks[request] * block
        total = computed + query_lens[request]
        mask = block_causal_mask(total, block)
        first, last = plan.query_start[row], plan.query_start[row + 1]
        assert 0 < last - first <= block
        seq_len = total - int(plan.after[row])
        for token in range(first, last):
            position = computed + token - query_start[request]
            expected = torch.zeros(total, dtype=torch.bool)
            expected[:seq_len] = True
            assert torch.equal(mask[position], expected)
            seen += 1
    assert seen == sum(query_lens)
