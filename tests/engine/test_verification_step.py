# SPDX-License-Identifier: Apache-2.0
"""Steps of requests that verify, on logits of the test's own."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

# On CPU, vLLM's worker replaces what the runner's modules import by name.
import vllm.v1.worker.cpu.shm  # noqa: F401

from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.engine.rows import DenoisingRows
from vllm_unmask.engine.speculation import Drafts
from vllm_unmask.engine.states import BlockGeometry
from vllm_unmask.engine.verification import Verifier
from vllm_unmask.engine.verification_step import (
    Choice,
    Decided,
    Drafted,
    VerificationStep,
)
from vllm_unmask.options import DecodingOptions

CPU = torch.device("cpu")
GEOMETRY = BlockGeometry(4, 9)
VOCAB = 10
SLOT = 2
NUM_WINDOWS = 2  # of a draft and the masks that verify it


ONE, FOUR = torch.zeros(1, dtype=torch.int64), torch.full((1,), 4)
# The one request that denoises.
ROWS = DenoisingRows(
    np.array([0]), np.array([SLOT]), torch.tensor([SLOT]), FOUR, FOUR, ONE, None, None
)


def stepper(**options: Any) -> SimpleNamespace:
    asked = DecodingOptions(strategy="threshold+edit+s2d2", **options)
    verifier = Verifier(4, GEOMETRY, VOCAB, CPU, adaptive=False)
    verifier.add_request(SLOT, "a", asked)
    drafts = Drafts(4, GEOMETRY, 1 + NUM_WINDOWS, NUM_WINDOWS, 64, CPU)
    drafts.add_request(SLOT, asked)
    parameters = {
        "temperature": torch.zeros(4),
        "top_k": torch.full((4,), VOCAB),
        "top_p": torch.ones(4),
        "min_p": torch.zeros(4),
        "seeds": torch.zeros(4, dtype=torch.int64),
    }
    return SimpleNamespace(
        geometry=GEOMETRY,
        verifier=verifier,
        drafts=drafts,
        canvas=SimpleNamespace(step=torch.zeros(4, dtype=torch.int64)),
        biases=SimpleNamespace(apply=lambda logits, *_: (logits, None)),
        grammars=SimpleNamespace(members=lambda slots: []),
        sampling_states=SimpleNamespace(
            **{name: SimpleNamespace(gpu=value) for name, value in parameters.items()}
        ),
    )


def wanting(tokens: list[int]) -> torch.Tensor:
    """Logits [block, vocab] with these as the most likely tokens."""
    logits = torch.zeros(len(tokens), VOCAB)
    logits[torch.arange(len(tokens)), torch.tensor(tokens)] = 3.0
    return logits


def decide(
    of: SimpleNamespace, before: list[int], verified: list[int] | None = None
) -> Decided:
    """A step on ``[1, 2, mask, mask]``, of which the model thinks 5, 6, 7, 8.

    Args:
        before: the block as the strategy has edited it.
        verified: what the other mode thinks, if this forward verifies.
    """
    active = torch.tensor([[1, 2, 9, 9]])
    held = of.drafts.candidates
    drafted = Drafted(
        np.array([0]),
        held.count[[SLOT]] == NUM_WINDOWS,
        held.ids[[SLOT], 0],
        None if verified is None else wanting(verified),
    )
    tokens, half = torch.tensor([[5, 6, 7, 8]]), torch.full((1, 4), 0.5)
    accepted = torch.tensor([[False, False, False, True]])
    choice = Choice(torch.tensor([before]), Scores(tokens, half, half), accepted)
    step: Any = VerificationStep(of, drafted, ROWS, False)  # type: ignore[arg-type]
    return step.decide(active, active == 9, wanting([5, 6, 7, 8]), choice)


def test_an_edit_belongs_to_the_draft() -> None:
    """It is verified with it, and written with what was verified."""
    of = stepper(route="always")
    first = decide(of, [5, 2, 9, 9])
    assert first.wait.all()
    assert first.choice.before.tolist() == [[1, 2, 9, 9]]
    assert not first.choice.accepted.any()
    assert (first.checked == -1).all()
    assert of.drafts.candidates.ids[SLOT].tolist() == [[5, 2, 7, 8], [9] * 4]
    # The verifier decides on what it has seen, whatever the strategy thinks by now.
    second = decide(of, [1, 2, 9, 9], verified=[0, 0, 7, 4])
    assert not second.wait.any()
    assert second.choice.before.tolist() == [[5, 2, 9, 9]]
    assert second.choice.scores.tokens[0, 2:].tolist() == [7, 4]
    assert second.choice.accepted.tolist() == [[False, False, True, True]]
    assert second.checked.tolist() == [[-1, -1, 7, 8]]
    assert of.verifier.totals.tolist() == [1, 2, 2, 1]


def test_what_is_masked_again_is_drafted_again() -> None:
    of = stepper(route="always")
    decide(of, [1, 9, 9, 9])
    assert of.drafts.candidates.ids[SLOT, 0].tolist() == [1, 6, 7, 8]
    second = decide(of, [1, 9, 9, 9], verified=[0, 4, 7, 8])
    assert second.choice.before.tolist() == [[1, 9, 9, 9]]
    assert second.choice.accepted.tolist() == [[False, True, False, False]]
    assert second.choice.scores.tokens[0, 1] == 4


@pytest.mark.parametrize("waiting", [False, True])
def test_without_verification_the_strategy_goes_on(waiting: bool) -> None:
    """Not routed, or routed and then without room in the next forward."""
    of = stepper(route="always" if waiting else "never")
    if waiting:
        assert decide(of, [5, 2, 9, 9]).wait.all()
        of.drafts.candidates.count[SLOT] = 0
    only = decide(of, [5, 2, 9, 9])
    assert not only.wait.any()
    assert only.choice.before.tolist() == [[5, 2, 9, 9]]
    assert only.choice.accepted.tolist() == [[False, False, False, True]]
    assert (only.checked == -1).all()
