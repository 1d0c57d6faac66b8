# SPDX-License-Identifier: Apache-2.0
"""Dense decoding without a KV cache: every step scores the whole sequence again."""

import torch
from model import DemoModel, causal_bias
from torch import Tensor


def _stack(prompts: list[list[int]], fill: int, block: int, new_tokens: int):
    """Right-padded tokens [B, L] and prompt lengths [B, 1]; L is on the block grid."""
    starts = torch.tensor([[len(prompt)] for prompt in prompts])
    length = int(starts.max()) + new_tokens
    length = (length + block - 1) // block * block
    tokens = torch.full((len(prompts), length), fill)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    return tokens, starts


def _until_stop(row: list[int], stop: int) -> list[int]:
    return row[: row.index(stop) + 1] if stop in row else row


@torch.no_grad()
def decode_blocks(
    model: DemoModel,
    prompts: list[list[int]],
    mask: int,
    stop: int,
    threshold: float | None = None,
    block: int = 8,
    new_tokens: int = 96,
) -> tuple[list[list[int]], list[int]]:
    """Greedy block-diffusion decoding of a batch.

    Each forward commits, in the current block of every sequence, the masked positions
    whose confidence (probability of the best token) exceeds ``threshold``, or the most
    confident one if there is none or ``threshold`` is None. The mask token is never
    predicted. Returns the new tokens up to and including the first ``stop`` and the
    number of forwards of every sequence.
    """
    tokens, starts = _stack(prompts, mask, block, new_tokens)
    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, -1)
    bias = causal_bias(positions, torch.ones_like(tokens, dtype=torch.bool), block)
    current = starts // block
    forwards = torch.zeros(batch, dtype=torch.long)
    active = torch.ones(batch, dtype=torch.bool)
    while active.any():
        live = active.nonzero()[:, 0]
        end = (int(current[live].max()) + 1) * block
        view = bias[live, :end, :end]
        masks = [(0, end, 0, end, view)]
        window = current[live] * block + torch.arange(block)
        rows = torch.zeros(len(live), end, dtype=torch.bool).scatter_(1, window, True)
        logits = model(tokens[live, :end], positions[live, :end], masks, rows=rows)
        logits = logits.float().view(len(live), block, -1)
        logits[..., mask] = float("-inf")
        confidence, best = logits.softmax(-1).max(-1)
        inside = tokens[live].gather(1, window)
        chosen = _choose(confidence, inside == mask, threshold)
        inside = torch.where(chosen, best, inside)
        tokens[live] = tokens[live].scatter(1, window, inside)
        forwards[live] += 1

        filled = (inside != mask).all(1)
        fresh = window >= starts[live]
        stopped = ((inside == stop) & fresh).any(1) & filled
        current[live[filled]] += 1
        out_of_room = current[live, 0] * block >= length
        active[live[stopped | out_of_room]] = False
    outputs = [
        _until_stop(row[int(start) :].tolist(), stop)
        for row, start in zip(tokens, starts, strict=True)
    ]
    return outputs, forwards.tolist()


def _choose(confidence: Tensor, masked: Tensor, threshold: float | None) -> Tensor:
    """Boolean [B, block]: which masked positions to commit; all inputs [B, block]."""
    confidence = confidence.masked_fill(~masked, -1.0)
    first = confidence.argmax(1, keepdim=True)
    single = torch.zeros_like(masked).scatter_(1, first, True) & masked
    if threshold is None:
        return single
    return (masked & (confidence > threshold)) | single


@torch.no_grad()
def decode_causal(
    model: DemoModel, prompts: list[list[int]], stop: int, new_tokens: int = 96
) -> tuple[list[list[int]], list[int]]:
    """Greedy next-token decoding; returns new tokens and forwards like above."""
    tokens, starts = _stack(prompts, stop, 1, new_tokens)
    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, -1)
    bias = causal_bias(positions, torch.ones_like(tokens, dtype=torch.bool), 1)
    place = starts.clone()
    active = torch.ones(batch, dtype=torch.bool)
    while active.any():
        live = active.nonzero()[:, 0]
        end = int(place[live].max())
        masks = [(0, end, 0, end, bias[live, :end, :end])]
        rows = positions[live, :end] == place[live] - 1
        logits = model(tokens[live, :end], positions[live, :end], masks, rows=rows)
        best = logits.argmax(-1)
        tokens[live] = tokens[live].scatter(1, place[live], best[:, None])
        place[live] += 1
        done = (best == stop) | (place[live, 0] >= length)
        active[live[done]] = False
    outputs = [
        _until_stop(row[int(start) : int(end)].tolist(), stop)
        for row, start, end in zip(tokens, starts, place, strict=True)
    ]
    return outputs, [len(output) for output in outputs]
