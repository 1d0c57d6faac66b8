# SPDX-License-Identifier: Apache-2.0
"""Row statistics against their definition, the law of the sample, and its neighbours.

Run as a script under TRITON_INTERPRET=1, this file tests the Triton kernels.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_compilation import interpret

from vllm_unmask.kernels.row_statistics import (
    NO_CONSTRAINTS,
    Constraints,
    RowStatistics,
    Sampling,
    reference,
    row_statistics,
)

NAN, INF = math.nan, math.inf
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
P_VALUE = 1e-4

Run = Callable[..., Any]


class Case(NamedTuple):
    logits: torch.Tensor
    sampling: Sampling | None
    constraints: Constraints


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of what no result may be."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(NAN if tensor.is_floating_point() else -77)

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: poison(empty(*a, **k))),
        mock.patch.object(
            torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))
        ),
    ):
        yield


def padded(logits: torch.Tensor, padding: int) -> torch.Tensor:
    """The same rows, each followed by poison."""
    wide = torch.full((len(logits), logits.shape[1] + padding), INF, dtype=logits.dtype)
    wide[:, : logits.shape[1]] = logits
    return wide[:, : logits.shape[1]]


def random_logits(
    rows: int, vocab: int, dtype: torch.dtype, seed: int, kind: str
) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=random) * 3
    if kind == "ties":
        # Sums of equal powers of two are exact, whatever their order.
        logits = logits.round()
    elif kind == "few":
        # Every border lies among equals, of which some are zeros of either sign.
        logits = torch.tensor([-0.0, 0.0, 1.0])[logits.abs().long() % 3]
    elif kind == "far":
        logits *= 100
    elif kind == "broken":
        for value in (NAN, -INF, INF, -0.0):
            share = 0.003 if value == INF else 0.3
            logits[torch.rand(logits.shape, generator=random) < share] = value
        logits[:1] = -INF
        logits[1:2] = NAN
    return logits.to(dtype)


def random_sampling(rows: int, vocab: int, seed: int, truncated: bool) -> Sampling:
    random = torch.Generator().manual_seed(seed + 1)

    def choose(values: list[float]) -> torch.Tensor:
        index = torch.randint(0, len(values), (rows,), generator=random)
        return torch.tensor(values)[index]

    temperature = choose([0.0, 0.25, 0.7, 1.0, 3.0])
    draws = torch.rand(rows, dtype=torch.float64, generator=random)
    plain = choose([0, 1]) > 0
    if not truncated:
        return Sampling(temperature, draws, plain=plain)
    return Sampling(
        temperature,
        draws,
        choose([1, 3, vocab // 2 + 1, vocab, vocab, vocab + 7]).long(),
        choose([1.0, 1.0, 0.837, 0.41, 1e-7, 0.0]),
        choose([0.0, 0.0, 0.0, 0.013, 1.0]),
        plain,
    )


def random_constraints(rows: int, vocab: int, seed: int) -> Constraints:
    random = torch.Generator().manual_seed(seed + 2)

    def bits(number: int, density: float) -> torch.Tensor:
        words = -(-vocab // 32) + 1
        legal = torch.rand(number, words, 32, generator=random) < density
        legal[:, ::3] = True
        legal[:, 1::3] = False
        return (legal.long() << torch.arange(32)).sum(2).to(torch.int32)

    counts = torch.randint(0, min(vocab, 5) + 1, (rows,), generator=random)
    tokens = [torch.randperm(vocab, generator=random)[:n] for n in counts.tolist()]
    number = int(counts.sum())
    return Constraints(
        mask_id=int(torch.randint(-1, vocab, (), generator=random)),
        static_mask=bits(1, 0.95)[0] | 0b1011 if seed % 3 else None,
        bitmasks=bits(3, 0.4),
        bitmask_rows=torch.randint(-1, 3, (rows,), generator=random),
        bias_starts=torch.cat((torch.zeros(1).long(), counts.cumsum(0))),
        bias_tokens=torch.cat([*tokens, torch.zeros(0).long()]),
        bias_values=torch.randint(-4, 5, (number,), generator=random).float(),
    )


def make_case(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    seed: int,
    kind: str = "plain",
    sampled: bool = True,
    truncated: bool = True,
    constrained: bool = True,
) -> Case:
    return Case(
        padded(random_logits(rows, vocab, dtype, seed, kind), seed % 3 * 8),
        random_sampling(rows, vocab, seed, truncated) if sampled else None,
        random_constraints(rows, vocab, seed) if constrained else NO_CONSTRAINTS,
    )


def check(case: Case, run: Run = row_statistics) -> RowStatistics:
    """Compare with the definition, from poisoned outputs; return the result."""
    logits = case.logits.clone()
    expected = RowStatistics(*reference.row_statistics(*case))
    error = promised(case)
    with poisoned():
        found = RowStatistics(*run(*case))
    assert torch.equal(logits.nan_to_num(3.0), case.logits.nan_to_num(3.0))
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        if name not in ("candidates", "confidence"):
            size = {"gap": 1.0, "entropy": math.log(case.logits.shape[1] + 1)}
            torch.testing.assert_close(
                ours,
                theirs,
                rtol=error,
                atol=error * size.get(name, 1e-20),
                msg=lambda text, name=name: f"{name}: {text}",
            )
    check_candidates(case, found, expected, error)
    return found


def promised(case: Case) -> float:
    """The error that `row_statistics` states, at most, of the rows."""
    logits = case.logits.float().nan_to_num(0.0, 0.0, 0.0).abs()
    heat = torch.ones(1)
    if case.sampling is not None:
        heat = case.sampling.temperature
        heat = torch.where(heat > 0, heat, 1.0)
    quotient = logits.max() / heat.min() if len(logits) else 0.0
    return 1e-5 + 2.0**-23 * float(quotient)


def check_candidates(
    case: Case, found: RowStatistics, expected: RowStatistics, error: float
) -> None:
    """A candidate is where the draw is, to the precision that is promised."""
    logits = reference.constrain(case.logits, case.constraints)
    law = logits
    if case.sampling is not None:
        plain = case.sampling.temperature == 0
        if case.sampling.plain is not None:
            plain = plain | case.sampling.plain
        drawn_from = reference.transform(logits, case.sampling)
        law = torch.where(plain.unsqueeze(1), logits, drawn_from)
    known = expected.log_sum_exp.isfinite()
    chances = law.double().softmax(1).gather(1, found.candidates.unsqueeze(1))
    chances = torch.where(known, chances.squeeze(1), 0.0)
    torch.testing.assert_close(
        found.confidence.double(), chances, rtol=error, atol=1e-20
    )
    if case.sampling is None:
        assert torch.equal(found.candidates, expected.tokens)
        return
    probs = drawn_from.double().softmax(1)
    cdf = probs.cumsum(1)
    for i, token in enumerate(found.candidates.tolist()):
        if case.sampling.temperature[i] == 0 or not known[i]:
            assert token == expected.tokens[i]
            continue
        assert probs[i, token] > 0
        draw = float(case.sampling.draws[i])
        assert float(cdf[i, token] - probs[i, token]) - error <= draw
        assert draw <= float(cdf[i, token]) + error


@given(
    rows=st.integers(0, 5),
    vocab=st.sampled_from([1, 2, 31, 33, 97, 500, 2047, 2048, 2049, 4097, 9001]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["plain", "ties", "few", "far", "broken"]),
    sampled=st.booleans(),
    truncated=st.booleans(),
    constrained=st.booleans(),
)
@settings(max_examples=300)
def test_kernel_is_its_definition(**case: Any) -> None:
    check(make_case(**case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition_is_the_plain_loop(dtype: torch.dtype) -> None:
    case = make_case(12, 40, dtype, 5, "ties")
    found = RowStatistics(*reference.row_statistics(*case))
    logits, sampling, limits = case
    assert sampling is not None and sampling.top_k is not None
    assert sampling.top_p is not None and sampling.min_p is not None
    assert sampling.plain is not None
    assert limits.bitmasks is not None and limits.bitmask_rows is not None
    assert limits.bias_starts is not None and limits.static_mask is not None
    for i in range(12):
        x = logits[i].double().tolist()
        bounds = range(int(limits.bias_starts[i]), int(limits.bias_starts[i + 1]))
        for k in bounds:
            x[int(limits.bias_tokens[k])] += float(limits.bias_values[k])
        masks = [limits.static_mask]
        if limits.bitmask_rows[i] >= 0:
            masks.append(limits.bitmasks[limits.bitmask_rows[i]])
        for t in range(40):
            legal = all(int(mask[t // 32]) >> t % 32 & 1 for mask in masks)
            if not legal or t == limits.mask_id:
                x[t] = -INF
        token = x.index(max(x))
        heat = float(sampling.temperature[i])
        drawn = list(x)
        if heat > 0:
            drawn = [v / heat for v in x]
            floor = max(drawn) + math.log(float(sampling.min_p[i]) or 1e-300)
            order = [t for t in range(40) if drawn[t] >= floor - 1e-6]
            order.sort(key=lambda t: (-drawn[t], t))
            order = order[: int(sampling.top_k[i])]
            mass = [math.exp(drawn[t] - max(drawn)) for t in order]
            top_p = float(sampling.top_p[i])
            left = {
                t
                for n, t in enumerate(order)
                if n == 0 or top_p == 1 or sum(mass[:n]) < top_p * sum(mass)
            }
            drawn = [v if t in left else -INF for t, v in enumerate(drawn)]
        law = x if heat == 0 or sampling.plain[i] else drawn
        weights = [math.exp(v - max(law)) for v in law]
        probs = [w / sum(weights) for w in weights]
        first, second = sorted(law, reverse=True)[:2]
        assert int(found.tokens[i]) == token
        values = (
            max(probs),
            sorted(probs)[-2],
            first - second,
            -sum(p * math.log(p) for p in probs if p > 0),
            max(law) + math.log(sum(weights)),
        )
        for ours, theirs in zip(found[1:6], values, strict=True):
            assert float(ours[i]) == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        candidate = token
        if heat > 0:
            mass = [math.exp(v - max(drawn)) for v in drawn]
            target, candidate = float(sampling.draws[i]) * sum(mass), 0
            while sum(mass[: candidate + 1]) <= target:
                candidate += 1
        assert int(found.candidates[i]) == candidate
        assert float(found.confidence[i]) == pytest.approx(probs[candidate], rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_of_a_half_type_is_widened_exactly(dtype: torch.dtype) -> None:
    """One logit a row, and in float32 what bit patterns those have."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = (
        bits.view(dtype) if dtype.itemsize == 2 else bits.int().mul(65521).view(dtype)
    )
    rows = values.unsqueeze(1)
    found = row_statistics(rows)
    expected = rows.float().nan_to_num(-INF, INF, -INF).squeeze(1)
    assert torch.equal(found.log_sum_exp, expected)


def test_weights_are_powers_of_two() -> None:
    from vllm_unmask.kernels.row_statistics.cpu_chunks import weight

    powers = torch.linspace(-125.9, 0, 200_001)
    ours = torch.tensor([weight(p) for p in powers.tolist()], dtype=torch.float64)
    error = (ours / powers.double().exp2() - 1).abs()
    assert float(error.max()) < 2.5e-7
    assert weight(0.0) == 1.0
    assert weight(-126.5) == weight(-INF) == 0.0


def take(case: Case, row: int) -> Case:
    """One row of a batch."""
    sampling, limits = case.sampling, case.constraints
    assert sampling is not None and limits.bias_starts is not None
    assert limits.bias_tokens is not None and limits.bias_values is not None
    one = slice(row, row + 1)
    biases = slice(int(limits.bias_starts[row]), int(limits.bias_starts[row + 1]))
    return Case(
        case.logits[one],
        Sampling(*(None if x is None else x[one] for x in sampling)),
        limits._replace(
            bitmask_rows=limits.bitmask_rows[one],
            bias_starts=torch.tensor([0, biases.stop - biases.start]),
            bias_tokens=limits.bias_tokens[biases],
            bias_values=limits.bias_values[biases],
        ),
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_do_not_meet(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_unmask.kernels.row_statistics import cpu

    monkeypatch.setattr(cpu, "_GRAIN", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    case = make_case(9, 9001, torch.bfloat16, 1)
    whole = check(case)
    for row in range(9):
        alone = row_statistics(*take(case, row))
        for ours, theirs in zip(alone, whole, strict=True):
            assert torch.equal(ours, theirs[row : row + 1])


def p_value(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    """Chi-square of tokens under probabilities; bins that expect under 5 are one."""
    observed = torch.bincount(tokens, minlength=len(probs)).double()
    expected = probs.double() * len(tokens)
    rare = expected < 5
    e = torch.cat((expected[~rare], expected[rare].sum().reshape(1)))
    o = torch.cat((observed[~rare], observed[rare].sum().reshape(1)))
    assert not bool(o[e == 0].any()), "a token of probability 0"
    e, o = e[e > 0], o[e > 0]
    half = torch.tensor((len(e) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, ((o - e) ** 2 / e).sum() / 2))


@pytest.mark.parametrize("vocab", [16, 5000])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="temperature"),
        pytest.param({"top_k": 7, "plain": True}, id="top_k"),
        pytest.param({"top_p": 0.8}, id="top_p"),
        pytest.param({"min_p": 0.1, "top_k": 9, "top_p": 0.9}, id="all"),
    ],
)
def test_law_of_the_sample(vocab: int, options: dict[str, Any]) -> None:
    number = 40_000 if vocab < 1000 else 8_000
    types = {"top_k": torch.int64, "plain": torch.bool}
    row = random_logits(1, vocab, torch.bfloat16, 3, "plain") / 2
    row[0, 3] = -INF
    random = torch.Generator().manual_seed(11)
    draws = torch.rand(number, dtype=torch.float64, generator=random)
    sampling = Sampling(
        torch.full((number,), 1.3),
        draws,
        **{k: torch.full((number,), v, dtype=types.get(k)) for k, v in options.items()},
    )
    first = Sampling(*(None if x is None else x[:1] for x in sampling))
    law = reference.transform(row.float(), first)[0].softmax(0)
    logits = row.expand(number, -1)
    # Neighbours together too: of a wide vocabulary most tokens are rare.
    part = -(-vocab // 16)
    coarse = torch.zeros(16).index_add_(0, torch.arange(vocab) // part, law)
    tokens = row_statistics(logits, sampling).candidates
    assert p_value(tokens, law) > P_VALUE
    assert p_value(tokens // part, coarse) > P_VALUE
    for wrong in (draws**1.15, draws * 0.93):
        biased = row_statistics(logits, sampling._replace(draws=wrong)).candidates
        assert p_value(biased // part, coarse) < P_VALUE * 1e-3


def test_samples_are_those_of_the_decoding() -> None:
    """A seeded output stays what it was."""
    from vllm_unmask.decoding import sampling as before

    rows, vocab = 500, 5000
    logits = random_logits(rows, vocab, torch.bfloat16, 0, "plain")
    numbers = torch.arange(rows)
    draws = before.uniform(numbers, numbers % 32, numbers % 7, before.CANDIDATE_STREAM)
    options = random_sampling(rows, vocab, 0, True)._replace(draws=draws)
    law = before.transform(
        logits.float(), options.temperature, *options[2:5], truncated=True
    )
    expected = before.sample(law.softmax(1), draws)
    expected = torch.where(options.temperature == 0, logits.float().argmax(1), expected)
    assert torch.equal(row_statistics(logits, options).candidates, expected)


def test_statistics_are_those_of_the_decoding() -> None:
    from vllm_unmask.decoding import statistics as before

    for kind in ("plain", "ties", "broken"):
        logits = random_logits(20, 5000, torch.bfloat16, 1, kind)
        expected = before.row_statistics(logits.float())
        found = row_statistics(logits)
        assert torch.equal(found.tokens, expected.tokens)
        for name in ("probability", "gap", "entropy"):
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5
            )


def test_last_draw_and_first() -> None:
    """Neither ever takes a token of probability 0."""
    logits = torch.full((4, 9000), -INF)
    logits[:, 4100:4103] = torch.tensor([0.0, -INF, 1.0])
    draws = torch.tensor([0.0, 1 - 2.0**-53, 0.0, 1 - 2.0**-53], dtype=torch.float64)
    sampling = Sampling(torch.ones(4), draws, torch.tensor([9000, 9000, 5, 5]))
    candidates = row_statistics(logits, sampling).candidates
    assert candidates.tolist() == [4100, 4102, 4100, 4102]


def test_draw_on_a_border_takes_the_later_token() -> None:
    """As `sample` does; the border may be one between chunks."""
    logits = torch.full((2, 9000), -INF)
    logits[:, 70] = logits[:, 8000] = 2.0
    draws = torch.tensor([0.5 - 2.0**-53, 0.5], dtype=torch.float64)
    found = row_statistics(logits, Sampling(torch.ones(2), draws))
    assert found.candidates.tolist() == [70, 8000]


def test_options_share_one_border(run: Run = row_statistics) -> None:
    """All logits are equal: what top-k or top-p leaves of min-p are the first."""
    sampling = Sampling(
        torch.ones(2),
        torch.full((2,), 0.999, dtype=torch.float64),
        torch.tensor([3, 70]),
        torch.tensor([1.0, 0.095]),
        torch.ones(2),
    )
    found = check(Case(torch.zeros(2, 70), sampling, NO_CONSTRAINTS), run)
    assert found.candidates.tolist() == [2, 6]
    assert found.probability.tolist() == pytest.approx([1 / 3, 1 / 7])


def test_rows_without_a_law() -> None:
    logits = torch.tensor([[-INF] * 3, [NAN] * 3, [0.0, INF, INF], [NAN, 2.0, -INF]])
    for sampling in (None, Sampling(torch.ones(4), torch.full((4,), 0.9).double())):
        found = row_statistics(logits, sampling)
        assert found.tokens.tolist() == found.candidates.tolist() == [0, 0, 1, 1]
        assert found.probability.tolist() == found.confidence.tolist() == [0, 0, 0, 1]
        assert found.second.tolist() == [0, 0, 0, 0]
        assert found.gap.tolist() == [0, 0, 0, INF]
        assert found.entropy.tolist() == pytest.approx([math.log(3)] * 3 + [0.0])
        assert found.log_sum_exp.tolist() == [-INF, -INF, INF, 2.0]


def test_misfits_are_refused() -> None:
    logits = torch.zeros(2, 40)
    draws = torch.zeros(2).double()
    words = torch.zeros(1, 2, dtype=torch.int32)
    for arguments, message in (
        ((logits.double(),), "logits are torch.float64"),
        ((torch.zeros(40, 2).t(),), r"strides \(1, 2\)"),
        ((logits, Sampling(torch.ones(3), draws)), r"temperature is \(3,\)"),
        (
            (logits, Sampling(torch.ones(2), draws, torch.ones(1).long())),
            r"top_k is \(1,\), expected \(2,\)",
        ),
        (
            (logits, None, Constraints(static_mask=words[0, :1])),
            r"static_mask is torch.int32 \(1,\), expected int32 words for 40",
        ),
        (
            (logits, None, Constraints(bitmasks=words.long(), bitmask_rows=draws)),
            "bitmasks is torch.int64",
        ),
        ((logits, None, Constraints(bitmasks=words)), "need each other"),
        (
            (logits, None, Constraints(bitmasks=words, bitmask_rows=draws[:1])),
            r"bitmask_rows is \(1,\)",
        ),
        (
            (logits, None, Constraints(bias_starts=torch.zeros(2).long())),
            r"bias_starts is \(2,\), expected \(3,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            row_statistics(*arguments)


@pytest.mark.slow
def test_triton_in_the_interpreter() -> None:
    interpret(__file__)


def interpret_triton() -> None:
    import numpy as np

    from vllm_unmask.kernels.row_statistics import triton

    # Small tiles, so that a small vocabulary has many.
    triton.TILE = 32
    # What is thrown away, of rows without a law, may be NaN.
    np.seterr(invalid="ignore")
    kinds = ("plain", "few", "ties", "far", "broken")
    for seed in range(15):
        case = make_case(
            4,
            (1, 33, 97, 64)[seed % 4],
            DTYPES[seed % 3],
            seed,
            kinds[seed % 5],
            sampled=seed % 7 > 0,
            truncated=seed % 2 > 0,
        )
        check(case, triton.row_statistics)
    check(make_case(0, 33, torch.float32, 0), triton.row_statistics)
    for seed in range(10):
        logits, sampling, _ = make_case(5, 70, DTYPES[seed % 3], seed, kinds[seed % 2])
        assert sampling is not None
        warm = sampling._replace(temperature=sampling.temperature.clamp(min=0.7))
        if seed < 6:
            warm = Sampling(*warm[:2], plain=warm.plain)
        check(Case(logits, warm, NO_CONSTRAINTS), triton.row_statistics)
    test_options_share_one_border(triton.row_statistics)
    # One token is left, of which no other tile knows.
    one = torch.ones(3, dtype=torch.int64)
    lone = Sampling(torch.ones(3), torch.rand(3).double(), top_k=one)
    found = check(Case(logits[:3], lone, NO_CONSTRAINTS), triton.row_statistics)
    assert found.second.tolist() == [0.0] * 3


if __name__ == "__main__":
    interpret_triton()
