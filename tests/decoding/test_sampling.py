# SPDX-License-Identifier: Apache-2.0
"""Temperature and truncation, against one row at a time and against vLLM."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unmask.decoding.sampling import sample, transform

INF = math.inf
# Exact in float32, so that ties and the borders of top-p are ties here too.
LOGITS = st.sampled_from([-INF, -3.0, -1.0, 0.0, 0.5, 1.0, 2.5])


def brute_force(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> list[float]:
    """One row, in Python: what stays keeps its scaled logit."""
    if temperature == 0:
        return logits
    scaled = [x / temperature for x in logits]
    peak = max(scaled)
    if peak == -INF:
        return scaled
    ids = [i for i, x in enumerate(scaled) if math.exp(x - peak) >= min_p * (1 - 1e-9)]
    ids = sorted(ids, key=lambda i: (-scaled[i], i))[:top_k]
    mass = [math.exp(scaled[i] - peak) for i in ids]
    kept = {ids[0]}
    for rank, i in enumerate(ids):
        if top_p >= 1 or sum(mass[:rank]) / sum(mass) < top_p - 1e-7:
            kept.add(i)
    return [x if i in kept else -INF for i, x in enumerate(scaled)]


def transform_rows(
    rows: list[tuple[list[float], float, int, float, float]],
) -> torch.Tensor:
    logits, temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return transform(
        torch.tensor(logits),
        torch.tensor(temperature),
        torch.tensor(top_k),
        torch.tensor(top_p),
        torch.tensor(min_p),
    )


@st.composite
def batches(
    draw: st.DrawFn,
) -> list[tuple[list[float], float, int, float, float]]:
    vocab = draw(st.integers(1, 9))
    row = st.tuples(
        st.lists(LOGITS, min_size=vocab, max_size=vocab),
        st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        st.integers(1, vocab + 1),
        st.sampled_from([1.0, 0.95, 0.71, 0.5, 0.25, 1e-3, 1e-7]),
        st.sampled_from([0.0, 0.07, 0.3, 1.0]),
    )
    return draw(st.lists(row, min_size=1, max_size=5))


@settings(max_examples=150)
@given(batches())
def test_transform_is_the_row_by_row_specification(
    rows: list[tuple[list[float], float, int, float, float]],
) -> None:
    result = transform_rows(rows)
    expected = torch.tensor([brute_force(*row) for row in rows])
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [
        pytest.param(5, 1.0, 0.0, [0, 1, 2, 3, 4], id="nothing-cut"),
        pytest.param(1, 1.0, 0.0, [1], id="top_k=1-takes-the-smallest-of-a-tie"),
        pytest.param(2, 1.0, 0.0, [1, 3], id="top_k-of-three-equal"),
        pytest.param(5, 1e-9, 0.0, [1], id="tiny-top_p"),
        pytest.param(5, 1e-50, 0.0, [1], id="top_p-that-float32-rounds-to-0"),
        pytest.param(5, 0.5, 0.0, [1, 3], id="the-token-that-crosses-stays"),
        pytest.param(5, 1.0, 1.0, [1, 3, 4], id="min_p=1-keeps-what-ties-with-the-top"),
        pytest.param(2, 0.5, 0.0, [1], id="top_p-of-what-top_k-left"),
        pytest.param(5, 0.34, 1.0, [1, 3], id="top_p-of-what-min_p-left"),
    ],
)
def test_truncation_by_hand(
    top_k: int, top_p: float, min_p: float, kept: list[int]
) -> None:
    logits = [0.0, 1.0, -1.0, 1.0, 1.0]
    result = transform_rows([(logits, 1.0, top_k, top_p, min_p)])[0]
    assert result.isfinite().nonzero().flatten().tolist() == kept


def test_rows_without_a_token_and_greedy_rows_pass() -> None:
    dead = [-INF] * 4
    mixed = [3.0, -INF, 2.0, 1.0]
    result = transform_rows(
        [(dead, 0.7, 2, 0.5, 0.3), (mixed, 0.0, 1, 1e-6, 1.0), (dead, 0.0, 4, 1.0, 0.0)]
    )
    assert result.tolist() == [dead, mixed, dead]


@pytest.mark.parametrize("truncated", [True, False])
def test_without_truncation_only_the_temperature_acts(truncated: bool) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0, 0.1])
    result = transform(
        logits,
        temperature,
        torch.full((6,), 50),
        torch.ones(6),
        torch.zeros(6),
        truncated=truncated,
    )
    divisor = torch.where(temperature == 0, 1.0, temperature)
    assert torch.equal(result, logits / divisor[:, None])


@pytest.mark.parametrize("vocab", [16, 400])
@pytest.mark.parametrize("use", ["top_k", "top_p", "both"])
def test_transform_keeps_what_vllm_keeps(vocab: int, use: str) -> None:
    """Without ties, exactly the same tokens.

    vLLM sums from the small end: the two may differ where a sum comes within
    rounding of top-p, which none of these rows does.
    """
    ops = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    g = torch.Generator().manual_seed(vocab)
    rows = 300
    # Distinct logits: a shuffled grid.
    grid = torch.linspace(-6, 6, vocab)
    logits = torch.stack(
        [grid[torch.randperm(vocab, generator=g)] for _ in range(rows)]
    )
    top_k = torch.randint(1, vocab + 1, (rows,), generator=g)
    top_p = torch.rand(rows, generator=g).clamp_(min=0.01)
    k = top_k if use != "top_p" else None
    p = top_p if use != "top_k" else None
    theirs = ops.apply_top_k_top_p(logits.clone(), k, p)
    ours = transform(
        logits,
        torch.ones(rows),
        top_k if k is not None else torch.full((rows,), vocab),
        top_p if p is not None else torch.ones(rows),
        torch.zeros(rows),
    )
    assert torch.equal(theirs, ours)


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0]), min_size=2, max_size=8),
    st.data(),
)
def test_ties_at_the_border_of_top_k(logits: list[float], data: st.DataObject) -> None:
    """vLLM keeps all that tie with the k-th token, we keep k: the smallest."""
    ops = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    top_k = data.draw(st.integers(1, len(logits)))
    row = torch.tensor([logits])
    theirs = ops.apply_top_k_top_p(row.clone(), torch.tensor([top_k]), None)
    ours = transform_rows([(logits, 1.0, top_k, 1.0, 0.0)])
    kept = ours.isfinite()
    assert int(kept.sum()) == top_k
    assert bool((theirs.isfinite() >= kept).all())
    surplus = theirs.isfinite() & ~kept
    assert bool((row[surplus] == row[kept].min()).all())


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1e-30, 0.1, 0.5, 1.0]), min_size=7, max_size=7),
        min_size=1,
        max_size=4,
    ),
    st.one_of(st.sampled_from([0, 1, 2**53 - 1, 2**52]), st.integers(0, 2**53 - 1)),
)
def test_sample_never_takes_what_has_no_mass(
    probs: list[list[float]], draw: int
) -> None:
    draws = torch.full((len(probs),), draw * 2.0**-53, dtype=torch.float64)
    for row, token in zip(probs, sample(torch.tensor(probs), draws), strict=True):
        assert row[token] > 0 if any(row) else token == len(row)


def test_sample_inverts_the_distribution_function() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(6, -1)
    # float32 would round the last draw to 1.
    draws = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-53]
    tokens = sample(probs, torch.tensor(draws, dtype=torch.float64))
    assert tokens.tolist() == [1, 1, 3, 3, 4, 4]


def test_sample_of_a_row_without_distribution_is_no_token() -> None:
    probs = torch.tensor([[0.0, 0.0], [math.nan, math.nan], [0.0, 1.0]])
    assert sample(probs, torch.full((3,), 0.5).double()).tolist() == [2, 2, 1]


def test_rare_tokens_keep_their_probability() -> None:
    """A float32 running sum cannot count 2**-26 steps up to 1."""
    probs = torch.full((1, 4096), 2.0**-30)
    probs[0, 0] = 1.0
    total = probs.double().sum()
    for token in (1, 100, 4095):
        draw = (1 + (token - 0.5) * 2.0**-30) / total
        assert sample(probs, draw.reshape(1)).tolist() == [token]
