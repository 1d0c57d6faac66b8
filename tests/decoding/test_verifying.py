# SPDX-License-Identifier: Apache-2.0
"""Verification: its law, what is deterministic about it, and rows without a law."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_unmask.decoding import sampling, verifying
from vllm_unmask.decoding.sampling import CANDIDATE_STREAM, sample, transform, uniform
from vllm_unmask.decoding.verifying import (
    ACCEPTANCE_STREAM,
    RESIDUAL_STREAM,
    Verified,
    first_span,
    verify,
)

DRAWS = 80_000
P_VALUE = 1e-4
NAN, INF = math.nan, math.inf

Model = Callable[[torch.Tensor], torch.Tensor]


def p_value(observed: torch.Tensor, probs: torch.Tensor) -> float:
    """Chi-square of counts under probabilities; bins that expect under 5 are one."""
    expected = probs.double() * observed.sum()
    rare = expected < 5
    e = torch.cat((expected[~rare], expected[rare].sum().reshape(1)))
    o = torch.cat((observed[~rare], observed[rare].sum().reshape(1))).double()
    e, o = e[e > 0], o[e > 0]
    assert int(o.sum()) == int(observed.sum()), "a token of probability 0"
    statistic = ((o - e) ** 2 / e).sum()
    half = torch.tensor((len(e) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


def draw(logits: torch.Tensor, stream: int, first_seed: int = 0) -> torch.Tensor:
    """Tokens int64 [requests, block] of logits, one seed a request."""
    requests, block, vocab = logits.shape
    draws = noise(requests, block, stream, first_seed)
    return sample(logits.softmax(2).view(-1, vocab), draws.flatten()).view(-1, block)


def noise(requests: int, block: int, stream: int, first_seed: int = 0) -> torch.Tensor:
    """float64 [requests, block], one seed a request, one position a column."""
    seeds = torch.arange(first_seed, first_seed + requests).repeat_interleave(block)
    positions = torch.arange(block).repeat(requests)
    step = torch.full_like(seeds, 3)
    return uniform(seeds, positions, step, stream).view(requests, block)


def run(
    drafts: torch.Tensor,
    draft_logits: torch.Tensor,
    verifier_logits: torch.Tensor,
    *,
    span: torch.Tensor | None = None,
    greedy: bool | torch.Tensor = False,
    exponent: float | torch.Tensor = 1.0,
    streams: tuple[int, int] = (ACCEPTANCE_STREAM, RESIDUAL_STREAM),
    first_seed: int = 0,
) -> Verified:
    requests, block = drafts.shape
    if span is None:
        span = torch.ones_like(drafts, dtype=torch.bool)
    uniforms, residual = (noise(requests, block, s, first_seed) for s in streams)
    return verify(
        drafts,
        span,
        draft_logits,
        verifier_logits,
        torch.as_tensor(greedy).expand(requests),
        torch.as_tensor(exponent).expand(requests),
        uniforms,
        residual,
    )


def adversary(vocab: int, block: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft and verifier logits [block, vocab]: the draft likes what is unlikely."""
    random = torch.Generator().manual_seed(vocab)
    target = torch.randn(block, vocab, generator=random)
    return -target, target


@pytest.mark.parametrize("vocab", [5, 16])
def test_marginal_law_is_the_verifiers(vocab: int) -> None:
    draft, target = adversary(vocab)
    p, q = (x.expand(DRAWS, 1, vocab) for x in (draft, target))
    result = run(draw(p, CANDIDATE_STREAM), p, q)
    assert result.accepted.all()
    counts = torch.bincount(result.tokens[:, 0], minlength=vocab)
    assert p_value(counts, target[0].softmax(0)) > P_VALUE


@pytest.mark.parametrize(
    "streams",
    [
        pytest.param((ACCEPTANCE_STREAM, CANDIDATE_STREAM), id="residual-is-draft"),
        pytest.param((CANDIDATE_STREAM, RESIDUAL_STREAM), id="acceptance-is-draft"),
        pytest.param((RESIDUAL_STREAM, RESIDUAL_STREAM), id="residual-is-acceptance"),
    ],
)
def test_marginal_law_needs_streams_of_their_own(streams: tuple[int, int]) -> None:
    draft, target = adversary(16)
    p, q = (x.expand(DRAWS, 1, 16) for x in (draft, target))
    result = run(draw(p, CANDIDATE_STREAM), p, q, streams=streams)
    counts = torch.bincount(result.tokens[:, 0], minlength=16)
    assert p_value(counts, target[0].softmax(0)) < P_VALUE * 1e-3


def test_streams_are_five() -> None:
    streams = {
        value
        for module in (sampling, verifying)
        for name, value in vars(module).items()
        if name.endswith("_STREAM")
    }
    assert streams == set(range(5))


def test_law_under_transforms_and_bans() -> None:
    """Temperature, top-k, top-p, min-p and a ban of both sides, or of one."""
    draft, target = adversary(16)
    banned = target.clone()
    banned[0, ::3] = -INF
    parameters = [torch.tensor([x]) for x in (0.7, 9, 0.9, 0.02)]
    q = transform(banned, *parameters)
    for p in (transform(draft.masked_fill(banned == -INF, -INF), *parameters), draft):
        drafts = draw(p.expand(DRAWS, 1, 16), CANDIDATE_STREAM)
        result = run(drafts, p.expand(DRAWS, 1, 16), q.expand(DRAWS, 1, 16))
        counts = torch.bincount(result.tokens[:, 0], minlength=16)
        assert p_value(counts, q[0].softmax(0)) > P_VALUE


def decode(model: Model, streams: tuple[int, int], length: int) -> torch.Tensor:
    """Whole sequences int64 [DRAWS, length], spans verified until nothing is masked."""
    random = torch.Generator().manual_seed(length)
    tokens = torch.full((DRAWS, length), -1)
    for step in range(length):
        masked = tokens < 0
        span = first_span(masked)
        # A draft whose positions are independent, and another in every step.
        logits = torch.randn(1, length, 5, generator=random).expand(DRAWS, -1, -1)
        seed = step * DRAWS
        drafts = torch.where(masked, draw(logits, CANDIDATE_STREAM, seed), tokens)
        verifier = torch.stack([model(drafts[:, :i]) for i in range(length)], dim=1)
        result = run(
            drafts, logits, verifier, span=span, streams=streams, first_seed=seed
        )
        tokens = torch.where(result.accepted, result.tokens, tokens)
    assert (tokens >= 0).all()
    return tokens


@pytest.mark.parametrize("length", [2, 3])
def test_whole_sequences_have_the_verifiers_law(length: int) -> None:
    table = torch.randn(36, 5, generator=torch.Generator().manual_seed(7)) * 1.5

    def model(prefix: torch.Tensor) -> torch.Tensor:
        index = torch.zeros(len(prefix), dtype=torch.int64)
        for column in prefix[:, -2:].unbind(1):
            index = index * 6 + column + 1
        return table[index]

    every = torch.cartesian_prod(*[torch.arange(5)] * length)
    log_q = torch.zeros(len(every))
    for i in range(length):
        row = model(every[:, :i]).log_softmax(1)
        log_q += row.gather(1, every[:, i : i + 1]).squeeze(1)

    def law(streams: tuple[int, int]) -> float:
        place = torch.zeros(DRAWS, dtype=torch.int64)
        for column in decode(model, streams, length).unbind(1):
            place = place * 5 + column
        return p_value(torch.bincount(place, minlength=5**length), log_q.exp())

    assert law((ACCEPTANCE_STREAM, RESIDUAL_STREAM)) > P_VALUE
    assert law((ACCEPTANCE_STREAM, CANDIDATE_STREAM)) < P_VALUE * 1e-3


@pytest.mark.parametrize("vocab", [5, 4096])
def test_equal_rows_accept_everything(vocab: int) -> None:
    logits = torch.randn(50, 4, vocab, generator=torch.Generator().manual_seed(0))
    logits[..., ::2] = -INF
    drafts = draw(logits, CANDIDATE_STREAM)
    # The largest draw that float32 may be rounded to.
    worst = torch.ones(50, 4)
    no = torch.zeros(50, dtype=torch.bool)
    ones = torch.ones(50)
    result = verify(
        drafts, worst > 0, logits, logits.clone(), no, ones, worst, noise(50, 4, 9)
    )
    assert torch.equal(result.tokens, drafts)
    assert result.num_accepted.tolist() == [4] * 50


@pytest.mark.parametrize("exponent", [0.5, 1.0, 3.0])
def test_exponent_tempers_the_ratio(exponent: float) -> None:
    draft, target = adversary(5)
    p, q = draft[0].softmax(0), target[0].softmax(0)
    rate = float((p * (q / p).pow(exponent).clamp(max=1)).sum())
    logits = [x.expand(DRAWS, 1, 5) for x in (draft, target)]
    drafts = draw(logits[0], CANDIDATE_STREAM)
    result = run(drafts, *logits, exponent=exponent)
    kept = (result.tokens == drafts).double().mean()
    # A residual never proposes the token whose ratio failed.
    assert float(kept) == pytest.approx(rate, abs=4 * math.sqrt(0.25 / DRAWS))


def test_exponents_are_ordered() -> None:
    draft, target = adversary(16, 8)
    logits = [x.expand(500, 8, 16) for x in (draft, target)]
    drafts = draw(logits[0], CANDIDATE_STREAM)
    counts = [
        run(drafts, *logits, exponent=x).num_accepted for x in (0.2, 0.5, 1.0, 2.0)
    ]
    for more, fewer in zip(counts, counts[1:], strict=False):
        assert (more >= fewer).all() and (more > fewer).any()


def test_rejection_at_the_first_position_progresses() -> None:
    drafts = torch.tensor([[2, 3, 4]])
    p = torch.full((1, 3, 5), -INF).scatter_(2, drafts.unsqueeze(2), 0.0)
    q = torch.zeros(1, 3, 5)
    q[0, 0, 2] = -INF
    span = torch.tensor([[False, True, True]])
    for greedy in (False, True):
        result = run(drafts, p, q, greedy=greedy)
        assert result.accepted.tolist() == [[True, False, False]]
        assert result.num_accepted.tolist() == [1]
        assert result.tokens[0, 0] != 2 and result.tokens[0, 1:].tolist() == [3, 4]
        # Left of the span nothing is judged.
        later = run(drafts, p, q, span=span, greedy=greedy)
        assert later.accepted.tolist()[0][:2] == [False, True]
        assert later.tokens[0, 0] == 2


@given(
    st.integers(1, 6),
    st.integers(2, 7),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.2, 0.8]),
)
def test_greedy_is_the_plain_loop(
    block: int, vocab: int, seed: int, agreement: float
) -> None:
    """Whatever the draws, the exponents and the draft's logits."""
    random = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 4, (6, block, vocab), generator=random).float()
    q[torch.rand(q.shape, generator=random) < 0.2] = -INF
    q[..., -1] = 0.5
    best = q.argmax(2)
    other = torch.randint(0, vocab, best.shape, generator=random)
    drafts = torch.where(
        torch.rand(best.shape, generator=random) < agreement, best, other
    )
    masked = torch.rand(best.shape, generator=random) < 0.7
    span = first_span(masked)
    results = [
        run(drafts, torch.full_like(q, x), q, span=span, greedy=True, exponent=e)
        for x, e in ((0.0, 1.0), (NAN, 5.0))
    ]
    for i in range(6):
        tokens, accepted = drafts[i].tolist(), [False] * block
        for j in range(block):
            if span[i, j]:
                values = q[i, j].tolist()
                token, tokens[j] = tokens[j], values.index(max(values))
                accepted[j] = True
                if token != tokens[j]:
                    break
        for result in results:
            assert result.tokens[i].tolist() == tokens
            assert result.accepted[i].tolist() == accepted
            assert int(result.num_accepted[i]) == sum(accepted)


def test_rows_of_a_batch_do_not_meet() -> None:
    draft, target = adversary(16, 6)
    p, q = (x.expand(40, 6, 16) for x in (draft, target))
    drafts = draw(p, CANDIDATE_STREAM)
    greedy = torch.arange(40) % 3 == 0
    exponent = 0.5 + torch.arange(40) % 4
    whole = run(drafts, p, q, greedy=greedy, exponent=exponent)
    for i in (0, 1, 17, 39):
        one = slice(i, i + 1)
        alone = run(
            drafts[one],
            p[one],
            q[one],
            greedy=greedy[one],
            exponent=exponent[one],
            first_seed=i,
        )
        for ours, theirs in zip(alone, whole, strict=True):
            assert torch.equal(ours, theirs[one])


OK = [0.0, 1.0, -INF, 0.5]


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(
    ("p", "q", "allowed"),
    [
        pytest.param([NAN] * 4, OK, {0, 1, 3}, id="draft-is-nan"),
        pytest.param([-INF] * 4, OK, {0, 1, 3}, id="draft-bans-all"),
        pytest.param([0.0, -INF, 0.0, 0.0], OK, {0, 1, 3}, id="draft-bans-its-own"),
        pytest.param([0.0, INF, 0.0, 0.0], OK, {0, 1, 3}, id="draft-has-inf"),
        pytest.param(OK, [-INF, NAN, 0.0, NAN], {2}, id="verifier-has-nan"),
        pytest.param(OK, [0.0, -INF, INF, 9.0], {2}, id="verifier-has-inf"),
        pytest.param(OK, [-INF, -INF, -INF, 0.0], {3}, id="one-token"),
        pytest.param(OK, [-INF] * 4, {1}, id="verifier-bans-all"),
        pytest.param(OK, [NAN] * 4, {1}, id="verifier-is-nan"),
        pytest.param([NAN] * 4, [NAN] * 4, {1}, id="both-are-nan"),
    ],
)
def test_degenerate_rows_give_an_allowed_token(
    p: list[float], q: list[float], allowed: set[int], greedy: bool
) -> None:
    drafts = torch.full((200, 1), 1)
    logits = [torch.tensor([x]).expand(200, 1, 4) for x in (p, q)]
    result = run(drafts, *logits, greedy=greedy)
    assert result.accepted.all()
    assert set(result.tokens.flatten().tolist()) <= allowed


@pytest.mark.parametrize(
    ("p", "q"),
    [
        pytest.param([NAN] * 4, OK, id="draft-is-nan"),
        pytest.param([-INF] * 4, OK, id="draft-bans-all"),
        pytest.param([2.0, 0.0, -INF, 0.0], [0.0, 1.0, 0.3, 0.5], id="bans-its-own"),
        pytest.param([2.0, 0.0, 1.0, 0.0], [0.0, 1.0, NAN, 0.5], id="verifier-has-nan"),
    ],
)
def test_without_a_ratio_the_verifier_is_sampled(
    p: list[float], q: list[float]
) -> None:
    """The draft may be anything: what is emitted has the law all the same."""
    drafts = torch.full((DRAWS, 1), 2)
    result = run(drafts, *(torch.tensor([x]).expand(DRAWS, 1, 4) for x in (p, q)))
    counts = torch.bincount(result.tokens[:, 0], minlength=4)
    law = torch.tensor(q).nan_to_num(-INF, neginf=-INF).softmax(0)
    assert p_value(counts, law) > P_VALUE


def test_residual_without_mass_and_draw_of_one() -> None:
    """Rounding takes the residual's mass here, and the last draw to 1."""
    p, q = torch.tensor([[[0.0, 50.0]]]), torch.tensor([[[-INF, 0.0]]])
    yes = torch.ones(1, 1)
    for draft_logits in (p, torch.zeros(1, 1, 2)):
        result = verify(
            torch.zeros(1, 1, dtype=torch.int64),
            yes > 0,
            draft_logits,
            q,
            yes[0] < 0,
            yes[0],
            yes,
            yes,
        )
        assert result.tokens.tolist() == [[1]]


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_first_span_is_the_first_run(masked: list[bool]) -> None:
    expected = [False] * len(masked)
    for i, flag in enumerate(masked):
        if flag:
            expected[i] = True
        elif any(expected):
            break
    assert first_span(torch.tensor([masked])).tolist() == [expected]


def test_nothing_to_verify() -> None:
    logits = torch.randn(2, 3, 5)
    drafts = torch.tensor([[0, 1, 2], [3, 4, 0]])
    result = run(drafts, logits, logits, span=torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(result.tokens, drafts) and not result.accepted.any()
    assert run(drafts[:0], logits[:0], logits[:0]).num_accepted.shape == (0,)
