# SPDX-License-Identifier: Apache-2.0
"""The filter of the strategy `learned`: the shipped file and how it is trained."""

import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_unmask.decoding.learned import accept_learned, load_filter

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo_model"
BLOCK, MASK, STOP, VOCABULARY = 8, 9, 1, 12


@pytest.fixture(scope="module")
def training() -> Any:
    path = list(sys.path)
    sys.path.insert(0, str(DEMO))
    yield importlib.import_module("train_filter")
    sys.path[:] = path


class Scripted:
    """A model whose logits depend on the position, and on how much is masked.

    Position p says p % 5 + 2, the surer the smaller p % 8 is, from when at most as
    many positions of its block are masked as its entry says, and 7 before.
    """

    def __init__(self, changes: dict[int, int]) -> None:
        self.changes = changes

    def __call__(self, tokens, positions, masks, rows):
        inside = tokens[rows].view(len(tokens), BLOCK)
        masked = (inside == MASK).sum(1, keepdim=True).expand(-1, BLOCK)
        place = positions[rows].view(len(tokens), BLOCK)
        said = place % 5 + 2
        for position, count in self.changes.items():
            early = (place == position) & (masked > count)
            said = torch.where(early, 7, said)
        logits = torch.zeros(*place.shape, VOCABULARY)
        logits.scatter_(2, said.unsqueeze(2), 9.0 - (place % BLOCK).unsqueeze(2))
        logits[..., MASK] = 50.0
        return logits.flatten(0, 1)


def test_recorded_steps_of_careful_decoding(training):
    """Position 13 changes its mind when 4 of its block are masked, 15 when 1 is."""
    prompt = [0] * 10
    recorder = training.Recorder(Scripted({13: 4, 15: 1}), MASK)
    training.decode_blocks(recorder, [prompt], MASK, STOP, new_tokens=6)
    traces = recorder.traces()
    # Positions 10 to 15 are revealed from left to right, one a step.
    steps, place = torch.arange(6).unsqueeze(1), torch.arange(8, 16)
    masked = place >= 10 + steps
    assert torch.equal(traces.masked, masked)
    final = torch.ones(6, 8, dtype=torch.bool)
    final[:2, 13 - 8] = final[:5, 15 - 8] = False
    assert torch.equal(traces.final[masked], final[masked])
    best = torch.exp(9.0 - (place - 8.0))
    sure = best / (best + VOCABULARY - 2)
    assert torch.allclose(traces.confidence, sure.expand(6, 8))


def test_every_prompt_and_block_counts(training):
    """Prompts that begin alike, a whole block and a part of one."""
    prompts = [[0] * 5, [0] * 8, [0] * 21]
    traces = training.collect(Scripted({13: 2}), prompts, MASK, STOP)
    # 96 new tokens end on the grid, so 101 are 104; one step for each mask.
    masks = [104 - 5, 104 - 8, 120 - 21]
    assert len(traces.masked) == sum(masks)
    starts = [0, masks[0], masks[0] + masks[1]]
    assert traces.masked[starts].sum(1).tolist() == [3, 8, 3]
    assert bool(traces.masked.any(1).all())


def test_a_rule_is_learnt(training):
    """Final is what is surer than a half, but for position 3 the reverse."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(4000, BLOCK, generator=generator)
    masked = torch.rand(4000, BLOCK, generator=generator) < 0.5
    final = confidence > 0.5
    final[:, 3] = ~final[:, 3]
    # Labels of revealed positions must not matter.
    traces = training.Traces(confidence, masked, final ^ ~masked)
    filter, again = (
        training.filter_of(training.fit(traces, hidden=32, epochs=9, seed=0, batch=32))
        for _ in range(2)
    )
    precision, recall = training.precision_and_recall(filter, traces, 0.5)
    assert precision > 0.9 and recall > 0.9
    assert all(map(torch.equal, filter, again))


def test_precision_and_recall(training):
    # The first position is accepted always, the second one never.
    filter = training.Filter(
        torch.zeros(1, 2), torch.zeros(1), torch.zeros(2, 1), torch.tensor([5.0, -5.0])
    )
    masked = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]]).bool()
    final = torch.tensor([[1, 1], [0, 1], [1, 0], [1, 1]]).bool()
    traces = training.Traces(torch.rand(4, 2), masked, final)
    assert training.precision_and_recall(filter, traces, 0.9) == (2 / 3, 2 / 4)


def test_the_shipped_filter_is_usable():
    filter = load_filter(DEMO / "sdar" / "unmask" / "filter.safetensors", BLOCK)
    sure, unsure = torch.full((1, BLOCK), 0.999), torch.full((1, BLOCK), 0.05)
    masked, threshold = torch.ones(1, BLOCK).bool(), torch.tensor([0.96])
    assert bool(accept_learned(sure, masked, filter, threshold).all())
    assert not bool(accept_learned(unsure, masked, filter, threshold).any())


def test_the_command(tmp_path):
    out = tmp_path / "unmask" / "filter.safetensors"
    command = [sys.executable, str(DEMO / "train_filter.py"), str(DEMO / "sdar")]
    options = ["--examples", "3", "--epochs", "2", "--out", str(out)]
    run = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert load_filter(out, BLOCK).bias_in.shape == (32,)
    said = run.stderr.splitlines()
    loss = next(line for line in said if line.startswith("loss: "))
    values = [float(part.split()[-1]) for part in loss.split(",")]
    assert all(math.isfinite(value) and value > 0 for value in values)
    assert any(line.startswith("validation at 0.96: precision ") for line in said)
