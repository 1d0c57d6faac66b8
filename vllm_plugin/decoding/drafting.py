# SPDX-License-Identifier: Apache-2.0
"""FreeDave: what the next denoising steps will probably make of a block.

A *candidate* is a guess at the block after one of the next steps. A forward pass that
sees the block and its candidates has the logits of each of them, and every denoising
step whose outcome is a candidate can be followed by the next one without a forward of
its own: its logits are there already (FreeDave, arXiv 2510.00294; SSD, arXiv
2510.04147). Guesses only decide how many forwards are saved, never what comes out.

The papers guess a chain: the surest position, the two surest, and so on. Most misses
are in the order alone, and two orders lead to the same block, so we guess sets: from
the empty one, the set that is most probably reached is added, again and again, as long
as there is room. The sets of a chain are among them when the order is sure.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_unmask.decoding.acceptance import scheduled_count
from vllm_unmask.decoding.scoring import ORDERS
from vllm_unmask.kernels.jit import compiled

Array = npt.NDArray[Any]

# Ways in which a step may go on from a set that are looked at.
_BRANCHES = 6
# Positions that a set is told by: bits of an int64. No guess has more.
_MOST = 62
# How much surer positions come first, and how much of a token's probability is left
# when others have been unmasked. Fitted on the demo model, and not sensitive.
_SURER, _STAYS = 1.2, 0.3
# The next block, where sets are told by their bits.
_OPENING, _NEVER = -1, -2


class Candidates(NamedTuple):
    """Guesses at the blocks of a batch of requests."""

    ids: torch.Tensor  # int64 [requests, candidates, block]
    count: torch.Tensor  # int64 [requests], how many of them are meant
    # int64 [requests]: the candidate that is the block after this one, as it starts; -1
    # if none is.
    opening: torch.Tensor
    # int64 [requests]: the complete candidate that the opening one follows; -1 where it
    # follows the block itself.
    leader: torch.Tensor

    def up_to(self, room: torch.Tensor) -> "Candidates":
        """No more candidates than there is room for, int64 [requests]."""
        opening = self.opening.where(self.opening < room, -1)
        count = torch.minimum(self.count, room)
        return self._replace(count=count, opening=opening)


def schedule_counts(
    num_masks: torch.Tensor, num_steps: torch.Tensor, step: torch.Tensor, depth: int
) -> torch.Tensor:
    """Positions that the static schedule unmasks in each of the next steps.

    Args:
        num_masks: int64 [requests], masks when the block was opened.
        num_steps: int64 [requests], steps of the schedule.
        step: int64 [requests], the next step.
        depth: steps.

    Returns:
        int64 [requests, depth].
    """
    ahead = torch.arange(depth, device=step.device)
    total, steps = num_masks.unsqueeze(1), num_steps.unsqueeze(1)
    return scheduled_count(total, steps, step.unsqueeze(1) + ahead)


def sureness(order: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    """How sure a position is, whatever the order ranks by: float32 in [0, 1].

    Args:
        order: float32 [requests, block], `scoring.Scores.order`.
        kind: int64 [requests], index into `scoring.ORDERS`.
    """
    kind = kind.unsqueeze(1)
    sure = torch.where(kind == ORDERS.index("entropy"), order.exp(), order)
    # The next step draws another random order.
    sure = torch.where(kind == ORDERS.index("random"), 0.5, sure)
    return sure.nan_to_num(0).clamp(0, 1)


def draft(
    ids: torch.Tensor,
    masked: torch.Tensor,
    tokens: torch.Tensor,
    sure: torch.Tensor,
    counts: torch.Tensor,
    limit: torch.Tensor,
    may_open: torch.Tensor,
    mask_id: int,
    depth: int,
) -> Candidates:
    """Candidates from the scores of the last step.

    Args:
        ids: int64 [requests, block], the blocks.
        masked: bool [requests, block], positions to be unmasked.
        tokens: int64 [requests, block], what each would take.
        sure: float32 [requests, block], how sure that is, 0 to 1.
        counts: int64 [requests, steps], positions that each of the next steps unmasks;
            0 where the rule has no schedule.
        limit: int64 [requests], candidates at most, ``depth`` or less.
        may_open: bool [requests], whether the next block may be a candidate; if not, a
            complete block is none either, as nothing of it is read.
        mask_id: the mask token, of which the next block is made.
        depth: candidates that there is room for.
    """
    device, shape = ids.device, (len(ids), depth, ids.shape[1])
    chosen = np.zeros(shape, np.bool_)
    told = np.full((3, len(ids)), -1, np.int64)
    likely_sets(
        masked.cpu().numpy(),
        sure.cpu().numpy(),
        np.ascontiguousarray(counts.cpu().numpy()),
        limit.cpu().numpy(),
        may_open.cpu().numpy(),
        chosen,
        told,
    )
    count, opening, leader = torch.from_numpy(told).to(device)
    unmasked = torch.from_numpy(chosen).to(device)
    drafts = torch.where(unmasked, tokens.unsqueeze(1), ids.unsqueeze(1))
    place = torch.arange(depth, device=device)
    opens = (place == opening.unsqueeze(1)).unsqueeze(2)
    return Candidates(drafts.masked_fill(opens, mask_id), count, opening, leader)


@compiled("int64(boolean[::1], float32[::1], int64[::1])")
def _by_sureness(masked: Array, sure: Array, places: Array) -> int:
    """Write the masked positions, the surest first, ties from the left."""
    n = 0
    for column in range(len(masked)):
        if masked[column]:
            at = n
            while at > 0 and sure[places[at - 1]] < sure[column]:
                places[at] = places[at - 1]
                at -= 1
            places[at] = column
            n += 1
    return n


@compiled(
    "int64(int64, int64, int64, float64[::1], float64[::1], int64[::1], float64[::1])"
)
def _next_sets(
    parent: Any,
    n: int,
    scheduled: int,
    weight: Array,
    stays: Array,
    bits: Array,
    chance: Array,
) -> int:
    """Where a step may lead from a set, and how probably; returns the number of ways.

    A schedule says how many positions: the surest ones, or with one of the next in
    place of the last of them. Without a schedule it is one, two, or all.
    """
    free = 0
    for rank in range(n):
        free += not parent >> rank & 1
    ways, total = 0, 0.0
    while ways < _BRANCHES:
        skipped = ways if scheduled else 0
        size = min(scheduled, free)
        if not scheduled:
            size = ways + 1 if ways + 1 < min(free, 3) else free
        if size + skipped > free or (not scheduled and ways == min(free, 3)):
            break
        child: Any = parent
        seen, odds, kept = 0, 1.0, 1.0
        for rank in range(n):
            if parent >> rank & 1 == 0:
                if seen < size - 1 or seen == size - 1 + skipped:
                    child |= np.int64(1) << rank
                    kept *= stays[rank]
                    odds = weight[rank]
                seen += 1
        if not scheduled:
            odds = 1.0
        bits[ways], chance[ways] = child, odds * kept
        total += odds
        ways += 1
    for way in range(ways):
        chance[way] /= total
    return ways


@compiled(
    "void(boolean[:,::1], float32[:,::1], int64[:,::1], int64[::1], boolean[::1],"
    " boolean[:,:,::1], int64[:,::1])"
)
def likely_sets(
    masked: Array,
    sure: Array,
    counts: Array,
    limit: Array,
    may_open: Array,
    chosen: Array,
    told: Array,
) -> None:
    """The sets of positions that the next steps most probably reach.

    Args:
        masked: bool [requests, block].
        sure: float32 [requests, block].
        counts: int64 [requests, steps].
        limit: int64 [requests].
        may_open: bool [requests].
        chosen: bool [requests, depth, block], all False; the sets are written here.
        told: int64 [3, requests]: count, opening and leader as in `Candidates`.
    """
    places = np.empty(masked.shape[1], np.int64)
    weight, stays = np.empty(masked.shape[1]), np.empty(masked.shape[1])
    # Sets that are not chosen yet, the chance to reach them, and in how many steps.
    room = _BRANCHES * chosen.shape[1] + 1
    bits, value, steps = (
        np.empty(room, np.int64),
        np.empty(room),
        np.empty(room, np.int64),
    )
    ways_bits, ways_chance = np.empty(_BRANCHES, np.int64), np.empty(_BRANCHES)
    done = np.empty(chosen.shape[1], np.int64)
    for r in range(len(masked)):
        n = _by_sureness(masked[r], sure[r], places)
        for rank in range(n):
            confidence = min(sure[r, places[rank]], 1 - 1e-6)
            weight[rank] = (1 - confidence) ** -_SURER
            stays[rank] = max(confidence, 1e-3) ** _STAYS
        told[0, r], told[1, r], told[2, r] = 0, -1, -1
        whole = (np.int64(1) << n) - 1 if n <= _MOST else _NEVER
        n = min(n, _MOST)
        parent: Any = np.int64(0)
        reached, taken, waiting = 1.0, 0, 0
        while told[0, r] < limit[r]:
            if parent == whole:
                if may_open[r]:
                    bits[waiting], value[waiting], steps[waiting] = _OPENING, reached, 0
                    told[2, r] = told[0, r] - 1
                    waiting += 1
            elif parent != _OPENING:
                scheduled = counts[r, min(taken, counts.shape[1] - 1)]
                ways = _next_sets(
                    parent, n, scheduled, weight, stays, ways_bits, ways_chance
                )
                for way in range(ways):
                    # A set that is chosen already may be reached in other ways.
                    if (done[: told[0, r]] == ways_bits[way]).any():
                        continue
                    at = 0
                    while at < waiting and bits[at] != ways_bits[way]:
                        at += 1
                    if at == waiting:
                        bits[at], value[at], steps[at] = ways_bits[way], 0, taken + 1
                        waiting += 1
                    value[at] += reached * ways_chance[way]
            if waiting == 0:
                break
            best = 0
            for at in range(1, waiting):
                if value[at] > value[best]:
                    best = at
            parent, reached, taken = bits[best], value[best], steps[best]
            waiting -= 1
            bits[best], value[best] = bits[waiting], value[waiting]
            steps[best] = steps[waiting]
            if parent == whole and not may_open[r]:
                continue
            done[told[0, r]] = parent
            if parent == _OPENING:
                told[1, r] = told[0, r]
            else:
                for rank in range(n):
                    if parent >> rank & 1:
                        chosen[r, told[0, r], places[rank]] = True
            told[0, r] += 1


def find(
    candidates: Candidates,
    used: torch.Tensor,
    ids: torch.Tensor,
    reported: torch.Tensor,
    opened: torch.Tensor,
) -> torch.Tensor:
    """The candidate that came true.

    Args:
        candidates: those of which there are logits.
        used: bool [requests, candidates], those that came true before.
        ids: int64 [requests, block], the open blocks.
        reported: int64 [requests, block], the blocks before them.
        opened: bool [requests], whether it is those that the candidates were guesses
            at.

    Returns:
        int64 [requests], the first one that equals the open block; -1 without one.
    """
    place = torch.arange(candidates.ids.shape[1], device=ids.device)
    follows = place == candidates.opening.unsqueeze(1)
    same = (candidates.ids == ids.unsqueeze(1)).all(dim=2)
    same &= ~used & (place < candidates.count.unsqueeze(1))
    same &= follows == opened.unsqueeze(1)
    # The next block's logits hold for the block that was in front of it.
    leads = place == candidates.leader.unsqueeze(1)
    right = (candidates.ids == reported.unsqueeze(1)).all(dim=2) & leads
    right = right.any(dim=1) | (candidates.leader < 0)
    same &= right.unsqueeze(1) | ~follows
    first = same.int().argmax(dim=1)
    return torch.where(same.any(dim=1), first, -1)
