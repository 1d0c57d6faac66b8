# SPDX-License-Identifier: Apache-2.0
"""Greedy S2D2 with token editing, whole-sequence, in plain torch.

The loop of phymhan/S2D2 (LLaDA2/generate_utils.py) in its own order: edits, the draft,
its verification, and only without one the strategy's rule. Where their code draws at
temperature 0, the verifier's best token decides. Each position is verified by a forward
of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from dense_reference import Weights, block_causal_mask, choose_threshold


def decode_verified(
    config: dict[str, Any],
    weights: Weights,
    prompt: list[int],
    max_tokens: int,
    *,
    block: int,
    threshold: float,
    edit_threshold: float,
    post_steps: int,
    min_span: int,
    logits_of: Callable[..., torch.Tensor],
) -> tuple[list[int], int]:
    """Output tokens, and how many edits were made in steps that were verified."""
    mask_id = config["mask_token_id"]

    def best(ids: list[int], mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits_of(config, weights, ids, mask)
        logits[:, mask_id] = -torch.inf
        return logits.softmax(-1).max(-1)

    ids, num_edits = list(prompt), 0
    while len(ids) - len(prompt) < max_tokens:
        start, first = len(ids) // block * block, len(ids)
        end = start + block
        ids += [mask_id] * (end - first)
        post = 0
        while True:
            masked = [i for i in range(first, end) if ids[i] == mask_id]
            post += not masked
            if post > post_steps:
                break
            sure, token = best(ids, block_causal_mask(end, block))
            edits = {
                i: int(token[i])
                for i in range(first, end)
                if ids[i] != mask_id and token[i] != ids[i] and sure[i] > edit_threshold
            }
            span = [i for n, i in enumerate(masked) if i == masked[0] + n]
            unmasked = {}
            if len(span) >= min_span:
                num_edits += len(edits)
                draft = list(ids)
                for i, value in edits.items():
                    draft[i] = value
                for i in span:
                    seen = block_causal_mask(i + 1, block)
                    seen[start:] &= torch.ones(i + 1, i + 1).tril().bool()[start:]
                    _, verified = best([*draft[:i], mask_id], seen)
                    unmasked[i] = draft[i] = int(verified[i])
                    if unmasked[i] != int(token[i]):
                        break
            elif masked:
                columns = choose_threshold(
                    masked, sure, token.tolist(), 0, 1, threshold=threshold
                )
                unmasked = {i: int(token[i]) for i in columns}
            for i, value in {**edits, **unmasked}.items():
                ids[i] = value
            if not masked and not edits:
                break
    return ids[len(prompt) : len(prompt) + max_tokens], num_edits
