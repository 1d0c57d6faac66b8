# SPDX-License-Identifier: Apache-2.0
"""One denoising step of requests that share a strategy: its slots, in their order.

    statistics -> fuse -> (candidates) -> region -> accept -> exit -> end -> revise

Revision, like acceptance, looks at the canvas before the step: what is masked again
here can be unmasked in the next step at the earliest.
"""

from typing import NamedTuple

import torch

from vllm_unmask.decoding import exits, history, regions, revising
from vllm_unmask.decoding.fusing import (
    Credit,
    fuse_credit,
    reject_early_end,
    update_credit,
)
from vllm_unmask.decoding.learned import Filter
from vllm_unmask.decoding.reading import orders_read, row_statistics
from vllm_unmask.decoding.rules import Inputs, accept, scheduled
from vllm_unmask.decoding.sampling import REMASK_STREAM, uniform
from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.decoding.statistics import RowStatistics
from vllm_unmask.decoding.strategy import Block, Parameters, State, integers, is_stop

# What needs how much of the row statistics.
_ENTROPY = {"entropy_bounded", "entropy_distance", "entropy_threshold"}
_PROBABILITY = {"credit", "edit"}
_STATISTICS = _ENTROPY | _PROBABILITY | {"prophet", "sched"}
# ReMDM masks nothing again after so many steps a position: every block ends.
_REMASKING = 2


class Evidence(NamedTuple):
    """What a strategy reads of the logits besides candidates."""

    statistics: RowStatistics | None  # each tensor [requests, block]
    own: torch.Tensor | None  # float32 [requests, block], probability of what is there
    # Orders, as in `scoring.ORDERS`, for which `statistics.greedy_scores` has all that
    # greedy requests need; none if the logits were changed since.
    orders: frozenset[int] = frozenset()


class Decision(NamedTuple):
    """What a step does with the blocks."""

    ids: torch.Tensor  # int64 [requests, block], edited and masked again
    tokens: torch.Tensor  # int64 [requests, block], what accepted positions take
    accepted: torch.Tensor  # bool [requests, block], a subset of the masked ones
    hold: torch.Tensor | None  # bool [requests], kept open for edits though complete


def read_logits(
    fillers: frozenset[str],
    block: Block,
    logits: torch.Tensor,
    p: Parameters,
    state: State,
) -> Evidence:
    """Read the logits, then let the slot *fuse* change them in place.

    Args:
        fillers: names, as in ``presets``.
        block: the requests' blocks.
        logits: float32 [requests, block, vocab], banned tokens at -inf.
        p: the requests' options.
        state: changed in place.
    """
    statistics = own = None
    entropy = not fillers.isdisjoint(_ENTROPY)
    probability = block.injected is not None or not fillers.isdisjoint(_PROBABILITY)
    if block.injected is not None or not fillers.isdisjoint(_STATISTICS):
        # The rules look at the entropy of masked positions alone.
        unsure = block.masked.flatten()
        flat = row_statistics(logits.flatten(0, 1), entropy, probability, unsure)
        statistics = RowStatistics(*(x.view(block.ids.shape) for x in flat))
    if block.injected is not None:
        assert statistics is not None
        own = _own_probability(logits, block.ids, statistics)
    if "klass" in fillers:
        # Before fusing: credit would pass for a change of mind.
        state["stability"] = history.update_stability(
            state.get("stability"),
            logits.softmax(dim=-1),
            block.step,
            p["kl_threshold"],
        )
    if "credit" in fillers:
        assert statistics is not None
        credit = update_credit(
            state.get("credit") or _no_credit(block.ids),
            statistics.tokens,
            statistics.probability,
            block.masked,
            block.step,
            p["credit_decay"],
            p["credit_power"],
        )
        state["credit"] = credit
        fuse_credit(logits, credit, p["credit_weight"])
        return Evidence(statistics, own)
    if statistics is None:
        return Evidence(None, own)
    return Evidence(statistics, own, orders_read(logits, entropy, probability))


def _own_probability(
    logits: torch.Tensor, ids: torch.Tensor, best: RowStatistics
) -> torch.Tensor:
    """Probability of what each position holds, float32 [requests, block]."""
    pair = torch.stack((ids, best.tokens), dim=2)
    own, first = logits.gather(2, pair).unbind(dim=2)
    return best.probability * (own - first).exp()


def _no_credit(ids: torch.Tensor) -> Credit:
    # One proposal a step, and a block has no more steps than positions (with
    # remasking it may, and then forgets the smallest credit).
    tokens = torch.full((*ids.shape, ids.shape[1]), -1, device=ids.device)
    return Credit(tokens, torch.zeros_like(tokens, dtype=torch.float32))


def decide(
    fillers: frozenset[str],
    block: Block,
    scores: Scores,
    evidence: Evidence,
    p: Parameters,
    state: State,
    mask_id: int,
    learned: Filter | None = None,
) -> Decision:
    """Everything after scoring.

    Args:
        fillers: names, as in ``presets``.
        block: the requests' blocks.
        scores: each tensor [requests, block].
        evidence: from ``read_logits``.
        p: the requests' options.
        state: changed in place.
        mask_id: the mask token.
        learned: the filter of the rule ``learned``.

    Returns:
        The decision; every request that has a masked position has one less after it,
        as long as nothing is masked again.
    """
    if "eos_rejection" in fillers:
        scores = _reject_early_end(block, scores, p)
    count = scheduled(block, p)
    region = _region(fillers, block, scores, p, state)
    if block.reach is not None:
        region = region & block.reach
    inputs = Inputs(
        block, scores, evidence.statistics, region, count, p, state, learned
    )
    accepted = accept(fillers, inputs)
    if not fillers.isdisjoint({"prophet", "sched"}):
        fill = _exit(fillers, block, evidence, p, state)
        accepted = accepted | (block.masked & fill.unsqueeze(1))
    tokens, ids = scores.tokens, block.ids
    if evidence.own is not None:
        assert block.injected is not None
        # In the first step alone, so that a doubt ends.
        injected = block.injected & (block.step == 0).unsqueeze(1)
        doubted = revising.doubted(evidence.own, injected, p["doubt"])
        ids = ids.masked_fill(doubted, mask_id)
    if "end_of_text" in fillers:
        left = block.masked & ~accepted
        after = torch.where(accepted, tokens, ids)
        beyond = regions.after_end(is_stop(after, block) & block.output & ~left, left)
        tokens = torch.where(beyond, block.stop_ids[:, :1], tokens)
        accepted = accepted | beyond
    decision = Decision(ids, tokens, accepted, None)
    if "edit" in fillers:
        return _edit(block, evidence, decision, p, state)
    if "remdm" in fillers:
        return _remask_at_random(block, scores, decision, count, p, state, mask_id)
    if "rcr" in fillers:
        return _remask_by_rank(block, scores, decision, count, state, mask_id)
    return decision


def _reject_early_end(block: Block, scores: Scores, p: Parameters) -> Scores:
    is_end = is_stop(scores.tokens, block)
    confidence = reject_early_end(
        scores.confidence, is_end, block.step, integers(p, "steps"), p["end_floor"]
    )
    # The other orders rank by something else.
    by_confidence = (p["order"] == 0).unsqueeze(1)
    order = torch.where(by_confidence, confidence, scores.order)
    return scores._replace(confidence=confidence, order=order)


def _region(
    fillers: frozenset[str], block: Block, scores: Scores, p: Parameters, state: State
) -> torch.Tensor:
    """bool [requests, block]: masked positions of the part that is open."""
    if "sub_blocks" in fillers:
        return regions.sub_block(block.masked, integers(p, "sub_block_length"))
    if "adablock" not in fillers:
        return block.masked
    assert block.is_delimiter is not None
    end = regions.adaptive_end(
        scores.confidence,
        block.is_delimiter[scores.tokens],
        block.masked,
        state.get("region_end", torch.zeros_like(block.step)),
        block.step,
        p["delimiter_threshold"],
        integers(p, "sub_block_length"),
    )
    state["region_end"] = end
    column = torch.arange(block.ids.shape[1], device=end.device)
    return block.masked & (column < end.unsqueeze(1))


def _exit(
    fillers: frozenset[str],
    block: Block,
    evidence: Evidence,
    p: Parameters,
    state: State,
) -> torch.Tensor:
    """bool [requests]: the rest of the block is filled now."""
    assert evidence.statistics is not None
    gap = exits.mean_gap(evidence.statistics.gap, block.masked)
    high, low = p["gap_high"], p["gap_low"]
    if "prophet" in fillers:
        return exits.prophet(gap, block.step / p["steps"], high, low)
    # From 0 in the first step to 1 in the schedule's last one.
    progress = block.step / (p["steps"] - 1).clamp(min=1)
    fill = exits.sched(gap, progress, high, low, integers(p, "gap_shape"))
    tokens = evidence.statistics.tokens
    previous = state.get("previous", torch.zeros_like(tokens))
    state["previous"] = tokens
    agreed = exits.agreeing(tokens, previous, block.masked, block.step)
    return fill & (agreed | (p["gap_agreement"] == 0))


def _edit(
    block: Block, evidence: Evidence, decision: Decision, p: Parameters, state: State
) -> Decision:
    """Token editing; a block without masks is kept until a step changes nothing."""
    best = evidence.statistics
    assert best is not None
    editable = block.live & ~block.masked & (decision.ids == block.ids)
    edits = revising.edited(
        best.tokens, best.probability, block.ids, editable, p["edit_threshold"]
    )
    had_masks = block.masked.any(dim=1)
    post = torch.where(block.step == 0, 0, state.get("post", 0)) + ~had_masks
    state["post"] = post
    hold = (had_masks | edits.any(dim=1)) & (post < p["post_steps"])
    return decision._replace(
        ids=torch.where(edits, best.tokens, decision.ids),
        hold=hold & block.live.any(dim=1),
    )


def _at_reveal(block: Block, state: State) -> torch.Tensor:
    """Confidence with which each token was unmasked, float32 [requests, block]."""
    # What was there when the block was opened is as sure as can be.
    ones = torch.ones(block.ids.shape, device=block.ids.device)
    kept = state.get("at_reveal", ones)
    return torch.where((block.step == 0).unsqueeze(1), ones, kept)


def _remask_at_random(
    block: Block,
    scores: Scores,
    decision: Decision,
    count: torch.Tensor,
    p: Parameters,
    state: State,
    mask_id: int,
) -> Decision:
    """ReMDM, while the block has masks and is not older than its bound."""
    confidence = _at_reveal(block, state)
    revealed = block.live & ~block.masked
    shape = block.ids.shape
    draws = uniform(
        block.seeds.unsqueeze(1).expand(shape),
        block.positions,
        block.step.unsqueeze(1).expand(shape),
        REMASK_STREAM,
    )
    again = revising.remasked_at_random(
        revealed,
        confidence,
        block.num_masks,
        revealed.sum(dim=1) + count,
        p["remask_rate"],
        integers(p, "remask"),
        draws,
    )
    open_ = block.masked.any(dim=1) & (block.step < _REMASKING * shape[1])
    again = again & open_.unsqueeze(1)
    state["at_reveal"] = torch.where(decision.accepted, scores.confidence, confidence)
    return decision._replace(ids=decision.ids.masked_fill(again, mask_id))


def _remask_by_rank(
    block: Block,
    scores: Scores,
    decision: Decision,
    count: torch.Tensor,
    state: State,
    mask_id: int,
) -> Decision:
    """RCR: every position is filled, the least sure ones are masked again.

    As many stay masked as the schedule leaves, and one less than before at most.
    """
    confidence = torch.where(block.masked, scores.confidence, _at_reveal(block, state))
    state["at_reveal"] = confidence
    left = (block.masked.sum(dim=1) - count).clamp(min=0)
    again = revising.remasked_by_rank(confidence, block.live, left)
    return decision._replace(
        ids=decision.ids.masked_fill(again & ~block.masked, mask_id),
        accepted=block.masked & ~again,
    )
