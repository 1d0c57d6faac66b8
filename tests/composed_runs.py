# SPDX-License-Identifier: Apache-2.0
"""Blocks driven through a whole strategy, as the engine does it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from composed_blocks import BLOCKS, VOCAB, Opening, Request

from vllm_unmask.decoding.composition import Evidence, decide, read_logits
from vllm_unmask.decoding.learned import Filter
from vllm_unmask.decoding.scoring import ORDERS, SamplingRows, Scores, score
from vllm_unmask.decoding.strategy import Block, State
from vllm_unmask.options import decoding_limits
from vllm_unmask.presets import compose


class Step(NamedTuple):
    """What a step made of one request's block, each [block] but ``held``."""

    before: torch.Tensor
    ids: torch.Tensor  # edited and masked again
    accepted: torch.Tensor
    after: torch.Tensor
    held: bool


@dataclass
class Running:
    """A request on its way."""

    request: Request
    block: int = 0
    step: int = 0
    state: State = field(default_factory=dict)
    ids: torch.Tensor = field(init=False)
    history: list[list[Step]] = field(default_factory=lambda: [[]])

    def __post_init__(self) -> None:
        self.ids = self.opening.ids

    @property
    def opening(self) -> Opening:
        return self.request.openings[self.block]

    @property
    def done(self) -> bool:
        return self.block == BLOCKS


def run(requests: Sequence[Request], poisoned: bool = False) -> list[list[list[Step]]]:
    """Every block of every request to its end: request -> block -> steps.

    Args:
        requests: of one strategy.
        poisoned: whether a block starts with garbage for what is remembered.

    Raises:
        AssertionError: a block takes longer than it may.
    """
    rows = [Running(request) for request in requests]
    while active := [row for row in rows if not row.done]:
        for row, step in zip(active, _step(active, poisoned), strict=True):
            row.history[-1].append(step)
            row.ids = step.after
            row.step += 1
            left = (step.after == row.request.mask_id) & row.opening.output
            if left.any() or step.held:
                assert row.step < row.request.most_steps(row.opening), "too long"
                continue
            row.block += 1
            row.step = 0
            if not row.done:
                row.ids = row.opening.ids
                row.history.append([])
    return [row.history for row in rows]


def read(requests: Sequence[Request]) -> Evidence:
    """What the strategy reads of the first logits."""
    rows = [Running(request) for request in requests]
    fillers = compose(requests[0].strategy).fillers
    return read_logits(fillers, _block(rows), _logits(rows), _parameters(rows), {})


def _logits(rows: list[Running]) -> torch.Tensor:
    return torch.stack([row.request.logits(row.block, row.step) for row in rows])


def _parameters(rows: list[Running]) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor([row.request.number(name) for row in rows]).float()
        for name, limits in decoding_limits().items()
        if limits.kind not in ("strategy", "text")
    }


def _step(rows: list[Running], poisoned: bool) -> list[Step]:
    first = rows[0].request
    fillers = compose(first.strategy).fillers
    logits, parameters = _logits(rows), _parameters(rows)
    block = _block(rows)
    state = _recall(rows, poisoned)
    evidence = read_logits(fillers, block, logits, parameters, state)
    scores = _score(rows, logits, block, parameters["order"].long())
    decision = decide(
        fillers,
        block,
        scores,
        evidence,
        parameters,
        state,
        first.mask_id,
        _filter(first.length),
    )
    for index, row in enumerate(rows):
        row.state = {k: _map(v, lambda x, i=index: x[i]) for k, v in state.items()}
    after = torch.where(decision.accepted, decision.tokens, decision.ids)
    held = decision.hold
    if held is None:
        held = torch.zeros(len(rows), dtype=torch.bool)
    fields = (block.ids, decision.ids, decision.accepted, after)
    return [
        Step(*each, held=bool(hold)) for *each, hold in zip(*fields, held, strict=True)
    ]


def _block(rows: list[Running]) -> Block:
    ids = torch.stack([row.ids for row in rows])
    output, live, injected = (
        torch.stack([getattr(row.opening, name) for row in rows])
        for name in ("output", "live", "injected")
    )
    length = ids.shape[1]
    opened = torch.stack([row.opening.ids for row in rows])
    mask_id = rows[0].request.mask_id
    starts = torch.tensor([[row.block * length] for row in rows])
    stops = [[*row.request.stop_ids, -1, -1][:2] for row in rows]
    return Block(
        ids=ids,
        masked=output & (ids == mask_id),
        output=output,
        live=live,
        num_masks=((opened == mask_id) & output).sum(dim=1).clamp(min=1),
        step=torch.tensor([row.step for row in rows]),
        stop_ids=torch.tensor(stops),
        progress=torch.tensor([row.block / BLOCKS for row in rows]),
        seeds=torch.tensor([row.request.seed for row in rows]),
        positions=starts + torch.arange(length),
        is_delimiter=torch.arange(VOCAB) % 3 == 1,
        injected=injected if injected.any() else None,
    )


def _score(
    rows: list[Running], logits: torch.Tensor, block: Block, order: torch.Tensor
) -> Scores:
    shape = block.ids.shape

    def flat(values: torch.Tensor) -> torch.Tensor:
        return values.view(len(values), -1).expand(shape).flatten()

    temperature = torch.tensor([row.request.temperature for row in rows])
    keep_all = torch.zeros(len(rows))
    sampling = SamplingRows(
        flat(temperature),
        flat(keep_all.long() + VOCAB),
        flat(keep_all + 1),
        flat(keep_all),
        flat(block.seeds),
        block.positions.flatten(),
        flat(block.step),
    )
    scores = score(
        logits.flatten(0, 1),
        sampling,
        sampled=True,
        raw_confidence=flat(keep_all.bool()),
        orders=flat(order),
        orders_used=frozenset(range(len(ORDERS))),
        truncated=False,
    )
    # As the engine does where everything is banned.
    mask_id = rows[0].request.mask_id
    fallback = (mask_id + 1) % VOCAB
    tokens = torch.where(scores.tokens == mask_id, fallback, scores.tokens)
    return Scores(*(x.view(shape) for x in scores._replace(tokens=tokens)))


def _filter(length: int) -> Filter:
    generator = torch.Generator().manual_seed(length)
    shapes = ((4, length), (4,), (length, 4), (length,))
    return Filter(*(torch.randn(shape, generator=generator) for shape in shapes))


def _recall(rows: list[Running], poisoned: bool) -> State:
    """The rows' state, in which a row at step 0 must read nothing."""
    known = next((row.state for row in rows if row.state), None)
    if known is None:
        return {}
    states = []
    for row in rows:
        if row.step == 0:
            unread = _garbage if poisoned else torch.zeros_like
            states.append({k: _map(v, unread) for k, v in known.items()})
        else:
            states.append(row.state)
    return {name: _stack([state[name] for state in states]) for name in known}


def _garbage(like: torch.Tensor) -> torch.Tensor:
    if like.dtype == torch.bool:
        return torch.ones_like(like)
    return torch.full_like(like, math.nan if like.is_floating_point() else 3)


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)(*map(function, value))


def _stack(values: list[Any]) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.stack(values)
    return type(values[0])(*map(torch.stack, zip(*values, strict=True)))
