# SPDX-License-Identifier: Apache-2.0
"""Window attention against its definition, and the equalities that it is made for.

Run as a script under TRITON_INTERPRET=1, this file tests the Triton kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_compilation import interpret

from vllm_unmask.kernels.window_attention import (
    masks,
    reference,
    window_attention,
    write_kept,
)

NAN = float("nan")
# Half types: the result is rounded once, and the Triton kernel rounds the weights.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}
LAYOUTS = ("nhd", "flash", "cpu")


class Case(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    prefix_lens: torch.Tensor
    cu_rows: torch.Tensor
    mask: torch.Tensor
    max_window: int
    scale: float


def cache_views(layout: str, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [pages, page, heads, dim] of kv [pages, heads, page, 2 * dim]."""
    pages, heads, page, dim = *kv.shape[:3], kv.shape[3] // 2
    if layout == "flash":
        keys, values = kv.transpose(1, 2).split(dim, -1)
    elif layout == "cpu":
        keys, values = kv.view(pages, heads, 2, page * dim).unbind(2)
        keys = keys.view(pages, heads, dim, page).permute(0, 3, 1, 2)
        values = values.view(pages, heads, page, dim).transpose(1, 2)
    else:
        keys, values = kv.view(2, pages, page, heads, dim)
    return keys, values


def empty_caches(
    layout: str, pages: int, page: int, heads: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return cache_views(
        layout, torch.full((pages, heads, page, 2 * dim), NAN, dtype=dtype)
    )


def make_case(
    prefixes: Sequence[int],
    window_masks: Sequence[torch.Tensor],
    *,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 16,
    page: int = 16,
    layout: str = "nhd",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random tensors of which everything that must not be read is poison."""
    random = torch.Generator().manual_seed(seed)
    widths = [len(mask) for mask in window_masks]
    cu_rows = torch.tensor([2, *widths]).cumsum(0).int()
    rows = int(cu_rows[-1]) + 3
    counts = [-(-max(prefix, 0) // page) for prefix in prefixes]
    pages = sum(counts) + 2
    order = torch.randperm(pages, generator=random).int()
    table = torch.full((len(prefixes), max(counts) + 1), 2**30, dtype=torch.int32)
    caches = empty_caches(layout, pages, page, kv_heads, dim, dtype)
    for i, (prefix, count) in enumerate(zip(prefixes, counts, strict=True)):
        table[i, :count], order = order[:count], order[count:]
        for position in range(prefix):
            for cache in caches:
                cache[table[i, position // page], position % page] = torch.randn(
                    kv_heads, dim, generator=random
                )
    live = torch.full((rows, kv_heads * (group + 2), dim), NAN, dtype=dtype)
    live[2:-3] = torch.randn(live[2:-3].shape, generator=random)
    query, key, value = live.split([kv_heads * group, kv_heads, kv_heads], dim=1)
    mask = torch.full((rows, -(-max(widths) // 32) + 1), -1, dtype=torch.int32)
    mask[2:-3, :-1] = masks.pack_masks(window_masks)
    # Bits past a window are ignored.
    for i, width in enumerate(widths):
        if width % 32:
            mask[cu_rows[i] : cu_rows[i + 1], width // 32] |= -1 << width % 32
    return Case(
        query,
        key,
        value,
        *caches,
        table,
        torch.tensor(prefixes, dtype=torch.int32),
        cu_rows,
        mask,
        max(w for w, prefix in zip(widths, prefixes, strict=True) if prefix >= 0),
        dim**-0.5,
    )


def random_masks(widths: Sequence[int], density: float = 0.5) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(sum(widths))
    return [torch.rand(w, w, generator=random) < density for w in widths]


def check(case: Case, run: Callable[..., Any] = window_attention) -> torch.Tensor:
    """Compare with the definition, from poisoned outputs; return the result."""
    expected = torch.full(case.query.shape, NAN, dtype=case.query.dtype)
    ours = expected.clone()
    reference.window_attention(*case, expected)
    run(*case, ours)
    torch.testing.assert_close(
        ours, expected, equal_nan=True, **TOLERANCE[case.query.dtype]
    )
    bounds = zip(case.cu_rows.tolist(), case.cu_rows[1:].tolist(), strict=False)
    written = torch.zeros(len(ours), dtype=torch.bool)
    for prefix, (first, end) in zip(case.prefix_lens.tolist(), bounds, strict=True):
        written[first:end] = prefix >= 0
    assert ours[written].isfinite().all()
    assert ours[~written].isnan().all()
    return ours


def check_holes(
    layout: str,
    page: int,
    run: Callable[..., Any] = window_attention,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A cache with holes, which are poison, gives what it gives without them."""
    prefixes = [0, 5, 40, -1, 64, 17, 50, 33]
    holes = torch.tensor(
        [[0, 9], [2, 1], [40, 7], [3, 3], [32, 32], [1, 70], [0, 5], [32, 0]]
    ).int()
    windows = random_masks([3, 8, 1, 9, 33, 5, 20, 4])
    packed = make_case(prefixes, windows, page=page, layout=layout, dtype=dtype)
    expected = check(packed)
    counts = [-(-(prefix + 70) // page) for prefix in prefixes]
    table = torch.full((len(prefixes), max(counts)), 2**30, dtype=torch.int32)
    caches = empty_caches(layout, sum(counts), page, 2, 16, dtype)
    pages = torch.arange(sum(counts)).flip(0).int().split(counts)
    for i, prefix in enumerate(prefixes):
        first, length = holes[i].tolist()
        table[i, : counts[i]] = pages[i]
        for p in range(prefix):
            q = p + length if p >= first else p
            place = packed.block_table[i, p // page], p % page
            for old, new in zip(packed[3:5], caches, strict=True):
                new[table[i, q // page], q % page] = old[place]
        # Entries past what is seen are not read.
        end = max(prefix, 0) + length * (first < prefix)
        table[i, -(-end // page) :] = 2**30
    case = packed._replace(
        key_cache=caches[0], value_cache=caches[1], block_table=table
    )
    ours = torch.full_like(expected, NAN)
    run(*case, ours, holes)
    torch.testing.assert_close(ours, expected, equal_nan=True, **TOLERANCE[dtype])


@pytest.mark.parametrize("run", [window_attention, reference.window_attention])
@pytest.mark.parametrize("page", [1, 16, 48])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_holes(layout: str, page: int, run: Callable[..., Any]) -> None:
    check_holes(layout, page, run)


@pytest.mark.parametrize("run", [window_attention, reference.window_attention])
def test_rows_of_the_mask_may_share_their_memory(run: Callable[..., Any]) -> None:
    case = make_case([0, 19], [torch.ones(n, n).bool() for n in (40, 3)])
    shared = torch.full((2,), -1, dtype=torch.int32).expand(len(case.mask), 2)
    ours = torch.full_like(case.query, NAN)
    run(*case._replace(mask=shared), ours)
    torch.testing.assert_close(ours, check(case), equal_nan=True)


@pytest.mark.parametrize("group", [1, 4, 8])
def test_definition_is_the_plain_loop(group: int) -> None:
    windows = random_masks([3, 5])
    case = make_case([0, 19], windows, group=group)
    expected = torch.full(case.query.shape, NAN, dtype=torch.float32)
    reference.window_attention(*case, expected)
    for request, window in enumerate(windows):
        first, prefix = int(case.cu_rows[request]), int(case.prefix_lens[request])
        for i, head in torch.cartesian_prod(
            torch.arange(len(window)), torch.arange(2 * group)
        ).tolist():
            kv = head // group
            seen = []
            for p in range(prefix):
                place = int(case.block_table[request, p // 16]), p % 16, kv
                seen.append((case.key_cache[place], case.value_cache[place]))
            for j in range(len(window)):
                if window[i, j]:
                    seen.append((case.key[first + j, kv], case.value[first + j, kv]))
            weights = [
                torch.exp(case.query[first + i, head].double() @ k.double() / 4)
                for k, _ in seen
            ]
            mixed = torch.zeros(16, dtype=torch.float64)
            for weight, (_, v) in zip(weights, seen, strict=True):
                mixed += weight / sum(weights) * v.double()
            torch.testing.assert_close(expected[first + i, head], mixed.float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group", [1, 4, 8])
def test_many_requests_of_different_windows(
    layout: str, dtype: torch.dtype, group: int
) -> None:
    """Page borders, partial pages, less than a page, no prefix, skipped, no rows."""
    prefixes = [0, 1, 15, 16, 17, 32, 45, -1, 70, 9]
    windows = random_masks([4, 1, 8, 33, 64, 65, 2, 99, 16, 0])
    check(make_case(prefixes, windows, group=group, layout=layout, dtype=dtype))


@given(
    st.lists(
        st.tuples(st.integers(-1, 40), st.integers(0, 40)), min_size=1, max_size=5
    ),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40)),
    st.sampled_from([1, 7, 16, 64]),
    st.sampled_from(LAYOUTS),
)
@settings(max_examples=40)
def test_any_shape(
    requests: list[tuple[int, int]],
    density: float,
    sizes: tuple[int, int, int],
    page: int,
    layout: str,
) -> None:
    prefixes, widths = zip(*requests, strict=True)
    kv_heads, group, dim = sizes
    if max(prefixes) < 0:
        return
    windows = random_masks(widths, density)
    check(
        make_case(
            prefixes,
            windows,
            kv_heads=kv_heads,
            group=group,
            dim=dim,
            page=page,
            layout=layout,
        )
    )


def test_row_that_sees_nothing_gives_zero() -> None:
    window = torch.tensor([[0, 0], [1, 0]]).bool()
    result = check(make_case([0, 3], [window, window]))
    assert not result[2].any()
    assert result[3:6].any(dim=2).all()


def test_nothing_to_do() -> None:
    case = make_case([4], [masks.causal_mask(3)])
    skipped = case._replace(prefix_lens=case.prefix_lens - 9, max_window=0)
    assert check(skipped).isnan().all()
    nobody = case._replace(prefix_lens=case.prefix_lens[:0], cu_rows=case.cu_rows[:1])
    assert check(nobody).isnan().all()


def test_default_dtype_does_not_matter() -> None:
    """vLLM sets it to the model's while it makes one."""
    case = make_case([40], [masks.s2d2_mask(8)])
    try:
        torch.set_default_dtype(torch.bfloat16)
        check(case)
    finally:
        torch.set_default_dtype(torch.float32)


def test_misfits_are_refused() -> None:
    case = make_case([4], [masks.causal_mask(3)])
    for wrong, message in (
        ({"query": case.query[:, :3]}, "3 query heads cannot share 2 KV heads"),
        ({"value": case.value[1:]}, r"value is \(7, 2, 16\), expected \(8, 2, 16\)"),
        ({"key": case.key.half()}, "key is torch.float16, query is torch.float32"),
        ({"key_cache": case.key_cache[..., 1:]}, r"key_cache is \(3, 16, 2, 15\)"),
        ({"mask": case.mask.long()}, "mask is torch.int64"),
        ({"max_window": 65}, r"mask is torch.int32 \(8, 2\), .* 65 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            window_attention(*case._replace(**wrong))
    with pytest.raises(ValueError, match=r"out is \(8, 4, 15\)"):
        window_attention(*case, case.query[..., 1:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_kept_rows_are_written(
    layout: str, run: Callable[..., Any] = write_kept
) -> None:
    caches = empty_caches(layout, 3, 16, 2, 20, torch.bfloat16)
    key, value = torch.randn(2, 5, 2, 20).bfloat16()
    slots = torch.tensor([17, -1, 0, 47, -1])
    run(key, value, *caches, slots)
    for cache, rows in zip(caches, (key, value), strict=True):
        expected = torch.full((48, 2, 20), NAN, dtype=torch.bfloat16)
        expected[17], expected[0], expected[47] = rows[0], rows[2], rows[3]
        assert cache.reshape(48, 2, 20).allclose(expected, 0, 0, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_pages_of_the_cpu_backend_are_read_through_the_view(dtype: torch.dtype) -> None:
    ops = pytest.importorskip("vllm._custom_ops")
    pages, heads, page, dim = 3, 2, 32, 64
    key, value = torch.randn(2, pages * page, heads, dim).to(dtype)
    kv = torch.zeros(pages, heads, page, 2 * dim, dtype=dtype)
    # As `CPUAttentionBackendImpl.do_kv_cache_update` does it.
    raw = kv.view(pages, heads, 2 * page, dim).chunk(2, dim=2)
    slots = torch.randperm(pages * page)
    ops.cpu_attn_reshape_and_cache(key, value, *raw, slots, "vec")
    keys, values = cache_views("cpu", kv)
    assert torch.equal(keys[slots // page, slots % page], key)
    assert torch.equal(values[slots // page, slots % page], value)


def test_triton_in_the_interpreter() -> None:
    interpret(__file__)


def interpret_triton() -> None:
    import numpy as np
    from triton.runtime import interpreter

    from vllm_unmask.kernels.window_attention import triton, triton_write

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """Triton 3.9's interpreter multiplies the bit patterns of bfloat16."""
        if a.dtype.name == "bf16":
            a, b = (
                interpreter.TensorHandle(
                    (x.data.astype(np.uint32) << 16).view(np.float32),
                    interpreter.tl.float32,
                )
                for x in (a, b)
            )
        return multiply(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
    prefixes = [0, 5, 40, -1, 64, 17, 130]
    windows = random_masks([3, 8, 1, 99, 33, 0, 20])
    sizes = ((1, 8, 64), (2, 4, 80), (3, 1, 96), (2, 3, 128), (1, 2, 256))
    for i, (kv_heads, group, dim) in enumerate(sizes):
        for dtype in TOLERANCE:
            case = make_case(
                prefixes,
                windows,
                kv_heads=kv_heads,
                group=group,
                dim=dim,
                page=(16, 32, 48, 128)[i % 4],
                layout=LAYOUTS[i % 3],
                dtype=dtype,
                seed=i,
            )
            check(case, triton.window_attention)
    for page in (1, 16, 48):
        check_holes("flash", page, triton.window_attention)
    check_holes("nhd", 16, triton.window_attention, torch.bfloat16)
    test_rows_of_the_mask_may_share_their_memory(triton.window_attention)
    nothing = make_case([0, 3], [torch.zeros(2, 2, dtype=torch.bool)] * 2)
    assert not check(nothing, triton.window_attention)[2:4].any()
    for layout in LAYOUTS:
        test_only_kept_rows_are_written(layout, triton_write.write_kept)


if __name__ == "__main__":
    interpret_triton()
