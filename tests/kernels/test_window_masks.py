# SPDX-License-Identifier: Apache-2.0
"""Masks from their definitions, and the runs that one masked forward stands for.

The equalities use a small random network whose attention is either dense, under an
explicit mask of the whole sequence, or `window_attention` over a paged prefix.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_unmask.kernels.window_attention import masks, window_attention, write_kept

LAYERS, HEADS, KV_HEADS, DIM, HIDDEN, VOCAB, PAGE = 2, 4, 2, 8, 32, 20, 16
MASK_ID = VOCAB - 1
EXACT = {"rtol": 0, "atol": 1e-5}

Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@given(st.integers(1, 12), st.data())
def test_s2d2(block: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, block))
    span = range(start, data.draw(st.integers(start, block)))
    rows = [("draft", i) for i in range(block)] + [("mask", i) for i in span]
    expected = [
        [
            (key == "draft" and j <= i)
            if row == "draft"
            else (key == "draft" and j < i) or (key == "mask" and j == i)
            for key, j in rows
        ]
        for row, i in rows
    ]
    assert masks.s2d2_mask(block, span).tolist() == expected
    # The whole block without a span, of which a span keeps its rows and keys.
    whole = masks.s2d2_mask(block)
    assert torch.equal(whole, masks.s2d2_mask(block, range(block)))
    kept = torch.tensor([*range(block), *(block + i for i in span)])
    assert torch.equal(whole[kept][:, kept], masks.s2d2_mask(block, span))


@given(st.integers(1, 8), st.integers(1, 8))
def test_causal_and_candidates(block: int, count: int) -> None:
    size = block * count
    canvas = [[i // block == j // block for j in range(size)] for i in range(size)]
    assert masks.candidates_mask(block, count).tolist() == canvas
    causal = [[j <= i for j in range(size)] for i in range(size)]
    assert masks.causal_mask(size).tolist() == causal


@given(st.integers(1, 6), st.integers(1, 7))
def test_tidar(draft: int, groups: int) -> None:
    rows = [(-1, i) for i in range(draft)]
    rows += [(group, i) for group in range(groups) for i in range(draft)]
    expected = [
        [
            (j <= i if group < 0 else j < group) if seen < 0 else seen == group
            for seen, j in rows
        ]
        for group, i in rows
    ]
    assert masks.tidar_mask(draft, groups).tolist() == expected


@given(st.lists(st.integers(0, 70), max_size=4))
def test_packing_is_undone(widths: list[int]) -> None:
    windows = [torch.rand(width, width) < 0.5 for width in widths]
    packed = masks.pack_masks(windows)
    assert packed.dtype == torch.int32
    assert packed.shape == (sum(widths), -(-max(widths, default=0) // 32))
    first = 0
    for window in windows:
        rows = packed[first : first + len(window)]
        assert torch.equal(masks.unpack_mask(rows, len(window)), window)
        first += len(window)


def test_bits_of_a_mask() -> None:
    window = torch.zeros(34, 34, dtype=torch.bool)
    window[0, 0] = window[0, 5] = window[1, 31] = window[2, 33] = True
    packed = masks.pack_masks([window])
    assert packed[:4].tolist() == [[33, 0], [-(2**31), 0], [0, 2], [0, 0]]


class Network:
    """A decoder with rotary positions, grouped heads and random weights."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=random) / rows**0.5

        self.embedding = torch.randn(VOCAB, HIDDEN, generator=random)
        self.projections = [
            matrix(HIDDEN, (HEADS + 2 * KV_HEADS) * DIM) for _ in range(LAYERS)
        ]
        self.outputs = [matrix(HEADS * DIM, HIDDEN) for _ in range(LAYERS)]

    def __call__(
        self, ids: list[int], positions: list[int], attend: Attention
    ) -> torch.Tensor:
        """Hidden states [rows, HIDDEN] after the last layer."""
        angle = torch.tensor(positions)[:, None] / 10 ** torch.arange(DIM // 2)
        turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
        x = self.embedding[ids]
        for layer in range(LAYERS):
            qkv = (x / x.norm(dim=1, keepdim=True) * HIDDEN**0.5) @ self.projections[
                layer
            ]
            heads = qkv.view(len(ids), HEADS + 2 * KV_HEADS, DIM)
            turned = heads[:, : HEADS + KV_HEADS].unflatten(2, (-1, 2))
            turned = torch.view_as_real(
                torch.view_as_complex(turned.contiguous()) * turn
            ).flatten(2)
            query, key = turned.split([HEADS, KV_HEADS], dim=1)
            mixed = attend(layer, query, key, heads[:, HEADS + KV_HEADS :])
            x = x + mixed.flatten(1) @ self.outputs[layer]
        return x


def dense(mask: torch.Tensor, kept: list[Any] | None = None) -> Attention:
    """Attention among all rows; keys and values of the layers go to `kept`."""

    def attend(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        if kept is not None:
            kept.append((key, value))
        q, k, v = (t.transpose(0, 1) for t in (query, key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, enable_gqa=True
        )
        return mixed[0].transpose(0, 1)

    return attend


class Prefilled:
    """A network with a prompt in its pages, prefilled causally."""

    def __init__(self, seed: int) -> None:
        self.network = Network(seed)
        random = torch.Generator().manual_seed(seed)
        self.prompt = torch.randint(MASK_ID, (21,), generator=random).tolist()
        self.draft = torch.randint(MASK_ID, (12,), generator=random).tolist()
        kept: list[Any] = []
        length = len(self.prompt)
        self.network(
            self.prompt, list(range(length)), dense(masks.causal_mask(length), kept)
        )
        self.table = torch.tensor([[4, 1]], dtype=torch.int32)
        position = torch.arange(length)
        slots = self.table[0, position // PAGE].long() * PAGE + position % PAGE
        shape = LAYERS, 5, PAGE, KV_HEADS, DIM
        self.caches = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        for layer, (key, value) in enumerate(kept):
            write_kept(key, value, *self.pages(layer), slots)

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.caches[0][layer], self.caches[1][layer]

    def forward(
        self, ids: list[int], offsets: list[int], mask: torch.Tensor
    ) -> torch.Tensor:
        """Live rows at positions that far behind the prompt, under a mask."""

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            return window_attention(
                query,
                key,
                value,
                *self.pages(layer),
                self.table,
                torch.tensor([len(self.prompt)], dtype=torch.int32),
                torch.tensor([0, len(ids)], dtype=torch.int32),
                masks.pack_masks([mask]),
                len(ids),
                DIM**-0.5,
            )

        return self.network(ids, [len(self.prompt) + i for i in offsets], attend)

    def alone(self, ids: list[int], bidirectional: int) -> torch.Tensor:
        """Prompt and ids in one dense causal run, but for a last part that sees itself.

        Returns:
            Hidden states of `ids`.
        """
        everything = self.prompt + ids
        mask = masks.causal_mask(len(everything))
        if bidirectional:
            mask[-bidirectional:, -bidirectional:] = True
        hidden = self.network(everything, list(range(len(everything))), dense(mask))
        return hidden[len(self.prompt) :]


@pytest.mark.parametrize("seed", range(3))
def test_s2d2_is_the_token_by_token_run(seed: int) -> None:
    """What a model with blocks of one position would predict, one row at a time."""
    model = Prefilled(seed)
    block = len(model.draft)
    expected = torch.stack(
        [model.alone([*model.draft[:i], MASK_ID], 0)[-1] for i in range(block)]
    )
    ids, offsets = model.draft + [MASK_ID] * block, 2 * list(range(block))
    whole = model.forward(ids, offsets, masks.s2d2_mask(block))
    torch.testing.assert_close(whole[block:], expected, **EXACT)
    span = range(3, 9)
    ids, offsets = model.draft + [MASK_ID] * len(span), [*range(block), *span]
    some = model.forward(ids, offsets, masks.s2d2_mask(block, span))
    torch.testing.assert_close(some[block:], expected[span.start : span.stop], **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_candidates_are_canvases_forwarded_alone(seed: int) -> None:
    model = Prefilled(seed)
    block, count = 4, 3
    canvases = [
        model.draft[: k + 1] + [MASK_ID] * (block - k - 1) for k in range(count)
    ]
    together = model.forward(
        sum(canvases, []),
        count * list(range(block)),
        masks.candidates_mask(block, count),
    )
    alone = torch.cat([model.alone(canvas, block) for canvas in canvases])
    torch.testing.assert_close(together, alone, **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_tidar_groups_are_drafts_after_what_was_accepted(seed: int) -> None:
    model = Prefilled(seed)
    draft = model.draft[:3]
    offsets = [0, 1, 2] + [a + i for a in range(4) for i in range(3)]
    ids = draft + [MASK_ID] * 12
    rows = model.forward(ids, offsets, masks.tidar_mask(3, 4))
    torch.testing.assert_close(rows[:3], model.alone(draft, 0), **EXACT)
    for accepted in range(4):
        alone = model.alone(draft[:accepted] + [MASK_ID] * 3, 3)[accepted:]
        group = rows[3 * (1 + accepted) :][:3]
        torch.testing.assert_close(group, alone, **EXACT)
