# SPDX-License-Identifier: Apache-2.0
"""The cut of a batch into virtual rows, against the mask it stands for."""

import numpy as np
import torch
from answer_reference import two_grids_mask
from dense_reference import block_causal_mask
from hypothesis import given
from hypothesis import strategies as st

from vllm_unmask.engine.attention import Parts, plan_rows


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


@given(st.data())
def test_rows_of_parts_see_what_the_mask_of_two_grids_shows(
    data: st.DataObject,
) -> None:
    """Cut short from a place on that is known, and read short from one that is not."""
    part = data.draw(st.integers(1, 4))
    block = part * data.draw(st.integers(1, 4))
    count = data.draw(st.integers(1, 5))
    blocks = st.integers(0, 5)
    rows = st.lists(
        st.tuples(blocks, st.integers(1, 40), blocks, blocks), min_size=count
    )
    computed, lengths, known, more = (
        np.array(column, np.int64) for column in zip(*data.draw(rows), strict=True)
    )
    length = np.array([data.draw(st.sampled_from([part, block])) for _ in known])
    long = known * block
    switch = computed * block + long + more * block
    parts = Parts(length, long, torch.from_numpy(switch))
    plan = plan_rows(lengths, block, parts)
    query_start = np.concatenate(([0], np.cumsum(lengths)))
    assert plan.query_start[-1] == query_start[-1]
    seen = 0
    for row, request in enumerate(plan.request.tolist()):
        begin = int(computed[request]) * block
        total = begin + int(lengths[request])
        first, last = plan.query_start[row], plan.query_start[row + 1]
        at = begin + int(first - query_start[request])
        after = plan.after if at >= switch[request] else plan.after_block
        mask = two_grids_mask(total, block, int(length[request]), int(switch[request]))
        for token in range(first, last):
            expected = torch.zeros(total, dtype=torch.bool)
            expected[: total - int(after[row])] = True
            assert torch.equal(mask[begin + token - query_start[request]], expected)
            seen += 1
    assert seen == lengths.sum()
