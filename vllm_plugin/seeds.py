# SPDX-License-Identifier: Apache-2.0
"""What a request writes on its canvas before the first step.

vLLM's own keys for it: `diffusion_seed_canvas`, token ids from the first output token
on, the mask token where nothing is known; `diffusion_pinned`, positions in it that
stay what they are. The others are a draft, which the strategy may revise. Unlike
vLLM's one canvas a seed may cover as many blocks as the request has tokens.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_unmask.limits import refused

SEED_KEY = "diffusion_seed_canvas"
PINNED_KEY = "diffusion_pinned"
# Under which name they pass vLLM's check, which wants a seed of one canvas.
_MOVED = {SEED_KEY: "vllm_unmask.seed_canvas", PINNED_KEY: "vllm_unmask.pinned"}


class Seeds(NamedTuple):
    """Tokens at the start of an output."""

    ids: tuple[int, ...]
    pinned: tuple[bool, ...]


def parse_seeds(
    extra_args: Mapping[str, Any] | None,
    vocab_size: int,
    mask_token_id: int,
    max_tokens: int | None,
) -> Seeds | None:
    """Read a request's seeds; None if it has none.

    Args:
        extra_args: of the request (HTTP: `vllm_xargs`).
        vocab_size: of the model.
        mask_token_id: stands for no seed at its position.
        max_tokens: of the request; None is not checked.

    Raises:
        OptionError: wrong types, ids or positions out of range, more ids than
            `max_tokens`, nothing but masks, or a pinned position without a token.
    """
    extra_args = extra_args or {}
    ids = extra_args.get(SEED_KEY, extra_args.get(_MOVED[SEED_KEY]))
    pinned = pinned_positions(extra_args)
    if ids is None:
        if pinned is not None:
            raise refused(PINNED_KEY, pinned, f"a {SEED_KEY} to hold", "is given alone")
        return None
    if not _integers(ids, vocab_size):
        raise refused(SEED_KEY, ids, f"a list of token ids from 0 to {vocab_size - 1}")
    if all(token == mask_token_id for token in ids):
        raise refused(
            SEED_KEY, ids, f"a token other than the mask, {mask_token_id}", "is empty"
        )
    if max_tokens is not None and len(ids) > max_tokens:
        raise refused(
            SEED_KEY, ids, f"at most max_tokens={max_tokens} ids, got {len(ids)}"
        )
    pinned = [] if pinned is None else pinned
    if not _integers(pinned, len(ids)):
        raise refused(PINNED_KEY, pinned, f"positions from 0 to {len(ids) - 1}")
    for position in pinned:
        if ids[position] == mask_token_id:
            raise refused(
                PINNED_KEY,
                pinned,
                "positions that hold a token",
                f"pins position {position}, which is a mask",
            )
    held = set(pinned)
    return Seeds(tuple(ids), tuple(place in held for place in range(len(ids))))


def pinned_positions(extra_args: Mapping[str, Any] | None) -> Any:
    """What a request gave as pinned positions, unchecked; None without."""
    extra_args = extra_args or {}
    return extra_args.get(PINNED_KEY, extra_args.get(_MOVED[PINNED_KEY]))


def moved_seeds(extra_args: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`extra_args` with the seeds under names of ours; None if there are none."""
    if not extra_args or extra_args.keys().isdisjoint(_MOVED):
        return None
    return {_MOVED.get(key, key): value for key, value in extra_args.items()}


def _integers(values: Any, end: int) -> bool:
    return isinstance(values, (list, tuple)) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end
        for value in values
    )
