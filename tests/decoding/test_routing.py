# SPDX-License-Identifier: Apache-2.0
"""Routing policies against plain Python, one request at a time."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_unmask.decoding.routing import (
    BUCKETS,
    ESTIMATES,
    POLICIES,
    PUBLISHED,
    Bandit,
    Configuration,
    estimate_acceptance,
    expected_accepted,
    new_bandit,
    reward_bandit,
    route_bandit,
    route_hysteresis,
    route_span_length,
    route_threshold,
    score,
    situation,
)
from vllm_unmask.decoding.verifying import first_span

VOCAB = 100
# Exact in float32, so that what is equal here is equal there.
SHARES = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0])
MASKS = st.integers(1, 9).flatmap(
    lambda n: st.lists(
        st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=5
    )
)


def rows_like(masked: torch.Tensor, seed: int) -> torch.Tensor:
    """Eighths in [0, 1], float32 [requests, block]."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, masked.shape, generator=random) / 8


@pytest.mark.parametrize("name", ESTIMATES)
@given(SHARES, SHARES, SHARES, SHARES, st.sampled_from([0.125, 0.5, 1.0, 3.0]))
def test_estimates_are_the_formulas(
    name: str, confidence: float, first: float, part: float, doubt: float, x: float
) -> None:
    second = first * part
    margin, nats = first - second, doubt * math.log(VOCAB)
    expected = {
        "margin_threshold": float(margin > x),
        "entropy_threshold": float(nats / math.log(VOCAB) < x),
        "confidence_power": confidence**x,
        "margin_linear": min(x * margin, 1.0),
        "entropy_decay": math.exp(-x * doubt),
    }[name]
    if name == "entropy_threshold" and doubt == x:
        return
    kinds = torch.tensor([list(ESTIMATES).index(name)])
    rows = (torch.tensor([[v]]) for v in (confidence, first, second, nats))
    value = estimate_acceptance(kinds, torch.tensor([x]), *rows, VOCAB)
    assert float(value) == pytest.approx(expected, abs=1e-6)


def test_each_request_has_its_own_estimate() -> None:
    kinds = torch.arange(len(ESTIMATES))
    parameters = torch.tensor(list(ESTIMATES.values()))
    rows = [torch.full((5, 1), v) for v in (0.75, 0.5, 0.25, math.log(10))]
    values = estimate_acceptance(kinds, parameters, *rows, VOCAB).flatten()
    # log 10 is half of log 100, and is not less than half.
    expected = [1.0, 0.0, 0.75, 0.25, math.exp(-0.5)]
    assert values.tolist() == pytest.approx(expected, abs=1e-6)


def gain_of(
    acceptance: list[float],
    confidence: list[float],
    masked: list[bool],
    config: Configuration,
) -> float:
    """The score, in Python."""
    span = first_span(torch.tensor([masked]))[0].tolist()
    if not any(span):
        return -math.inf
    total, product = 0.0, 1.0
    for a, inside in zip(acceptance, span, strict=True):
        if inside:
            product *= a
            total += product
    sure = sum(
        m and c > config.threshold for m, c in zip(masked, confidence, strict=True)
    )
    return total - config.cost * (sure if config.dynamic else 1)


def tensors(config: Configuration, requests: int) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor([value] * requests)
        for name, value in config._asdict().items()
        if isinstance(value, int | float)
    }


def score_of(
    acceptance: torch.Tensor,
    confidence: torch.Tensor,
    masked: torch.Tensor,
    config: Configuration,
) -> torch.Tensor:
    span, p = first_span(masked), tensors(config, len(masked))
    return score(
        expected_accepted(acceptance, span),
        span,
        confidence,
        masked,
        p["threshold"],
        p["cost"],
        p["dynamic"],
    )


@given(
    MASKS,
    st.integers(0, 2**32),
    st.sampled_from([0.0, 1.0, 2.5]),
    st.booleans(),
    SHARES,
)
def test_score_is_the_plain_sum(
    masks: list[list[bool]], seed: int, cost: float, dynamic: bool, threshold: float
) -> None:
    masked = torch.tensor(masks)
    acceptance, confidence = rows_like(masked, seed), rows_like(masked, seed + 1)
    config = Configuration("", 0, threshold, cost=cost, dynamic=dynamic)
    gain = score_of(acceptance, confidence, masked, config)
    expected = [
        gain_of(a, c, m, config)
        for a, c, m in zip(acceptance.tolist(), confidence.tolist(), masks, strict=True)
    ]
    assert gain.tolist() == pytest.approx(expected, abs=1e-5)


@given(MASKS, st.integers(1, 9))
def test_span_length(masks: list[list[bool]], least: int) -> None:
    span = first_span(torch.tensor(masks))
    lengths = [sum(row) for row in span.tolist()]
    chosen = route_span_length(span, torch.full((len(masks),), least))
    assert chosen.tolist() == [length >= least for length in lengths]


def test_threshold_is_reached_at_equality() -> None:
    scores = torch.tensor([0.5, 1.0, 1.5, -math.inf])
    assert route_threshold(scores, torch.ones(4)).tolist() == [0, 1, 1, 0]


def test_hysteresis_by_hand() -> None:
    """On above 1, off below -5; at either border nothing changes."""
    scores = [0.0, 1.0, 1.5, 1.0, 0.0, -5.0, -5.5, 0.0, 1.0, 9.0, -math.inf]
    states = [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0]
    verified = torch.tensor([False])
    for value, expected in zip(scores, states, strict=True):
        verified = route_hysteresis(
            verified, torch.tensor([value]), torch.tensor([1.0]), torch.tensor([-5.0])
        )
        assert verified.tolist() == [bool(expected)]


class PlainBandit:
    """UCB1 with dictionaries."""

    def __init__(self) -> None:
        self.decisions = 0
        self.rewards: dict[tuple[int, int], list[float]] = {}

    def decide(self, bucket: int, exploration: float) -> bool:
        self.decisions += 1
        bounds = []
        for action in (0, 1):
            seen = self.rewards.get((action, bucket), [])
            if not seen:
                bounds.append(math.inf)
                continue
            spread = math.sqrt(math.log(self.decisions) / len(seen))
            bounds.append(sum(seen) / len(seen) + exploration * spread)
        # Equal in exact arithmetic may differ here by a last bit.
        assert bounds[0] == bounds[1] or abs(bounds[0] - bounds[1]) > 1e-5
        return bounds[1] >= bounds[0]

    def reward(self, bucket: int, verified: bool, num_tokens: int) -> None:
        seen = self.rewards.setdefault((int(verified), bucket), [])
        seen.append(num_tokens / (2 if verified else 1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("exploration", [0.0, 0.31, 2.0])
def test_bandit_is_the_plain_loop(seed: int, exploration: float) -> None:
    requests = 4
    random = torch.Generator().manual_seed(seed)
    plain = [PlainBandit() for _ in range(requests)]
    bandit, beta = new_bandit(requests), torch.full((requests,), exploration)
    both = set()
    for _ in range(200):
        bucket = torch.randint(0, 2, (requests,), generator=random)
        tokens = torch.randint(1, 90, (requests,), generator=random)
        verified, bandit = route_bandit(bandit, bucket, beta)
        expected = [
            b.decide(k, exploration)
            for b, k in zip(plain, bucket.tolist(), strict=True)
        ]
        assert verified.tolist() == expected
        both.update(expected)
        bandit = reward_bandit(bandit, bucket, verified, tokens)
        rows = zip(plain, bucket.tolist(), expected, tokens.tolist(), strict=True)
        for b, k, choice, n in rows:
            b.reward(k, choice, n)
    assert both == {False, True}
    assert bandit.decisions.tolist() == [200] * requests
    assert bandit.counts.sum(dim=(1, 2)).tolist() == [200] * requests


def test_bandit_tries_verifying_first_and_prefers_it_in_a_tie() -> None:
    bandit, bucket = new_bandit(1), torch.tensor([3])
    choices = []
    for tokens in (4, 2, 4):
        verified, bandit = route_bandit(bandit, bucket, torch.ones(1))
        choices.append(bool(verified))
        bandit = reward_bandit(bandit, bucket, verified, torch.tensor([tokens]))
    # Four tokens for two forwards are worth two for one.
    assert choices == [True, False, True]
    assert bandit.rewards[0, :, 3].tolist() == [2.0, 4.0]


def test_state_goes_in_unchanged() -> None:
    bandit, bucket = new_bandit(2), torch.tensor([0, 7])
    before = Bandit(*(x.clone() for x in bandit))
    verified, after = route_bandit(bandit, bucket, torch.ones(2))
    reward_bandit(after, bucket, verified, torch.ones(2, dtype=torch.int64))
    for ours, theirs in zip(bandit, before, strict=True):
        assert torch.equal(ours, theirs)


def plain_bin(value: float, low: float, high: float) -> int:
    if high <= low:
        return 0
    return min(int((value - low) / (high - low) * 2), 1)


@given(MASKS, st.integers(0, 2**32))
def test_situation_is_the_plain_one(masks: list[list[bool]], seed: int) -> None:
    masked = torch.tensor(masks)
    shares, block = rows_like(masked, seed), masked.shape[1]
    span = first_span(masked)
    entropy = shares * math.log(VOCAB)
    expected = []
    for i, row in enumerate(masks):
        inside = [
            v for v, s in zip(shares[i].tolist(), span[i].tolist(), strict=True) if s
        ]
        mean = sum(inside) / max(len(inside), 1)
        if abs(mean - 0.5) < 1e-6:
            return
        length = plain_bin(max(len(inside), 1), 1, block)
        progress = plain_bin(1 - sum(row) / block, 0, 1)
        expected.append((length * 2 + progress) * 2 + plain_bin(mean, 0, 1))
    bucket = situation(span, masked, entropy, VOCAB)
    assert bucket.tolist() == expected
    assert bucket.max() < BUCKETS


def decide(config: Configuration, gain: torch.Tensor, span: torch.Tensor) -> Any:
    p = tensors(config, len(gain))
    if config.policy == "span_length":
        return route_span_length(span, p["min_span"]).tolist()
    if config.policy == "score_threshold":
        return route_threshold(gain, p["min_score"]).tolist()
    off = torch.zeros(len(gain), dtype=torch.bool)
    return route_hysteresis(off, gain, p["on_above"], p["off_below"]).tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_do_what_the_code_does(name: str) -> None:
    config = PUBLISHED[name]
    assert config.policy in POLICIES and config.estimate in ESTIMATES
    length = config.block
    masked = torch.zeros(4, length, dtype=torch.bool)
    masked[1, -1] = masked[2, : length // 2] = masked[3] = True
    # Sure of everything, of nothing.
    results = []
    for confidence, nats in ((1.0, 0.0), (0.1, math.log(VOCAB))):
        rows = torch.full(masked.shape, confidence)
        estimate = torch.full((4,), list(ESTIMATES).index(config.estimate))
        acceptance = estimate_acceptance(
            estimate,
            torch.ones(4),
            rows,
            rows,
            rows,
            torch.full_like(rows, nats),
            VOCAB,
        )
        gain = score_of(acceptance, rows, masked, config)
        results.append(decide(config, gain, first_span(masked)))
    sure, unsure = results
    # E[K] of n certain drafts is n, of n uncertain ones less than 1 / (e - 1) = 0.58.
    expected = {
        "sdar_4": ([0, 1, 1, 1], [0, 0, 0, 0]),
        "sdar_16": ([0, 1, 1, 1], [0, 1, 1, 1]),
        "fast_dllm_v2_4": ([0, 0, 0, 0], [0, 0, 0, 0]),
        "fast_dllm_v2_16": ([0, 0, 0, 0], [0, 0, 0, 0]),
        "fast_dllm_v2_32": ([0, 0, 1, 1], [0, 0, 1, 1]),
        "llada2_conservative": ([0, 1, 1, 1], [0, 1, 1, 1]),
        "llada2_quality": ([0, 0, 1, 1], [0, 0, 0, 0]),
    }[name]
    assert (sure, unsure) == expected
