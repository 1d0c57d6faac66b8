# SPDX-License-Identifier: Apache-2.0
"""The compiled step against its definition in torch, on the same states."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unmask.decoding import blocks
from vllm_unmask.decoding.canvas import Canvas
from vllm_unmask.decoding.denoise import NEVER, Strategy
from vllm_unmask.kernels import canvas as kernels
from vllm_unmask.kernels.row_statistics import Constraints, row_statistics

MASK = 3
VOCAB = 7
SPARE_SLOTS = 2
LOWEST = float(np.finfo(np.float32).min)
SCORES = [-np.inf, LOWEST, -1.0, 0.0, 0.25, 0.5, 0.9, 1.0, np.inf]


class Case:
    """A batch of requests in random slots, in any state a canvas can be in."""

    def __init__(self, seed: int, block: int, num_reqs: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.block, self.num_reqs = block, num_reqs
        num_slots = num_reqs + SPARE_SLOTS
        pending = rng.random(num_slots) < 0.4
        fixed = np.where(pending, 0, rng.integers(0, block, num_slots))
        ids = rng.integers(0, VOCAB, (num_slots, 2 * block))
        ids[rng.random(ids.shape) < 0.6] = MASK
        self.canvas = Canvas(
            ids=torch.from_numpy(ids),
            pending=torch.from_numpy(pending),
            num_fixed=torch.from_numpy(fixed),
            num_masks=torch.from_numpy(block - fixed),
            step=torch.from_numpy(rng.integers(0, block + 2, num_slots)),
        )
        threshold = rng.choice([0.0, 0.25, 0.9, 1.0, NEVER], num_slots)
        self.strategy = Strategy(
            num_steps=torch.from_numpy(rng.integers(1, block + 3, num_slots)),
            threshold=torch.from_numpy(threshold.astype(np.float32)),
            strict=torch.from_numpy(rng.random(num_slots) < 0.5),
        )
        self.slots = torch.from_numpy(rng.permutation(num_slots)[:num_reqs])
        # A request has its active block, part of it at the end of the context, or
        # none of it.
        width = rng.choice([0, block, block], num_reqs)
        cut = rng.random(num_reqs) < 0.2
        width = np.where(cut, rng.integers(1, block + 1, num_reqs), width)
        self.width = torch.from_numpy(width)

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.num_reqs, self.block
        confidence = self.rng.choice([*SCORES, np.nan], shape).astype(np.float32)
        order = self.rng.choice(SCORES, shape).astype(np.float32)
        return torch.from_numpy(confidence), torch.from_numpy(order)

    def copy(self) -> Canvas:
        return Canvas(*(field.clone() for field in self.canvas))


CASES = st.builds(
    Case,
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 4, 8, 13]),
    st.integers(1, 5),
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write must not look right by accident."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(True if tensor.dtype == torch.bool else -77)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(
        torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))
    )


def assert_equal(ours: object, expected: object) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@settings(max_examples=300)
@given(CASES)
def test_write_inputs(case: Case) -> None:
    block, rng = case.block, case.rng
    pending = case.canvas.pending[case.slots].numpy()
    # Prompt tokens in front of the canvas, which a pending one never has.
    lead = block * rng.integers(0, 4, case.num_reqs)
    skipped = np.where(pending, 0, lead)
    query_len = skipped + rng.integers(1, 2 * block + 1, case.num_reqs)
    gaps = rng.integers(0, 5, case.num_reqs)
    query_start = np.cumsum(query_len + gaps) - query_len
    rows = int(query_start[-1] + query_len[-1])
    before = torch.from_numpy(rng.integers(0, VOCAB, rows + 3, dtype=np.int32))
    results = []
    for step in (kernels, blocks):
        input_ids = before.clone()
        width, num_open, logits_rows = step.write_inputs(
            case.copy(),
            case.slots,
            *map(torch.from_numpy, (query_start, query_len, lead)),
            input_ids,
        )
        results.append((input_ids, width, num_open, logits_rows))
    assert_equal(*results)

    input_ids, width, num_open, logits_rows = results[0]
    for i, slot in enumerate(case.slots.tolist()):
        end = int(query_start[i] + query_len[i])
        start = int(query_start[i] + skipped[i])
        expected = case.canvas.ids[slot, : end - start]
        assert input_ids[start:end].tolist() == expected.tolist()
        active = logits_rows.view(-1, block)[i, : int(width[i])].tolist()
        first = int(query_start[i] + query_len[i] - num_open[i])
        assert active == list(range(first, first + int(width[i])))


@settings(max_examples=300)
@given(CASES)
def test_open_blocks(case: Case) -> None:
    args = case.slots, case.width, MASK
    canvas = case.copy()
    assert_equal(
        kernels.open_blocks(canvas, *args), blocks.open_blocks(case.canvas, *args)
    )
    assert_equal(canvas, case.canvas)


@settings(max_examples=500)
@given(CASES)
def test_accept(case: Case) -> None:
    _, masked = blocks.open_blocks(case.canvas, case.slots, case.width, MASK)
    scores = case.scores()
    args = case.strategy, case.slots, case.width, masked, *scores
    canvas = case.copy()
    accepted = kernels.accept(canvas, *args)
    assert_equal(accepted, blocks.accept(case.canvas, *args))
    assert_equal(canvas, case.canvas)
    assert not (accepted & ~masked).any()
    assert_equal(accepted.any(dim=1), masked.any(dim=1))


@settings(max_examples=300)
@given(CASES)
def test_close_blocks(case: Case) -> None:
    active, masked = blocks.open_blocks(case.canvas, case.slots, case.width, MASK)
    revealed = masked & torch.from_numpy(case.rng.random(masked.shape) < 0.7)
    active = torch.where(revealed, 5, active)
    ours, expected = case.copy(), case.copy()
    args = case.slots, case.width, active, MASK
    tokens, num_tokens = kernels.close_blocks(ours, *args)
    expected_tokens, expected_num = blocks.close_blocks(expected, *args)
    assert_equal(ours, expected)
    assert_equal(num_tokens, expected_num)
    # Beyond their number the tokens are nobody's.
    reported = torch.arange(case.block) < num_tokens.unsqueeze(1)
    assert_equal(tokens[reported], expected_tokens[reported])


def one_after_the_other(
    case: Case, canvas: Canvas, logits: torch.Tensor, read: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `greedy_step` is, in the parts that it is made of."""
    shape = case.num_reqs, case.block
    active, masked = blocks.open_blocks(canvas, case.slots, case.width, MASK)
    found = row_statistics(logits, None, Constraints(mask_id=MASK))
    tokens = torch.zeros(shape, dtype=torch.int64)
    sure = torch.zeros(shape)
    where = torch.arange(tokens.numel()) if read is None else read
    tokens.view(-1)[where] = found.tokens
    sure.view(-1)[where] = found.probability
    accepted = blocks.accept(
        canvas, case.strategy, case.slots, case.width, masked, sure, sure
    )
    after = torch.where(accepted, tokens, active)
    return blocks.close_blocks(canvas, case.slots, case.width, after, MASK)


@settings(max_examples=300)
@given(CASES, st.booleans(), st.sampled_from(["bfloat16", "float16", "float32"]))
def test_greedy_step(case: Case, all_rows: bool, dtype: str) -> None:
    rng = case.rng
    _, masked = blocks.open_blocks(case.canvas, case.slots, case.width, MASK)
    also = torch.from_numpy(rng.random(masked.shape) < 0.3)
    read = (masked | also).view(-1).nonzero().squeeze(1)
    if all_rows or not len(read):
        read = None
    size = masked.numel() if read is None else len(read)
    # Few values, so that there are ties; and rows that say nothing.
    values = rng.choice([-2.0, 0.5, 3.0, 8.0, -np.inf], (size, VOCAB))
    values[rng.random(size) < 0.1] = rng.choice([-np.inf, np.nan, np.inf])
    logits = torch.from_numpy(values).to(getattr(torch, dtype))
    before = logits.clone()
    ours, expected = case.copy(), case.copy()
    tokens, num_tokens = kernels.greedy_step(
        ours, case.strategy, case.slots, case.width, logits, read, MASK
    )
    expected_tokens, expected_num = one_after_the_other(case, expected, logits, read)
    assert_equal(ours, expected)
    assert_equal(num_tokens, expected_num)
    reported = torch.arange(case.block) < num_tokens.unsqueeze(1)
    assert_equal(tokens[reported], expected_tokens[reported])
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


def test_a_greedy_step_never_reveals_the_mask() -> None:
    case = Case(0, 4, 1)
    canvas = case.canvas._replace(
        ids=torch.zeros_like(case.canvas.ids),
        pending=torch.zeros_like(case.canvas.pending),
        num_fixed=torch.zeros_like(case.canvas.num_fixed),
    )
    # A row in which everything is banned falls back to token 0, here the mask.
    logits = torch.full((4, VOCAB), -torch.inf)
    kernels.greedy_step(
        canvas, case.strategy, case.slots, torch.tensor([4]), logits, None, 0
    )
    assert (canvas.ids[case.slots, :4] == 0).sum() < 4
    assert set(canvas.ids[case.slots, :4].unique().tolist()) <= {0, 1}


def test_nan_never_passes_a_threshold() -> None:
    case = Case(0, 4, 1)
    masked = torch.ones(1, 4, dtype=torch.bool)
    strategy = Strategy(*(field.clone() for field in case.strategy))
    strategy.threshold.fill_(0.0)
    strategy.num_steps.fill_(4)
    case.canvas.num_fixed.zero_()
    case.canvas.num_masks.fill_(4)
    accepted = kernels.accept(
        case.canvas,
        strategy,
        case.slots,
        torch.tensor([4]),
        masked,
        torch.full((1, 4), torch.nan),
        torch.tensor([[0.1, 0.3, 0.3, 0.2]]),
    )
    assert accepted.tolist() == [[False, True, False, False]]


def test_another_dtype_or_layout_is_refused() -> None:
    case = Case(1, 4, 2)
    with pytest.raises(TypeError):
        kernels.open_blocks(case.canvas, case.slots.int(), case.width, MASK)
    strided = case.canvas._replace(ids=case.canvas.ids.T.contiguous().T)
    with pytest.raises(TypeError):
        kernels.open_blocks(strided, case.slots, case.width, MASK)
