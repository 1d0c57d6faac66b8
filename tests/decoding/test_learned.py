# SPDX-License-Identifier: Apache-2.0
"""The learned filter: its file and its rule."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_cases import CONFIDENCE, Batch, Row, check
from safetensors.torch import save_file

from vllm_unmask.decoding.learned import (
    Filter,
    accept_learned,
    load_filter,
    save_filter,
)

LENGTH = 4


def random_filter(length: int, hidden: int, seed: int = 0) -> Filter:
    """Small eighths, with which nothing rounds before the sigmoid."""
    generator = torch.Generator().manual_seed(seed)

    def eighths(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator) / 8

    return Filter(
        eighths(hidden, length),
        eighths(hidden),
        eighths(length, hidden),
        eighths(length),
    )


@given(st.data(), st.integers(1, 5), st.integers(0, 99))
def test_accept_learned(data: st.DataObject, hidden: int, seed: int) -> None:
    batch = Batch(data)
    network = random_filter(batch.length, hidden, seed)
    layers = Filter(*(field.tolist() for field in network))

    def rule(confidence: Row, masked: Row, threshold: float) -> list[bool]:
        def layer(weights: list[Row], biases: Row, x: Row) -> Row:
            return [
                sum(w * v for w, v in zip(row, x, strict=True)) + bias
                for row, bias in zip(weights, biases, strict=True)
            ]

        inner = layer(layers.weight_in, layers.bias_in, confidence)
        logits = layer(layers.weight_out, layers.bias_out, [max(x, 0) for x in inner])
        return [
            m and 1 / (1 + math.exp(-x)) > threshold
            for m, x in zip(masked, logits, strict=True)
        ]

    def learned(c: torch.Tensor, m: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        there = Filter(*(field.to(c.device) for field in network))
        return accept_learned(c, m, there, t)

    threshold = batch.each(st.sampled_from([-1.0, 0.3, 0.5, 0.6, 0.96, 1.0]))
    check(learned, rule, batch.table(CONFIDENCE), batch.masked(), threshold)


def test_revealed_positions_are_read() -> None:
    """The filter judges the block as a whole."""
    network = Filter(
        torch.eye(2), torch.zeros(2), torch.tensor([[0.0, 9.0]] * 2), torch.zeros(2)
    )
    masked = torch.tensor([[True, False]] * 2)
    confidence = torch.tensor([[0.5, 0.0], [0.5, 1.0]])
    accepted = accept_learned(confidence, masked, network, torch.full((2,), 0.9))
    assert accepted.tolist() == [[False, False], [True, False]]


def test_the_threshold_itself_is_not_enough() -> None:
    """A filter of zeros says a half for every position."""
    network = Filter(*(torch.zeros_like(field) for field in random_filter(2, 3)))
    masked = torch.ones(2, 2, dtype=torch.bool)
    threshold = torch.tensor([0.5, 0.499])
    accepted = accept_learned(torch.ones(2, 2), masked, network, threshold)
    assert accepted.tolist() == [[False, False], [True, True]]


def test_a_filter_survives_its_file(tmp_path: Path) -> None:
    network = random_filter(LENGTH, 7)
    # Transposed weights are not contiguous, which the format does not allow.
    network = network._replace(weight_out=torch.rand(7, LENGTH).T)
    save_filter(tmp_path / "filter.safetensors", network)
    loaded = load_filter(str(tmp_path / "filter.safetensors"), LENGTH)
    for field, old in zip(loaded, network, strict=True):
        assert torch.equal(field, old)


def test_another_float_type_is_read_as_float32(tmp_path: Path) -> None:
    network = random_filter(LENGTH, 3)
    save_filter(tmp_path / "half", Filter(*(field.half() for field in network)))
    loaded = load_filter(tmp_path / "half", LENGTH)
    assert {field.dtype for field in loaded} == {torch.float32}
    assert torch.equal(loaded.bias_out, network.bias_out)


Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t.pop("bias_in"), "no tensor bias_in", id="missing"),
        pytest.param(
            lambda t: t.update(weight_in=torch.zeros(3, LENGTH + 1)),
            r"weight_in has shape \(3, 5\), expected \(3, 4\) for blocks of 4",
            id="another-block",
        ),
        pytest.param(
            lambda t: t.update(weight_out=torch.zeros(3, LENGTH)),
            r"weight_out has shape \(3, 4\), expected \(4, 3\)",
            id="transposed",
        ),
        pytest.param(
            lambda t: t.update(bias_out=torch.tensor([0.0, math.nan, 0.0, 0.0])),
            "bias_out is not finite",
            id="nan",
        ),
        pytest.param(
            lambda t: t.update(weight_in=torch.full((3, LENGTH), math.inf)),
            "weight_in is not finite",
            id="infinite",
        ),
    ],
)
def test_a_wrong_filter_is_refused(
    tmp_path: Path, change: Callable[[Tensors], object], message: str
) -> None:
    tensors = random_filter(LENGTH, 3)._asdict()
    change(tensors)
    path = tmp_path / "wrong.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message) as refusal:
        load_filter(path, LENGTH)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("content", [None, b"", b"not a filter", "folder"])
def test_an_unreadable_file_is_refused(
    tmp_path: Path, content: bytes | str | None
) -> None:
    path = tmp_path / "filter.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(ValueError, match="cannot be read") as refusal:
        load_filter(path, LENGTH)
    assert str(path) in str(refusal.value)
