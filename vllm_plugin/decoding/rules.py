# SPDX-License-Identifier: Apache-2.0
"""The slot *accept* by name: every rule with its options and memory."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from vllm_unmask.decoding import acceptance, history
from vllm_unmask.decoding.learned import Filter, accept_learned
from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.decoding.statistics import RowStatistics
from vllm_unmask.decoding.strategy import Block, Parameters, State, integers, is_stop
from vllm_unmask.decoding.streaming import accept_near


class Inputs(NamedTuple):
    """What a rule may read, and the memory that it may change."""

    block: Block
    scores: Scores  # each tensor [requests, block]
    statistics: RowStatistics | None  # each tensor [requests, block]
    masked: torch.Tensor  # bool [requests, block], the open part
    count: torch.Tensor  # int64 [requests], what the schedule asks for
    p: Parameters
    state: State
    learned: Filter | None

    @property
    def confidence(self) -> torch.Tensor:
        return self.scores.confidence

    @property
    def entropy(self) -> torch.Tensor:
        assert self.statistics is not None
        return self.statistics.entropy


def scheduled(block: Block, p: Parameters) -> torch.Tensor:
    """Positions that the schedule asks for, int64 [requests], at least 1."""
    sizes, steps = p["step_sizes"], integers(p, "steps")
    linear = acceptance.scheduled_count(block.num_masks, steps, block.step)
    cosine = acceptance.cosine_count(block.num_masks, steps, block.step)
    ascending = acceptance.ascending_count(block.num_masks, block.step)
    return torch.where(sizes == 0, linear, torch.where(sizes == 1, cosine, ascending))


def _threshold(i: Inputs) -> torch.Tensor:
    strict = i.p["strict"] > 0
    return acceptance.accept_above(i.confidence, i.masked, i.p["threshold"], strict)


def _factor(i: Inputs) -> torch.Tensor:
    return acceptance.accept_factor(i.confidence, i.masked, i.p["factor"])


def _entropy_bounded(i: Inputs) -> torch.Tensor:
    whole = i.p["whole_entropy"] > 0
    return acceptance.accept_entropy_bounded(
        i.scores.order, i.entropy, i.masked, i.p["entropy_bound"], whole
    )


def _entropy_threshold(i: Inputs) -> torch.Tensor:
    return acceptance.accept_entropy_below(i.entropy, i.masked, i.p["entropy_bound"])


def _entropy_distance(i: Inputs) -> torch.Tensor:
    bound, penalty = i.p["entropy_bound"], i.p["distance_penalty"]
    return accept_near(i.entropy, i.masked, bound, penalty)


def _klass(i: Inputs) -> torch.Tensor:
    streak = i.state["stability"].streak
    return history.accept_stable(
        i.confidence, i.masked, streak, i.p["threshold"], integers(i.p, "kl_history")
    )


def _local_leap(i: Inputs) -> torch.Tensor:
    return acceptance.accept_local_leap(
        i.confidence,
        i.masked,
        i.p["threshold"],
        i.p["relaxed_threshold"],
        integers(i.p, "radius"),
        i.p["strict"] > 0,
    )


def _hierarchy(i: Inputs) -> torch.Tensor:
    return acceptance.accept_runs(
        i.confidence, i.masked, i.p["threshold"], i.p["low_threshold"]
    )


def _bacd(i: Inputs) -> torch.Tensor:
    zeros = torch.zeros_like(i.block.progress)
    revealed = i.state.get("revealed")
    if revealed is None:
        revealed = history.RevealedConfidence(zeros, zeros.long())
    accepted = history.accept_adaptive(
        i.confidence,
        i.masked,
        revealed,
        i.block.step,
        i.p["low_threshold"],
        i.p["high_threshold"],
    )
    accepted |= acceptance.accept_top(i.scores.order, i.masked, i.count)
    i.state["revealed"] = history.update_revealed(
        revealed, i.confidence, accepted, i.block.step
    )
    return accepted


def _learned(i: Inputs) -> torch.Tensor:
    assert i.learned is not None
    return accept_learned(i.confidence, i.masked, i.learned, i.p["threshold"])


def _cad(i: Inputs) -> torch.Tensor:
    barred = is_stop(i.scores.tokens, i.block)
    barred &= (i.block.progress < i.p["end_gate"]).unsqueeze(1)
    most = torch.maximum(integers(i.p, "max_reveals"), i.count)
    return acceptance.accept_capped(
        i.confidence, i.masked, barred, i.p["threshold"], i.count, most
    )


def _dimple(i: Inputs) -> torch.Tensor:
    # A negative entropy, or a random number, is above no such threshold.
    ranked = (i.p["order"] <= 1).unsqueeze(1)
    return acceptance.accept_confident(
        torch.where(ranked, i.scores.order, i.confidence),
        i.masked,
        i.p["threshold"],
        i.block.num_masks,
        integers(i.p, "steps"),
        i.block.step,
    )


def _ccd(i: Inputs) -> torch.Tensor:
    state = i.state.get("coherence")
    if state is None:
        state = history.Coherence(
            torch.zeros_like(i.masked),
            torch.zeros_like(i.block.ids),
            torch.ones_like(i.block.step),
        )
    accepted, i.state["coherence"] = history.accept_coherent(
        i.scores.order,
        i.scores.tokens,
        i.masked,
        state,
        i.block.step,
        i.count,
        i.block.num_masks,
        i.p["expand"],
        integers(i.p, "warm_up"),
    )
    return accepted


# Rules that may accept nothing: the schedule's choice is added.
_FLOORED: Mapping[str, Callable[[Inputs], torch.Tensor]] = {
    "threshold": _threshold,
    "factor": _factor,
    "entropy_bounded": _entropy_bounded,
    "entropy_threshold": _entropy_threshold,
    "klass": _klass,
    "local_leap": _local_leap,
    "hierarchy": _hierarchy,
    "learned": _learned,
}
# Rules that see to progress themselves.
_WHOLE: Mapping[str, Callable[[Inputs], torch.Tensor]] = {
    "bacd": _bacd,
    "cad": _cad,
    "dimple": _dimple,
    "ccd": _ccd,
    "entropy_distance": _entropy_distance,
}


def accept(fillers: frozenset[str], inputs: Inputs) -> torch.Tensor:
    """Positions that the strategy's rule unmasks.

    Returns:
        bool [requests, block], a subset of ``inputs.masked``; at least one position
        of every request that has one there.
    """
    for name in fillers & _WHOLE.keys():
        return _WHOLE[name](inputs)
    chosen = acceptance.accept_top(inputs.scores.order, inputs.masked, inputs.count)
    for name in fillers & _FLOORED.keys():
        chosen = chosen | _FLOORED[name](inputs)
    return chosen
