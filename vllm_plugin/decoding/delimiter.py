# SPDX-License-Identifier: Apache-2.0
"""Whether an output contains a text, however its bytes are split into tokens.

The text is an automaton over bytes: its state is how much of the text the output ends
with, and stays at the text's length once all of it was there. A token is then a
function from states to states, and what a step reports a composition of functions.
"""

from collections.abc import Sequence

import numpy as np
import torch


def transitions(vocabulary: Sequence[bytes], text: bytes) -> torch.Tensor:
    """What each token makes of each state.

    Args:
        vocabulary: bytes of every token.
        text: 1 to 255 bytes.

    Returns:
        uint8 [vocab, len(text) + 1] -> state; state ``len(text)`` is the last.
    """
    last = len(text)
    # Knuth, Morris and Pratt: a byte that does not fit falls back to a shorter start.
    by_byte = np.zeros((last + 1, 256), np.uint8)
    by_byte[last] = last
    fallback = 0
    for state, byte in enumerate(text):
        by_byte[state] = by_byte[fallback] if state else 0
        by_byte[state, byte] = state + 1
        fallback = int(by_byte[fallback, byte]) if state else 0
    lengths = np.array([len(token) for token in vocabulary])
    begins = np.cumsum(lengths) - lengths
    flat = np.frombuffer(b"".join(vocabulary), np.uint8)
    states = np.tile(np.arange(last + 1, dtype=np.uint8), (len(lengths), 1))
    for place in range(lengths.max(initial=0)):
        left = np.flatnonzero(lengths > place)
        byte = flat[begins[left] + place]
        states[left] = by_byte[states[left], byte[:, None]]
    return torch.from_numpy(states)


def follow(
    state: torch.Tensor, tokens: torch.Tensor, count: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """The states that some more tokens lead to.

    Args:
        state: int64 [requests].
        tokens: int64 [requests, n], n at least 1.
        count: int64 [requests], how many of them there are, from the left.
        table: uint8 [vocab, states], of `transitions`.

    Returns:
        int64 [requests].
    """
    column = torch.arange(tokens.shape[1], device=tokens.device)
    there = (column < count.unsqueeze(1)).unsqueeze(2)
    same = torch.arange(table.shape[1], device=tokens.device)
    steps = torch.where(there, table[tokens].long(), same)
    # Neighbours become one function: a logarithm's number of operations.
    while steps.shape[1] > 1:
        if steps.shape[1] % 2:
            steps = torch.cat((steps, same.expand_as(steps[:, :1])), dim=1)
        steps = steps[:, 1::2].gather(2, steps[:, ::2])
    return steps[:, 0].gather(1, state.unsqueeze(1)).squeeze(1)
