# SPDX-License-Identifier: Apache-2.0
"""Token batches for both trainings: bucketing by length, noise, attention biases.

Block-diffusion layout: [clean sequence | noisy copy | noisy copy]. A noisy copy holds
the answer and the prompt tokens that share its first block. Blocks count from absolute
position 0. A noisy row sees its own block in its own copy and the clean tokens of
earlier blocks; a clean row sees clean tokens up to the end of its own block.
"""

import random
from dataclasses import dataclass

import torch
from model import causal_bias, to_bias
from tasks import make_example
from torch import Tensor
from transformers import PreTrainedTokenizerBase

COPIES = 2  # noisy copies per clean sequence: the costly prompt part is shared
# Largest block size, to which answers are filled up -> share of each that is trained.
BLOCK_SHARES = {
    8: {8: 0.7, 4: 0.1, 2: 0.05, 1: 0.15},
    16: {16: 0.8, 8: 0.1, 4: 0.05, 1: 0.05},
    32: {32: 0.8, 16: 0.1, 8: 0.05, 1: 0.05},
}
# Blocks with every answer token masked: how each block starts when it is decoded.
# A threshold unmasks several tokens there, so sureness has to be right there first.
OPEN_SHARE = 0.45
POOL = 4096  # examples generated and sorted together


@dataclass
class Batch:
    tokens: Tensor  # [B, L] int64
    positions: Tensor  # [B, L] int64
    masks: list  # see model.Attention.forward
    rows: Tensor  # [B, L] bool, rows that are scored
    targets: Tensor  # [rows.sum()] int64, in the order of ``tokens[rows]``
    count: int  # sequences


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str):
    """(prompt ids with chat markers, answer ids ending with <|im_end|>)."""
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return ids, [*answer_ids, tokenizer.eos_token_id]


def pool_of_pairs(tokenizer: PreTrainedTokenizerBase, seed: int, index: int):
    """The ``index``-th pool of training pairs, always the same for one seed."""
    rng = random.Random(f"{seed}/{index}")
    pairs = []
    for _ in range(POOL):
        example = make_example(rng)
        pairs.append(encode_example(tokenizer, example.prompt, example.answer))
    return pairs


def bucketed(pairs, rows_per_batch: int, seed: int, copies: int):
    """Batches of pairs of similar length with at most about ``rows_per_batch`` rows."""

    def rows(pair) -> int:
        return len(pair[0]) + (1 + copies) * len(pair[1]) + 6 * (1 + copies)

    rng = random.Random(f"order/{seed}")
    # Jitter, so that a batch does not always hold the same few tasks together.
    ordered = sorted(pairs, key=lambda pair: rows(pair) * rng.uniform(1.0, 1.1))
    batches, start = [], 0
    while start < len(ordered):
        end, longest = start, 0
        while end < len(ordered):
            longest = max(longest, rows(ordered[end]))
            if end > start and longest * (end + 1 - start) > rows_per_batch:
                break
            end += 1
        batches.append(ordered[start:end])
        start = end
    rng.shuffle(batches)
    return batches


def _clean(pairs, fill: int, grid: int):
    """Right-padded tokens [B, C], starts of the answers [B, 1] and ends [B, 1].

    Sequences are filled with ``fill`` up to a multiple of ``grid``; the end counts
    the fill, because the fill is trained as well.
    """
    starts = torch.tensor([[len(prompt)] for prompt, _ in pairs])
    ends = torch.tensor([[len(p) + len(a)] for p, a in pairs])
    ends = (ends + grid - 1) // grid * grid
    tokens = torch.full((len(pairs), int(ends.max())), fill)
    for row, (prompt, answer) in zip(tokens, pairs, strict=True):
        row[: len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    return tokens, starts, ends


def causal_batch(pairs, fill: int) -> Batch:
    """Next-token batch for the autoregressive twin; only the answer is scored."""
    tokens, starts, ends = _clean(pairs, fill, grid=1)
    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, -1)
    bias = causal_bias(positions, positions < ends, 1)
    rows = (positions >= starts - 1) & (positions < ends - 1)
    targets = tokens.roll(-1, dims=1)[rows]
    masks = [(0, length, 0, length, bias)]
    return Batch(tokens, positions, masks, rows, targets, batch)


def diffusion_batch(
    pairs, fill: int, mask: int, noise: torch.Generator, grid: int
) -> Batch:
    """Block-diffusion batch with its own block size, at most ``grid``, a sequence."""
    clean, starts, ends = _clean(pairs, fill, grid)
    batch, clean_len = clean.shape
    sizes, shares = zip(*BLOCK_SHARES[grid].items(), strict=True)
    drawn = torch.multinomial(
        torch.tensor(shares), batch, replacement=True, generator=noise
    )
    block = torch.tensor(sizes)[drawn][:, None]

    firsts = starts // grid * grid
    noisy_len = int((ends - firsts).max())
    clean_pos = torch.arange(clean_len).expand(batch, -1)
    noisy_pos = firsts + torch.arange(noisy_len)
    noisy_ok = noisy_pos < ends
    answer = noisy_ok & (noisy_pos >= starts)
    source = noisy_pos.clamp(max=clean_len - 1)
    originals = clean.gather(1, source)

    copies = [clean]
    scored = [torch.zeros_like(clean, dtype=torch.bool)]
    for _ in range(COPIES):
        hidden = _masked_positions(noisy_pos, answer, block, noise)
        copies.append(originals.masked_fill(hidden, mask))
        scored.append(hidden)
    rows = torch.cat(scored, dim=1)
    targets = torch.cat([clean, *[originals] * COPIES], dim=1)[rows]

    noisy_pos_all = noisy_pos.repeat(1, COPIES)
    noisy_ok_all = noisy_ok.repeat(1, COPIES)
    copy_of = torch.arange(COPIES).repeat_interleave(noisy_len)
    row_block = (noisy_pos_all // block)[:, :, None]
    earlier = (clean_pos // block)[:, None, :] < row_block
    earlier &= (clean_pos < ends)[:, None, :]
    own = row_block == (noisy_pos_all // block)[:, None, :]
    own &= (copy_of[:, None] == copy_of[None, :]) & noisy_ok_all[:, None, :]
    own |= torch.eye(COPIES * noisy_len, dtype=torch.bool)
    length = clean_len + COPIES * noisy_len
    masks = [
        (0, clean_len, 0, clean_len, causal_bias(clean_pos, clean_pos < ends, block)),
        (clean_len, length, 0, length, to_bias(torch.cat([earlier, own], dim=2))),
    ]
    tokens = torch.cat(copies, dim=1)
    positions = torch.cat([clean_pos, noisy_pos_all], dim=1)
    return Batch(tokens, positions, masks, rows, targets, batch)


def _masked_positions(
    positions: Tensor, answer: Tensor, block: Tensor, noise: torch.Generator
) -> Tensor:
    """Boolean [B, N]: in every block all or a uniform number of its answer tokens."""
    batch, length = positions.shape
    index = positions // block
    index = index - index[:, :1]
    same = (index[:, :, None] == index[:, None, :]) & answer[:, None, :]
    score = torch.rand(batch, length, generator=noise)
    rank = (same & (score[:, None, :] < score[:, :, None])).sum(-1)
    size = same.sum(-1)
    # One uniform draw per block, read by all rows of the block.
    draw = torch.rand(batch, length, generator=noise).gather(1, index)
    count = (draw * size).floor() + 1
    whole = torch.rand(batch, length, generator=noise).gather(1, index) < OPEN_SHARE
    count = torch.where(whole, size, count)
    return answer & (rank < count)
