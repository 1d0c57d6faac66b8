# SPDX-License-Identifier: Apache-2.0
"""Long blocks until the output contains a text, short ones after it: in plain torch.

One forward of the whole sequence a step, under a mask whose grid changes its width.
"""

from collections.abc import Callable
from typing import Any

import torch
from dense_reference import Choose, Weights


def two_grids_mask(
    length: int, block: int, short: int, switch: int | None
) -> torch.Tensor:
    """bool [length, length]: blocks of ``block`` positions, then of ``short``.

    The latter from position ``switch`` on; None: nowhere.
    """
    switch = length if switch is None else switch
    number = [
        i // block if i < switch else switch // block + (i - switch) // short
        for i in range(length)
    ]
    rows = torch.tensor(number)
    return rows[:, None] >= rows[None, :]


def switch_after(
    prompt: list[int], output: list[int], block: int, found: Callable[[list[int]], bool]
) -> int | None:
    """Where short blocks begin: at the end of the block with which ``found`` holds."""
    for count in range(1, len(output) + 1):
        if found(output[:count]):
            return ((len(prompt) + count - 1) // block + 1) * block
    return None


def decode_answer(
    config: dict[str, Any],
    weights: Weights,
    prompt: list[int],
    max_tokens: int,
    *,
    block: int,
    short: int,
    found: Callable[[list[int]], bool],
    choose: Choose,
    order: Callable[[Choose], Choose],
    logits_of: Callable[..., torch.Tensor],
    max_model_len: int,
) -> tuple[list[int], int | None]:
    """Greedy decoding.

    Args:
        found: whether an output contains the text.
        choose: the rule.
        order: what the family does with the rule where a long block begins.

    Returns:
        The output tokens, and where the blocks became short.
    """
    mask_id = config["mask_token_id"]
    ids, switch = list(prompt), None
    while len(ids) < min(len(prompt) + max_tokens, max_model_len):
        size = block if switch is None else short
        start, first = len(ids) // size * size, len(ids)
        end = min(start + size, max_model_len)
        rule = order(choose) if start % block == 0 else choose
        ids += [mask_id] * (end - first)
        for step in range(size):
            masked = [i - start for i in range(first, end) if ids[i] == mask_id]
            if not masked:
                break
            mask = two_grids_mask(len(ids), block, short, switch)
            logits = logits_of(config, weights, ids, mask)[start:]
            logits[:, mask_id] = -torch.inf
            confidence, candidate = logits.softmax(-1).max(-1)
            for column in rule(
                masked, confidence, candidate.tolist(), step, end - first
            ):
                ids[start + column] = int(candidate[column])
        switch = switch or switch_after(prompt, ids[len(prompt) :], block, found)
    return ids[len(prompt) :][:max_tokens], switch
