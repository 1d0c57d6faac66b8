# SPDX-License-Identifier: Apache-2.0
"""One tile of a row of logits, biased and banned, for the kernels of this folder.

A batch is a tuple: logits [rows, vocab], elements from one row to the next, vocab,
mask_id, static_mask, bitmasks, words of a bitmask, bitmask_rows, bias_starts,
bias_tokens, bias_values; None for what is not there, otherwise as in `Constraints`.
"""

import triton
import triton.language as tl

# Logits of a tile.
TILE = 4096


@triton.jit
def load_tile(batch: tl.tuple, row: tl.tensor, token: tl.tensor) -> tl.tensor:
    """float32 [tile], -inf for NaN, what is banned and what is past the vocabulary.

    Args:
        batch: see above.
        row: int64.
        token: int32 [tile].
    """
    (
        logits,
        stride,
        vocab,
        mask_id,
        static,
        masks,
        words,
        places,
        starts,
        ids,
        biases,
    ) = batch
    inside = token < vocab
    x = tl.load(logits + row * stride + token, mask=inside, other=float("-inf"))
    x = x.to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    if starts is not None:
        for i in range(tl.load(starts + row), tl.load(starts + row + 1)):
            biased = token == tl.load(ids + i)
            x = tl.where(biased, x + tl.load(biases + i), x)
    word = token // 32
    bit = token % 32
    if static is not None:
        bits = tl.load(static + word, mask=inside, other=0)
        x = tl.where((bits >> bit) & 1 == 1, x, float("-inf"))
    if masks is not None:
        place = tl.load(places + row)
        if place >= 0:
            bits = tl.load(masks + place * words + word, mask=inside, other=0)
            x = tl.where((bits >> bit) & 1 == 1, x, float("-inf"))
    return tl.where(token == mask_id, float("-inf"), x)


@triton.jit
def order_key(x: tl.tensor) -> tl.tensor:
    """int32, ordered as float32 that are not NaN; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def is_kept(
    x: tl.tensor, token: tl.tensor, heat: tl.tensor, border: tl.tensor, last: tl.tensor
) -> tl.tensor:
    """Which tokens of a tile are left by the truncation of their row.

    Args:
        x: float32 [tile].
        token: int32 [tile].
        heat: float32, temperature.
        border: int32, key of the smallest logit, over temperature, that is kept.
        last: int32, last token kept of those that have it.
    """
    key = order_key(tl.div_rn(x, tl.zeros_like(x) + heat))
    kept = (key > border) | ((key == border) & (token <= last))
    return kept & (x > float("-inf"))
