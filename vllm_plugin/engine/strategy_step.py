# SPDX-License-Identifier: Apache-2.0
"""One denoising step of the requests whose strategy is more than a plain one.

Groups of requests that share their fillers go through `decoding.composition`; the
others' rows are left as they are.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vllm_unmask.decoding.canvas import Canvas
from vllm_unmask.decoding.composition import Decision, Evidence, decide, read_logits
from vllm_unmask.decoding.scoring import Scores
from vllm_unmask.decoding.statistics import RowStatistics, greedy_scores
from vllm_unmask.decoding.strategy import Block, State
from vllm_unmask.engine.openings import Openings
from vllm_unmask.engine.strategies import SEEDED, Group, Strategies

if TYPE_CHECKING:
    from vllm_unmask.engine.grammar_step import GrammarStep
    from vllm_unmask.engine.rows import DenoisingRows


class Outcome(NamedTuple):
    """A batch after the strategies; every tensor [requests, block]."""

    ids: torch.Tensor  # int64, edited and masked again, before acceptance
    scores: Scores
    accepted: torch.Tensor  # bool
    opened: torch.Tensor  # bool, not a mask when its block was opened
    hold: torch.Tensor  # bool [requests], kept open for edits though complete


class StrategyStep:
    """One denoising step.

    Args:
        strategies: of all slots.
        openings: of all slots.
        groups: those of the step.
        canvas: of all slots.
        rows: the requests that denoise.
        active: int64 [requests, block], their blocks before the step.
        masked: bool [requests, block], positions to be unmasked.
        reach: bool [requests, block], those that may be unmasked now; None: all.
        sampling: vLLM's sampling parameters of all slots.
        first_live: int64 [requests], column before which the grammar has verified.
    """

    def __init__(
        self,
        strategies: Strategies,
        openings: Openings,
        groups: list[Group],
        canvas: Canvas,
        rows: "DenoisingRows",
        active: torch.Tensor,
        masked: torch.Tensor,
        reach: torch.Tensor | None,
        sampling: Any,
        first_live: torch.Tensor | None,
    ) -> None:
        self.strategies, self.openings = strategies, openings
        self.canvas = canvas
        self.active, self.masked, self.reach = active, masked, reach
        self.length, self.mask_id = strategies.geometry
        self.positions = rows.positions(self.length).long()
        self.rows = rows
        self.sampling = sampling
        self.first_live = first_live
        self.groups = [(g, self._block(g), strategies.recall(g)) for g in groups]
        self.evidence: list[Evidence] = []

    def _block(self, group: Group) -> Block:
        strategies, slots, slots_np = self.strategies, group.slots, group.slots_np
        ids, masked = group.take(self.active), group.take(self.masked)
        start, width = group.take(self.rows.start), group.take(self.rows.width)
        num_fixed = self.canvas.num_fixed[slots]
        column = torch.arange(self.length, device=ids.device)
        output = (column >= num_fixed.unsqueeze(1)) & (column < width.unsqueeze(1))
        live, injected = output, None
        if self.first_live is not None:
            live = live & (column >= group.take(self.first_live).unsqueeze(1))
        if SEEDED in group.fillers:
            seeded, pinned = self.openings.seeded(slots_np, start)
            injected = live & ~pinned & (seeded != self.mask_id) & (ids == seeded)
            live = live & ~pinned
        num_masks = torch.minimum(self.canvas.num_masks[slots], width - num_fixed)
        lengths = np.stack(
            (strategies.num_prompt[slots_np], strategies.max_tokens[slots_np])
        )
        num_prompt, max_tokens = torch.from_numpy(lengths).to(ids.device).unbind(0)
        progress = ((start - num_prompt) / max_tokens).clamp(min=0)
        stop_ids = torch.from_numpy(strategies.stop_ids[slots_np])
        return Block(
            ids=ids,
            masked=masked,
            output=output,
            live=live,
            num_masks=num_masks.clamp(min=1),
            step=self.canvas.step[slots],
            stop_ids=stop_ids.to(ids.device),
            progress=progress.float(),
            seeds=self.sampling.seeds.gpu[slots],
            positions=group.take(self.positions),
            is_delimiter=strategies.is_delimiter(group),
            injected=injected,
            reach=None if self.reach is None else group.take(self.reach),
        )

    def read(self, logits: torch.Tensor) -> None:
        """Statistics of the logits, which the slot *fuse* then changes in place.

        Args:
            logits: float32 [requests * block, vocab].
        """
        blocks = logits.view(-1, self.length, logits.shape[1])
        for group, block, state in self.groups:
            part = group.take(blocks)
            evidence = read_logits(group.fillers, block, part, group.parameters, state)
            self.evidence.append(evidence)
            if "credit" in group.fillers and group.where is not None:
                blocks[group.where] = part

    @property
    def known(self) -> Evidence | None:
        """What has been read of the whole batch, if one group is all of it."""
        one = len(self.groups) == 1 and self.groups[0][0].where is None
        return self.evidence[0] if one else None

    def decide(self, scores: Scores, accepted: torch.Tensor) -> Outcome:
        """Carry the strategies out.

        Args:
            scores: each tensor [requests, block].
            accepted: bool [requests, block], right for the other requests.
        """
        ids, tokens, confidence = self.active, scores.tokens, scores.confidence
        hold = torch.zeros_like(self.rows.width, dtype=torch.bool)
        opened = torch.zeros_like(accepted)
        for (group, block, state), evidence in zip(
            self.groups, self.evidence, strict=True
        ):
            decision = self._decide(group, block, state, scores, evidence)
            accepted = group.put(accepted, decision.accepted)
            tokens = group.put(tokens, decision.tokens)
            ids = group.put(ids, decision.ids)
            first = (block.step == 0).unsqueeze(1)
            opened = group.put(opened, first & block.output & ~block.masked)
            if decision.hold is not None:
                assert evidence.statistics is not None
                hold = group.put(hold, decision.hold)
                edited = decision.ids != block.ids
                sure = evidence.statistics.probability
                sure = torch.where(edited, sure, group.take(confidence))
                confidence = group.put(confidence, sure)
        scores = scores._replace(tokens=tokens, confidence=confidence)
        return Outcome(ids, scores, accepted, opened, hold)

    def remember(self, wait: torch.Tensor | None) -> None:
        """Keep what the step left.

        Args:
            wait: bool [requests], whose step is carried out by the next forward.
        """
        for group, _, state in self.groups:
            mine = None if wait is None else group.take(wait)
            self.strategies.remember(group, state, mine)

    def _decide(
        self,
        group: Group,
        block: Block,
        state: State,
        scores: Scores,
        evidence: Evidence,
    ) -> Decision:
        scores = Scores(*(group.take(x) for x in scores))
        if evidence.statistics is not None and evidence.orders:
            scores = self._known_order(group, scores, evidence, evidence.statistics)
        return decide(
            group.fillers,
            block,
            scores,
            evidence,
            group.parameters,
            state,
            self.mask_id,
            self.strategies.learned,
        )

    def _known_order(
        self, group: Group, scores: Scores, evidence: Evidence, best: RowStatistics
    ) -> Scores:
        """The order of greedy requests from what has been read already.

        `Candidates` takes it from there if it can, which depends on the other requests,
        and its last bit may differ from what it would compute.
        """
        order = group.parameters["order"].long()
        known = torch.tensor(sorted(evidence.orders), device=order.device)
        greedy = self.sampling.temperature.gpu[group.slots] == 0
        mine = (greedy & torch.isin(order, known)).unsqueeze(1)
        other = greedy_scores(best, order.unsqueeze(1)).order
        return scores._replace(order=torch.where(mine, other, scores.order))

    def held(
        self, hold: torch.Tensor, after: torch.Tensor, grammar: "GrammarStep | None"
    ) -> torch.Tensor:
        """Which blocks stay open although they are complete, bool [requests].

        Args:
            hold: bool [requests], what the strategies ask for.
            after: int64 [requests, block], the blocks after the step.
            grammar: of the step; what it has verified is not edited any more.
        """
        for group, block, _ in self.groups:
            left = ((group.take(after) == self.mask_id) & block.output).any(dim=1)
            hold = group.put(hold, group.take(hold) & ~left)
        if grammar is not None:
            hold = hold.index_fill(0, grammar.rows(hold.device), False)
        return hold
