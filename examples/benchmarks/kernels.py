# SPDX-License-Identifier: Apache-2.0
"""What the operators of `vllm_unmask.kernels` take, beside their definitions in torch.

    row_stats   best token, lead, entropy and a sample of each row of logits; sampled
                rows also by vLLM's own sampler of DiffusionGemma, which gives best
                token, sample and entropy
    window      rows in windows over a paged prefix, against torch's own
                `scaled_dot_product_attention` on a contiguous copy of the same keys

`bytes` are those that the operator has to read once; `bandwidth_share` is the time of
reading as many bytes with a plain sum, in the same run, over ours. On a machine with a
CUDA device the same rows are measured there. Everything is measured in turns in one
process; the numbers are medians.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

HERE = Path(__file__).resolve().parent
# Not a package: the tests import this file by its path.
sys.path[:0] = [str(HERE)]

from machine import cpu_name, load_average, say, surroundings  # noqa: E402

from vllm_unmask.kernels.row_statistics import (  # noqa: E402
    NO_CONSTRAINTS,
    Sampling,
    reference,
    row_statistics,
)
from vllm_unmask.kernels.window_attention import window_attention  # noqa: E402
from vllm_unmask.kernels.window_attention.masks import (  # noqa: E402
    candidates_mask,
    pack_masks,
)

Work = Callable[[], Any]


class Case(NamedTuple):
    """One row of the result."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    reference: Work
    ours: Work
    read: Work  # reads as many bytes
    vllm: Work | None = None  # vLLM's own sampler of DiffusionGemma


def row_stats(rows: int, vocab: int, dtype: torch.dtype, sampled: bool) -> Case:
    """Statistics of random logits; the sample is drawn without truncation."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=random).mul_(4).to(dtype).to(device)
    sampling = None
    if sampled:
        draws = torch.rand(rows, generator=random, dtype=torch.float64)
        sampling = Sampling(torch.ones(rows, device=device), draws.to(device))
    # 16 temperatures, as of 16 canvases.
    canvas = rows // 16 or 1
    temperatures = torch.ones(-(-rows // canvas), device=device)
    integers = logits.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    return Case(
        "row_stats_sampled" if sampled else "row_stats",
        (rows, vocab),
        str(dtype).removeprefix("torch."),
        logits.numel() * dtype.itemsize,
        lambda: reference.row_statistics(logits, sampling, NO_CONSTRAINTS),
        lambda: row_statistics(logits, sampling),
        lambda: integers.amax(),
        (lambda: _diffusion_gemma(logits, temperatures, canvas)) if sampled else None,
    )


def _diffusion_gemma(
    logits: torch.Tensor, temperatures: torch.Tensor, canvas: int
) -> Any:
    """The same of vLLM: a kernel on a GPU, torch on a CPU."""
    # Here, because transformers takes any module called `kernels` for a library that it
    # can use, and imports this file while vLLM's own import is under way.
    from vllm.model_executor.models.diffusion_gemma_sampler import (
        sample_row_stats,
        sample_row_stats_reference,
    )

    if logits.is_cuda:
        return sample_row_stats(logits, temperatures, canvas, 0, None)
    return sample_row_stats_reference(logits, temperatures, canvas, None)


def window(requests: int, prefix: int, block: int, count: int) -> Case:
    """Candidates of several requests behind prefixes of equal length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    heads, kv_heads, dim, page = 8, 2, 64, 32
    random = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(dtype).to(device)

    width, pages = block * count, -(-prefix // page)
    rows = requests * width
    query, key, value = (tensor(rows, n, dim) for n in (heads, kv_heads, kv_heads))
    caches = [tensor(requests * pages, page, kv_heads, dim) for _ in range(2)]
    table = torch.arange(requests * pages, dtype=torch.int32, device=device)
    table = table.view(requests, pages)
    lens = torch.full((requests,), prefix, dtype=torch.int32, device=device)
    cu_rows = torch.arange(requests + 1, dtype=torch.int32, device=device) * width
    mask = candidates_mask(block, count)
    packed = pack_masks([mask] * requests).to(device)
    out = torch.empty_like(query)
    seen = torch.cat((torch.ones(width, prefix, dtype=torch.bool), mask), 1).to(device)

    def whole(cache: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        kept = cache.view(requests, pages * page, kv_heads, dim)[:, :prefix]
        both = torch.cat((kept, live.view(requests, width, kv_heads, dim)), 1)
        return both.repeat_interleave(heads // kv_heads, 2).transpose(1, 2).contiguous()

    keys, values = whole(caches[0], key), whole(caches[1], value)
    queries = query.view(requests, width, heads, dim).transpose(1, 2).contiguous()
    return Case(
        "window",
        (requests, prefix, block, count),
        str(dtype).removeprefix("torch."),
        2 * requests * prefix * kv_heads * dim * dtype.itemsize,
        lambda: scaled_dot_product_attention(queries, keys, values, attn_mask=seen),
        lambda: window_attention(
            query, key, value, *caches, table, lens, cu_rows, packed, width,
            dim**-0.5, out,
        ),
        lambda: [cache.amax() for cache in caches],
    )  # fmt: skip


def cases(quick: bool) -> list[Case]:
    """All of them; the large ones take some seconds in their reference."""
    half = torch.bfloat16
    shapes = [(256, 151_936, half), (8, 512, torch.float32)]
    if not quick:
        shapes += [(256, 151_936, dtype) for dtype in (torch.float16, torch.float32)]
        shapes += [(32, 151_936, half), (128, 512, half)]
    found = [
        row_stats(*shape, sampled) for shape in shapes for sampled in (False, True)
    ]
    windows = [(1, 512, 8, 16), (8, 1024, 32, 4)]
    if not quick:
        windows += [(1, 128, 4, 16), (16, 2048, 32, 4)]
    return found + [window(*shape) for shape in windows]


def milliseconds(work: Work) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """A row of the result."""
    works = {"reference": case.reference, "ours": case.ours, "read": case.read}
    if case.vllm is not None:
        works["vllm"] = case.vllm
    times: dict[str, list[float]] = {name: [] for name in works}
    case.ours()
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(milliseconds(work))
    medians = {name: median(values) for name, values in times.items()}
    ours = medians["ours"]
    say(f"{case.op} {case.shape} {case.dtype}")
    return {
        "op": case.op,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "reference_ms": medians["reference"],
        "vllm_ms": medians.get("vllm"),
        "ours_ms": ours,
        "ratio": medians["reference"] / ours,
        "bytes": case.bytes,
        "bandwidth_share": medians["read"] / ours,
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'op':<18} {'shape':<20} {'dtype':<9} {'torch ms':>9} {'vLLM ms':>9} "
    head += f"{'ours ms':>9} "
    lines = [head + f"{'ratio':>7} {'of reading':>10}"]
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        vllm = "" if row["vllm_ms"] is None else f"{row['vllm_ms']:.2f}"
        lines.append(
            f"{row['op']:<18} {shape:<20} {row['dtype']:<9} {row['reference_ms']:9.2f}"
            f" {vllm:>9} {row['ours_ms']:9.2f} {row['ratio']:7.1f}"
            f" {row['bandwidth_share']:10.2f}"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--repeats", type=int, help="default 7, or 3 with --quick")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    repeats = args.repeats or (3 if args.quick else 7)
    load = load_average()
    try:
        rows = [measure(case, repeats) for case in cases(args.quick)]
    finally:
        torch.set_num_threads(before)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    environment = surroundings(
        load, device=device, threads=args.threads, repeats=repeats
    )
    if args.json:
        result = {"rows": rows, "environment": environment}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
