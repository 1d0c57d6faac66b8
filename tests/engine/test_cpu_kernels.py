# SPDX-License-Identifier: Apache-2.0
"""Check the CPU kernels against vLLM's Triton kernels run by Triton's interpreter.

The interpreter and vLLM's own Triton detection are process-wide, so this file is
also a script. A child process builds the same cases, launches them, and pickles
what memory holds afterwards:

* `triton`: vLLM's kernels under `TRITON_INTERPRET=1`, the reference;
* `registered`: vLLM with `register_cpu_kernels()` in force.

Every buffer lies between guards and starts full of a sentinel, and comparisons
are over whole storages: a kernel that writes one element too many fails.
"""

import dataclasses
import functools
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_unmask.engine import cpu_kernels
from vllm_unmask.engine.cpu_kernels import CPU_KERNELS, register_cpu_kernels

GUARD = 16
SENTINEL = -77
PAD = -1
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1

BUFFERS = "vllm.v1.worker.gpu.buffer_utils."
TABLES = "vllm.v1.worker.gpu.block_table."
INPUTS = "vllm.v1.worker.gpu.input_batch."
BIAS = "vllm.v1.worker.gpu.sample.logit_bias."
LOGPROB = "vllm.v1.worker.gpu.sample.logprob."

# Same operations in another order of summation: float32 rounding.
FLOAT_TOLERANCES = {LOGPROB + "_topk_log_softmax_kernel": 3e-6}

Snapshot = list[torch.Tensor]


@dataclasses.dataclass
class Addresses:
    """A uint64 tensor of the data_ptr values of these tensors."""

    tensors: list[torch.Tensor]


@dataclasses.dataclass
class Case:
    """One launch: `kernel[grid](*args, **constexprs)`."""

    name: str
    grid: tuple[int, ...]
    args: list[Any]
    constexprs: dict[str, Any]

    def launch(self, kernel: Callable[..., Any]) -> Snapshot:
        """Launch and return every storage the launch could reach."""
        tensors: list[torch.Tensor] = []
        values = []
        for arg in self.args:
            if isinstance(arg, Addresses):
                tensors += arg.tensors
                pointers = [tensor.data_ptr() for tensor in arg.tensors]
                values.append(torch.tensor(pointers, dtype=torch.uint64))
            else:
                if isinstance(arg, torch.Tensor):
                    tensors.append(arg)
                values.append(arg)
        kernel(*values, **self.constexprs)
        return [_storage(tensor) for tensor in tensors]


def _storage(tensor: torch.Tensor) -> torch.Tensor:
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((size,), (1,), 0).clone()


def _buffer(
    *shape: int, dtype: torch.dtype = torch.int32, row_padding: int = 0
) -> torch.Tensor:
    """A sentinel-filled tensor between guards, its rows `row_padding` apart."""
    stride = shape[-1] + row_padding
    rows = int(np.prod(shape[:-1]))
    fill = True if dtype == torch.bool else SENTINEL
    memory = torch.full((rows * stride + 2 * GUARD,), fill, dtype=dtype)
    strides = (stride, 1) if len(shape) == 2 else (1,)
    return memory.as_strided(shape, strides, GUARD)


def _filled(
    values: Any, dtype: torch.dtype = torch.int32, row_padding: int = 0
) -> torch.Tensor:
    """A guarded tensor holding `values`."""
    source = torch.as_tensor(np.asarray(values)).to(dtype)
    tensor = _buffer(*source.shape, dtype=dtype, row_padding=row_padding)
    return tensor.copy_(source)


def _bounds(lengths: Any, start: int = 0) -> np.ndarray:
    return np.concatenate([[start], start + np.cumsum(lengths)]).astype(np.int64)


def _slots(rng: np.random.Generator, num_reqs: int, max_num_reqs: int) -> np.ndarray:
    """Distinct request slots in batch order."""
    return rng.permutation(max_num_reqs)[:num_reqs]


# Query lengths per request: one request, decode only, blocks only, ragged with
# empty rows, a long prefill among decodes, one launch block exactly.
BATCHES: dict[str, list[int]] = {
    "one": [5],
    "decode": [1] * 9,
    "blocks": [32] * 4,
    "ragged": [3, 0, 17, 1, 0, 64, 2],
    "mixed": [1, 1030, 1, 32, 7],
    "launch block": [1024, 1],
    "empty": [],
}


def _apply_write_cases() -> Iterator[Case]:
    rng = np.random.default_rng(1)
    limits = {
        torch.int32: [-(2**31), INT32_MAX, 0, -1],
        torch.int64: [-(2**63), INT64_MAX, 0, -1],
        torch.float32: [np.inf, -np.inf, 0.0, 1e-40],
    }
    for dtype, edges in limits.items():
        for lengths in ([1], [1] * 7, [2, 1300, 1, 5, 1024], []):
            total = int(np.sum(lengths, dtype=np.int64))
            contents = (rng.integers(0, 1000, total).tolist() + edges)[-total:]
            contents = contents if total else []
            count = len(lengths)
            for padding in (0, 3):
                output = _buffer(9, 1400, dtype=dtype, row_padding=padding)
                yield Case(
                    f"{dtype} {lengths} padding {padding}",
                    (count,),
                    [
                        output,
                        output.stride(0),
                        _filled(_slots(rng, count, 9)),
                        _filled(rng.integers(0, 90, count)),
                        _filled(contents, dtype),
                        _filled(np.cumsum(lengths)),
                        None,
                    ],
                    {"BLOCK_SIZE": 1024, "MULTI_GROUP": False},
                )
    # Two writes to one row: the later one wins where they overlap.
    yield Case(
        "overlap",
        (3,),
        [
            _buffer(2, 8),
            8,
            _filled([1, 1, 1]),
            _filled([0, 2, 2]),
            _filled(range(1, 8)),
            _filled([4, 6, 7]),
            None,
        ],
        {"BLOCK_SIZE": 1024, "MULTI_GROUP": False},
    )
    for lengths in ([1, 0, 4, 1100, 2], [3]):
        tables = [_buffer(5, 1200), _buffer(5, 1110), _buffer(5, 1150)]
        count = len(lengths)
        yield Case(
            f"groups {lengths}",
            (count,),
            [
                Addresses(tables),
                _filled([1200, 1110, 1150], torch.int64),
                _filled(rng.integers(0, 5, count)),
                _filled(rng.integers(0, 10, count)),
                _filled(rng.integers(0, INT32_MAX, sum(lengths))),
                _filled(np.cumsum(lengths)),
                _filled([2, 0, 0, 1, 2][:count]),
            ],
            {"BLOCK_SIZE": 1024, "MULTI_GROUP": True},
        )


def _gather_cases() -> Iterator[Case]:
    rng = np.random.default_rng(2)
    for strides, num_reqs, padded, target_rows in (
        ([40], 1, 1, 8),
        ([40], 5, 5, 8),
        ([40, 1500], 5, 7, 8),
        ([40, 7, 3], 8, 8, 8),
        # Prefill context parallelism: a destination shorter than the source.
        ([40], 2, 4, 4),
        ([40], 0, 3, 8),
        ([40], 0, 0, 8),
    ):
        sources, targets, counts = [], [], []
        for stride in strides:
            sources.append(_filled(rng.integers(1, INT32_MAX, (8, stride))))
            targets.append(_buffer(target_rows, stride))
            count = rng.integers(0, stride + 1, 8)
            count[:2] = (0, stride)
            counts.append(rng.permutation(count))
        num_blocks = _filled(counts)
        yield Case(
            f"{strides} {num_reqs} of {padded}",
            (len(strides), padded),
            [
                _filled(_slots(rng, num_reqs, 8), torch.int64),
                Addresses(sources),
                Addresses(targets),
                _filled(strides, torch.int64),
                num_blocks,
                num_blocks.stride(0),
                num_reqs,
            ],
            {"BLOCK_SIZE": 1024},
        )


def _slot_mapping_cases() -> Iterator[Case]:
    rng = np.random.default_rng(3)
    variants: list[tuple[str, list[int], dict[str, Any]]] = []
    variants += [(batch, [16], {}) for batch in BATCHES]
    variants += [
        ("ragged", [16, 32, 128], {"enabled": [True, False, True]}),
        ("ragged", [16, 48], {"dummies": True}),
        ("decode", [16], {"dummies": True, "idx_dtype": torch.int32}),
        ("blocks", [16], {"all_dummies": True}),
        ("mixed", [16], {"positions": torch.int32}),
        ("mixed", [16], {"no_room": True}),
        ("blocks", [2**20], {"block_limit": 2**11}),
    ]
    for size, interleave, world, rank in (
        (16, 1, 2, 0),
        (16, 1, 2, 1),
        (16, 4, 3, 2),
        (16, 16, 4, 1),
        (24, 5, 2, 1),
    ):
        cp = {"cp": (world, rank, interleave)}
        variants.append(("ragged", [size], cp))
        variants.append(("mixed", [size, size], cp | {"sharded": [True, False]}))
        variants.append(("ragged", [size, 32], cp | {"dummies": True}))

    for batch, sizes, options in variants:
        lengths = BATCHES[batch]
        num_reqs, groups = len(lengths), len(sizes)
        start = 3 if batch == "ragged" else 0
        bounds = _bounds(lengths, start)
        num_tokens = int(bounds[-1])
        max_tokens = num_tokens + (0 if options.get("no_room") else 1100)
        requests = _slots(rng, num_reqs, 12)
        if options.get("dummies"):
            requests[::2] = -1
        if options.get("all_dummies"):
            requests[:] = -1
        positions = np.full(max_tokens, 10**6)
        for row, length in enumerate(lengths):
            first = int(rng.integers(0, 500))
            positions[bounds[row] : bounds[row + 1]] = first + np.arange(length)
        tables, strides = [], []
        for size in sizes:
            strides.append(1700 // size + 3)
            limit = options.get("block_limit", 5000)
            tables.append(_filled(rng.integers(0, limit, (12, strides[-1]))))
        world, rank, interleave = options.get("cp", (1, 0, 1))
        slots = _buffer(groups, max_tokens, dtype=torch.int64, row_padding=5)
        yield Case(
            f"{batch} {sizes} {options}",
            (groups, num_reqs + 1),
            [
                max_tokens,
                _filled(requests, options.get("idx_dtype", torch.int64)),
                _filled(bounds),
                _filled(positions, options.get("positions", torch.int64)),
                Addresses(tables),
                _filled(strides, torch.int64),
                _filled(sizes),
                _filled(options.get("enabled", [True] * groups), torch.bool),
                _filled(options.get("sharded", [True] * groups), torch.bool),
                slots,
                slots.stride(0),
                rank,
            ],
            {
                "CP_SIZE": world,
                "CP_INTERLEAVE": interleave,
                "PAD_ID": PAD,
                "TRITON_BLOCK_SIZE": 1024,
            },
        )


def _prefill_cases() -> Iterator[Case]:
    rng = np.random.default_rng(4)
    for batch, lengths in BATCHES.items():
        for lookahead in (1, 3):
            for idx_dtype in (torch.int64, torch.int32):
                num_reqs = len(lengths)
                requests = _slots(rng, num_reqs, 12)
                computed = rng.integers(0, 300, 12)
                prefill_lens = rng.integers(1, 1300, 12)
                for row, request in enumerate(requests):
                    # A chunk, the chunk that ends the prompt, one token before
                    # its end, decoding, and the first token of a decode.
                    after = computed[request] + lengths[row]
                    prefill_lens[request] = [
                        after + 9,
                        after,
                        after + 1,
                        computed[request] - 3,
                        computed[request],
                    ][row % 5]
                all_token_ids = _filled(rng.integers(0, INT32_MAX, (12, 1400)))
                next_tokens = _buffer(lookahead, 12, row_padding=2)
                yield Case(
                    f"{batch} lookahead {lookahead} {idx_dtype}",
                    (num_reqs,),
                    [
                        _buffer(sum(lengths) + 50),
                        next_tokens,
                        next_tokens.stride(0),
                        lookahead,
                        _filled(requests, idx_dtype),
                        _filled(_bounds(lengths)),
                        all_token_ids,
                        all_token_ids.stride(0),
                        _filled(prefill_lens),
                        _filled(computed),
                    ],
                    {
                        "BLOCK_SIZE": 1024,
                        "LOOKAHEAD_BLOCK": 1 << (lookahead - 1).bit_length(),
                    },
                )


def _pos_seq_lens_cases() -> Iterator[Case]:
    rng = np.random.default_rng(5)
    for batch, lengths in BATCHES.items():
        for start, spare in ((0, 3), (4, 0), (0, 1100)):
            num_reqs = len(lengths)
            max_num_reqs = num_reqs + spare
            computed = rng.integers(0, 10**6, max(12, max_num_reqs))
            computed[:2] = (0, INT32_MAX - 2000)
            total = start + sum(lengths)
            yield Case(
                f"{batch} start {start} spare {spare}",
                (num_reqs + 1,),
                [
                    _buffer(total + 10, dtype=torch.int64),
                    _buffer(max_num_reqs + 2),
                    _filled(_slots(rng, num_reqs, 12), torch.int64),
                    # Padded request rows follow the real ones.
                    _filled(np.append(_bounds(lengths, start), [total] * 2)),
                    _filled(computed),
                    max_num_reqs,
                ],
                {"BLOCK_SIZE": 1024},
            )


def _combine_cases() -> Iterator[Case]:
    rng = np.random.default_rng(6)
    for bonus in (0, 1):
        for num_steps in (1, 4, 32):
            for batch, lengths in BATCHES.items():
                num_reqs = len(lengths)
                room = np.asarray(lengths, dtype=np.int64)
                wanted = rng.integers(0, num_steps + 1, num_reqs)
                wanted[::3] = num_steps
                # Drafts are cut where the query is shorter; every row has its
                # bonus token, so rows without a token get one.
                room = np.maximum(room, bonus)
                num_logits = np.minimum(wanted + bonus, room)
                requests = _slots(rng, num_reqs, 12)
                seq_lens = room + rng.integers(0, 50, num_reqs)
                prefill_lens = rng.integers(0, 100, 12)
                for row, request in enumerate(requests):
                    # Inside the prompt, its end, one generated token, as many
                    # generated tokens as logits, one fewer, and plain decoding.
                    prefill_lens[request] = [
                        seq_lens[row] + 5,
                        seq_lens[row],
                        seq_lens[row] - 1,
                        seq_lens[row] - num_logits[row],
                        seq_lens[row] - num_logits[row] + 1,
                        0,
                    ][row % 6]
                drafts = _filled(
                    rng.integers(0, 2**40, (12, num_steps)),
                    torch.int64,
                    # Some draft buffers are wider than the drafts.
                    row_padding=2 if num_steps == 4 else 0,
                )
                yield Case(
                    f"bonus {bonus} steps {num_steps} {batch}",
                    (num_reqs,),
                    [
                        _buffer(int(room.sum()) + 9),
                        _filled(requests, torch.int64),
                        _filled(rng.integers(0, 2**40, (12, 1)), torch.int64),
                        _filled(_bounds(room)),
                        _filled(seq_lens),
                        _filled(prefill_lens),
                        drafts,
                        drafts.stride(0),
                        _filled(_bounds(num_logits)),
                        _buffer(int(num_logits.sum()) + 9, dtype=torch.int64),
                    ],
                    {
                        "NUM_NEW_SAMPLED_TOKENS": bonus,
                        "BLOCK_SIZE": 1 << (num_steps + bonus - 1).bit_length(),
                    },
                )


def _num_sampled_cases() -> Iterator[Case]:
    rng = np.random.default_rng(7)
    for num_reqs in (0, 1, 7, 64):
        for dtype in (torch.int32, torch.int64):
            requests = _slots(rng, num_reqs, 64)
            prefill_lens = rng.integers(1, 100, 64)
            seq_lens = prefill_lens[requests] + rng.integers(-1, 2, num_reqs)
            num_logits = rng.integers(0, 33, num_reqs)
            num_sampled = rng.integers(0, num_logits + 1)
            yield Case(
                f"{num_reqs} {dtype}",
                (num_reqs,),
                [
                    _filled(num_sampled, dtype),
                    _buffer(num_reqs + 3, dtype=dtype),
                    _filled(seq_lens),
                    _filled(_bounds(num_logits)),
                    _filled(requests, torch.int64),
                    _filled(prefill_lens),
                ],
                {},
            )


def _post_update_cases() -> Iterator[Case]:
    rng = np.random.default_rng(8)
    for num_reqs, width in ((0, 1), (1, 1), (1, 32), (9, 1), (9, 5), (16, 32)):
        for variant in ("all", "no queries", "no bins", "skips", "nothing sampled"):
            requests = _slots(rng, num_reqs, 20)
            if variant == "skips":
                requests[::2] = -1
            num_sampled = rng.integers(0, width + 1, num_reqs)
            num_sampled[: num_reqs // 2] = width
            if variant == "nothing sampled":
                num_sampled[:] = 0
            # Few distinct ids: most rows sample some id more than once.
            sampled = rng.integers(0, 4, (num_reqs, width))
            lengths = rng.integers(0, 40, num_reqs)
            rejected = rng.integers(0, 5, num_reqs)
            rejected[::4] = lengths[::4]
            sampled_tokens = _filled(sampled, torch.int64, row_padding=2)
            bins = _filled(rng.integers(0, 9, (20, 50)), row_padding=1)
            no_bins = variant == "no bins"
            no_queries = variant == "no queries"
            yield Case(
                f"{num_reqs} x {width} {variant}",
                (num_reqs,),
                [
                    _filled(requests, torch.int64),
                    _filled(rng.integers(0, 1000, 20)),
                    _buffer(20, 1, dtype=torch.int64),
                    None if no_bins else bins,
                    0 if no_bins else bins.stride(0),
                    sampled_tokens,
                    sampled_tokens.stride(0),
                    _filled(num_sampled),
                    _filled(rejected),
                    None if no_queries else _filled(_bounds(lengths)),
                    _buffer(20, 200),
                    200,
                    _filled(rng.integers(0, 200 - width, 20)),
                ],
                {"num_warps": 1},
            )
    # Ids that do not fit the int32 history, and a count at its limit.
    yield Case(
        "limits",
        (2,),
        [
            _filled([3, 0], torch.int32),
            _filled([7, 7, 7, INT32_MAX - 4]),
            _buffer(4, 1, dtype=torch.int64),
            None,
            0,
            _filled([[INT64_MAX, 2**31], [-1, INT32_MAX]], torch.int64),
            2,
            _filled([2, 2], torch.int64),
            _filled([0, 9]),
            _filled([0, 4, 8]),
            _buffer(4, 10),
            10,
            _filled([0, 7, 7, 8]),
        ],
        {"num_warps": 1},
    )


def _num_computed_cases() -> Iterator[Case]:
    rng = np.random.default_rng(9)
    for batch, lengths in BATCHES.items():
        for dtype in (torch.int32, torch.int64):
            yield Case(
                f"{batch} {dtype}",
                (len(lengths),),
                [
                    _filled(_slots(rng, len(lengths), 12), dtype),
                    _filled(rng.integers(0, 10**6, 12)),
                    _filled(_bounds(lengths)),
                ],
                {},
            )


def _expand_cases() -> Iterator[Case]:
    rng = np.random.default_rng(10)
    for batch in ("one", "decode", "blocks", "ragged", "empty"):
        for dtype in (torch.int32, torch.int64):
            for start in (0, 2):
                lengths = BATCHES[batch]
                total = start + sum(lengths) + 5
                yield Case(
                    f"{batch} {dtype} start {start}",
                    (len(lengths),),
                    [
                        _filled(_slots(rng, len(lengths), 12), dtype),
                        _buffer(total, dtype=dtype),
                        _buffer(total),
                        _filled(_bounds(lengths, start)),
                    ],
                    {"BLOCK_SIZE": 64},
                )


def _bias_cases() -> Iterator[Case]:
    rng = np.random.default_rng(11)
    vocab, num_slots = 150, 16
    for num_tokens in (0, 1, 40):
        for check in (False, True):
            for padding in (0, 6):
                requests = rng.integers(0, num_slots, num_tokens)
                requests[:num_slots] = np.arange(num_slots)[:num_tokens]
                logits = rng.normal(size=(num_tokens, vocab)).astype(np.float32)
                logits[logits > 2] = -np.inf
                logits[logits < -2.2] = np.nan
                logits[:, 7] = np.inf
                # Odd rows belong to slots that restore masked-out stop ids. In
                # most of them only the stop ids 0..4 are left: all of them, with
                # a NaN elsewhere, or with infinite ones among them.
                left = np.arange(num_tokens) % 8
                logits[(left % 2 == 1) & (left < 7), 5:] = -np.inf
                logits[left == 3, 20] = np.nan
                logits[left == 5, :3] = (np.inf, -np.inf, np.nan)
                allowed = np.array([rng.permutation(vocab)[:32] for _ in range(16)])
                biased = np.array([rng.permutation(vocab)[:24] for _ in range(16)])
                stops = np.tile(np.arange(8), (num_slots, 1))
                num_allowed, num_bias = np.zeros((2, num_slots), dtype=np.int64)
                num_allowed[[0, 6, 8]] = (32, 5, 1)
                num_bias[[1, 4, 8]] = (24, 3, 1)
                num_stop = np.full(num_slots, 5)
                num_stop[[2, 5]] = (0, 8)
                bias = rng.normal(size=(num_slots, 24)).astype(np.float32) * 100
                bias[3, 3] = -np.inf
                pos = rng.integers(8, 12, num_tokens)
                logits_tensor = _filled(logits, torch.float32, row_padding=padding)
                tables = [
                    _filled(values, dtype)
                    for values, dtype in (
                        (allowed, torch.int32),
                        (biased, torch.int32),
                        (bias, torch.float32),
                        (stops, torch.int32),
                    )
                ]
                yield Case(
                    f"{num_tokens} tokens check {check} padding {padding}",
                    (num_tokens,),
                    [
                        logits_tensor,
                        logits_tensor.stride(0),
                        vocab,
                        _filled(requests, torch.int64),
                        _filled(num_allowed),
                        tables[0],
                        tables[0].stride(0),
                        _filled(num_bias),
                        tables[1],
                        tables[1].stride(0),
                        tables[2],
                        tables[2].stride(0),
                        _filled(pos, torch.int64),
                        _filled(np.full(num_slots, 11)),
                        _filled(num_stop),
                        _filled(np.arange(num_slots) % 2),
                        tables[3],
                        tables[3].stride(0),
                    ],
                    {
                        "BLOCK_SIZE": 32,
                        "LOGITS_BLOCK_SIZE": 64,
                        "CHECK_ALL_MASKED_ROWS": check,
                    },
                )


def _score_rows(
    rng: np.random.Generator, num_rows: int, vocab: int, scale: float
) -> np.ndarray:
    logits = rng.normal(size=(num_rows, vocab)) * scale
    logits[::2, : vocab // 2] = -np.inf
    return logits


def _topk_cases() -> Iterator[Case]:
    rng = np.random.default_rng(12)
    for num_rows, vocab, topk in ((0, 9, 1), (1, 9, 1), (5, 2500, 20), (3, 1100, 1030)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for scale in (0.0, 1.0, 300.0):
                logits = _score_rows(rng, num_rows, vocab, scale)
                ids = [rng.permutation(vocab)[:topk] for _ in range(num_rows)]
                ids_array = np.array(ids).reshape(num_rows, topk)
                logits_tensor = _filled(logits, dtype, row_padding=4)
                ids_tensor = _filled(ids_array, torch.int64, row_padding=1)
                yield Case(
                    f"{num_rows} x {vocab} top {topk} {dtype} scale {scale}",
                    (num_rows,),
                    [
                        _buffer(num_rows, topk, dtype=torch.float32),
                        logits_tensor,
                        logits_tensor.stride(0),
                        ids_tensor,
                        ids_tensor.stride(0),
                        topk,
                        vocab,
                    ],
                    {
                        "BLOCK_SIZE": 1024,
                        "TOPK_BLOCK_SIZE": min(64, 1 << (topk - 1).bit_length()),
                    },
                )


def _ranks_cases() -> Iterator[Case]:
    rng = np.random.default_rng(13)
    for num_rows, vocab in ((0, 9), (1, 9), (6, 2500)):
        for dtype in (torch.float32, torch.float16):
            for id_dtype in (torch.int64, torch.int32):
                # Rounded scores tie, NaN compares false with everything, and
                # some tokens are masked.
                logits = np.round(_score_rows(rng, num_rows, vocab, 2.0))
                logits[1::3, 3] = np.nan
                logits_tensor = _filled(logits, dtype, row_padding=4)
                ids = rng.integers(0, vocab, num_rows)
                ids[1::3] = 3
                yield Case(
                    f"{num_rows} x {vocab} {dtype} {id_dtype}",
                    (num_rows,),
                    [
                        _buffer(num_rows, dtype=torch.int64),
                        logits_tensor,
                        logits_tensor.stride(0),
                        _filled(ids, id_dtype),
                        vocab,
                    ],
                    {"BLOCK_SIZE": 1024},
                )


def _fill_cases() -> Iterator[Case]:
    rng = np.random.default_rng(14)
    for num_rows in (0, 1, 9):
        for num_topk in (0, 1, 6):
            custom = _filled(rng.integers(0, INT32_MAX, (5, 128)))
            topk = _filled(rng.integers(0, 9, (num_rows, 6)), row_padding=2)
            # vLLM passes any int32 tensor when no top-k was requested.
            topk = topk if num_topk else custom
            num_cols = max(num_topk, 8)
            token_ids = _buffer(num_rows, 1 + num_cols, dtype=torch.int64)
            valid = _filled(np.zeros((num_rows, 1 + num_cols)), torch.bool)
            yield Case(
                f"{num_rows} rows top {num_topk}",
                (num_rows,),
                [
                    token_ids,
                    token_ids.stride(0),
                    valid,
                    valid.stride(0),
                    _filled(rng.integers(0, 2**40, num_rows), torch.int64),
                    topk,
                    topk.stride(0),
                    _filled(rng.integers(0, 5, num_rows), torch.int64),
                    _filled([0, 1, 8, 0, 3]),
                    custom,
                    custom.stride(0),
                ],
                {
                    "NUM_TOPK": num_topk,
                    "PADDED_COLS": 1 << (num_cols - 1).bit_length(),
                },
            )


GENERATORS: dict[str, Callable[[], Iterator[Case]]] = {
    BUFFERS + "_apply_write_kernel": _apply_write_cases,
    TABLES + "_gather_block_tables_kernel": _gather_cases,
    TABLES + "_compute_slot_mappings_kernel": _slot_mapping_cases,
    INPUTS + "_prepare_prefill_inputs_kernel": _prefill_cases,
    INPUTS + "_prepare_pos_seq_lens_kernel": _pos_seq_lens_cases,
    INPUTS + "_combine_sampled_and_draft_tokens_kernel": _combine_cases,
    INPUTS + "_get_num_sampled_and_rejected_kernel": _num_sampled_cases,
    INPUTS + "_post_update_kernel": _post_update_cases,
    INPUTS + "_post_update_num_computed_tokens_kernel": _num_computed_cases,
    INPUTS + "_expand_idx_mapping_kernel": _expand_cases,
    BIAS + "_bias_kernel": _bias_cases,
    LOGPROB + "_topk_log_softmax_kernel": _topk_cases,
    LOGPROB + "_ranks_kernel": _ranks_cases,
    LOGPROB + "_fill_logprob_token_ids_kernel": _fill_cases,
}


def _cases(kernel: str) -> list[Case]:
    """Fresh cases, the same in every process: launching one changes its tensors."""
    return list(GENERATORS[kernel]())


def _through_launchers() -> Snapshot:
    """A step of the V2 runner through vLLM's own launchers and state classes."""
    from vllm.v1.worker.gpu import block_table, input_batch, states
    from vllm.v1.worker.gpu.sample import logprob

    device = torch.device("cpu")
    rng = np.random.default_rng(15)
    requests = torch.tensor([6, 2, 4])
    lengths = [32, 5, 32]
    bounds = torch.tensor(_bounds(lengths), dtype=torch.int32)
    num_logits = torch.tensor([0, 32, 32, 64], dtype=torch.int32)

    state = states.RequestState(8, 300, 128, 32, 1000, device)
    for name, length in (("a", 20), ("b", 90), ("c", 60), ("d", 100), ("e", 7)):
        tokens = rng.integers(0, 1000, length).tolist()
        state.add_request(name, length, tokens, length // 2, 10)
    state.apply_staged_writes()
    buffers = input_batch.InputBuffers(8, 128, device)
    tables = block_table.BlockTables([16, 32], 8, 128, [20, 10], device)
    for request in range(8):
        ids = rng.integers(1, 99, (2, 10)).tolist()
        tables.append_block_ids(request, tuple(ids), overwrite=True)
    tables.apply_staged_writes()

    input_batch.prepare_prefill_inputs(
        buffers.input_ids,
        state.next_prefill_tokens,
        requests,
        bounds,
        state.all_token_ids.gpu,
        state.prefill_len.gpu,
        state.num_computed_tokens.gpu,
    )
    input_batch.prepare_pos_seq_lens(
        requests,
        bounds,
        state.num_computed_tokens.gpu,
        buffers.positions,
        buffers.seq_lens,
    )
    logits_indices = input_batch.combine_sampled_and_draft_tokens(
        buffers.input_ids,
        requests,
        state.last_sampled_tokens,
        bounds,
        buffers.seq_lens,
        state.prefill_len.gpu,
        state.draft_tokens,
        num_logits,
        64,
        0,
    )
    gathered = tables.gather_block_tables(requests, num_reqs_padded=5)
    slots = tables.compute_slot_mappings(requests, bounds, buffers.positions, 80)
    expanded = input_batch.expand_idx_mapping(requests, 64, num_logits, 32)
    rejected = input_batch.get_num_sampled_and_rejected(
        torch.tensor([3, 0, 32], dtype=torch.int32),
        buffers.seq_lens,
        num_logits,
        requests,
        state.prefill_len.gpu,
    )
    bins = torch.zeros(8, 1000, dtype=torch.int32)
    input_batch.post_update(
        requests,
        state.num_computed_tokens.gpu,
        state.last_sampled_tokens,
        bins,
        torch.as_tensor(rng.integers(0, 1000, (3, 32))),
        *rejected,
        bounds,
        state.all_token_ids.gpu,
        state.total_len.gpu,
    )
    input_batch.post_update_num_computed_tokens(
        requests, state.num_computed_tokens.gpu, bounds
    )
    logits = torch.as_tensor(rng.normal(size=(64, 1000)), dtype=torch.float32)
    scores = logprob.compute_topk_scores(logits, 5, logits_indices)
    return [
        tensor.clone()
        for tensor in (
            *(buffers.input_ids, buffers.positions, buffers.seq_lens),
            *(state.all_token_ids.gpu, state.total_len.gpu),
            *(state.num_computed_tokens.gpu, state.last_sampled_tokens),
            *(state.next_prefill_tokens, bins, logits_indices, slots),
            *(*gathered, *expanded, *rejected),
            scores.logprob_token_ids,
            scores.selected_token_ranks,
        )
    ]


def _accept_int8_masks() -> None:
    """Let Triton's interpreter load under a mask that went through `|`.

    It turns the int1 result of `bool | bool` into int8 and then refuses it as a
    mask, which hits the slot mappings under context parallelism.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    masked_load = InterpreterBuilder.create_masked_load

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        assert np.isin(mask.data, (0, 1)).all()
        mask = TensorHandle(mask.data.astype(np.bool_), mask.dtype)
        return masked_load(self, pointers, mask, *rest)

    InterpreterBuilder.create_masked_load = load


def _child(mode: str, path: str) -> None:
    """Launch every case in this process and pickle the outcome."""
    if mode == "triton":
        # The CPU wheel turns Triton off by its version string, interpreter or not.
        import vllm.platforms

        vllm.platforms.vllm_version_matches_substr = lambda _: False
        _accept_int8_masks()
    # What a CPU worker imports first; it replaces the pinned buffers, among others.
    import vllm.v1.worker.cpu.shm  # noqa: F401
    from vllm.triton_utils import HAS_TRITON

    assert (mode == "triton") == HAS_TRITON
    register_cpu_kernels()
    register_cpu_kernels()

    results: dict[str, Any] = {}
    for name in GENERATORS:
        module, attribute = name.rsplit(".", 1)
        kernel = getattr(importlib.import_module(module), attribute)
        results[name] = [case.launch(kernel[case.grid]) for case in _cases(name)]
    results["launchers"] = _through_launchers()
    Path(path).write_bytes(pickle.dumps(results))


def _children(folder: Path) -> dict[str, Any]:
    """Results of both child processes, run side by side."""
    running = {}
    for mode in ("triton", "registered"):
        # No plugin of this environment is to register anything in a child.
        env = dict(os.environ, CUDA_VISIBLE_DEVICES="", VLLM_PLUGINS="")
        env.pop("TRITON_INTERPRET", None)
        if mode == "triton":
            env["TRITON_INTERPRET"] = "1"
        running[mode] = subprocess.Popen(
            [sys.executable, __file__, mode, str(folder / mode)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    results = {}
    for mode, process in running.items():
        log, _ = process.communicate(timeout=600)
        assert process.returncode == 0, f"{mode} child failed:\n{log[-4000:]}"
        results[mode] = pickle.loads((folder / mode).read_bytes())
    return results


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Memory after each launch, by child mode and kernel."""
    return _children(tmp_path_factory.mktemp("cpu_kernels"))


@pytest.fixture
def reference(children: dict[str, Any]) -> dict[str, Any]:
    """Memory after each launch of vLLM's Triton kernels."""
    return children["triton"]


@pytest.fixture
def registered(children: dict[str, Any]) -> dict[str, Any]:
    """Memory after each launch through vLLM with the CPU kernels registered."""
    return children["registered"]


def _launch_ours(kernel: str, case: Case) -> Snapshot:
    implementation: Callable[..., Any] = CPU_KERNELS[kernel]
    if kernel.endswith("_gather_block_tables_kernel"):
        implementation = functools.partial(implementation, grid=case.grid)
    return case.launch(implementation)


def _assert_same(kernel: str, case: str, actual: Snapshot, expected: Snapshot) -> None:
    tolerance = FLOAT_TOLERANCES.get(kernel, 0.0)
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, i=index: f"{kernel}, case {case}, tensor {i}: {text}",
        )


@pytest.mark.parametrize("kernel", sorted(CPU_KERNELS))
def test_matches_triton(kernel: str, reference: dict[str, Any]) -> None:
    for case, expected in zip(_cases(kernel), reference[kernel], strict=True):
        _assert_same(kernel, case.name, _launch_ours(kernel, case), expected)


@pytest.mark.parametrize("kernel", sorted(CPU_KERNELS))
def test_vllm_launches_the_registered_kernel(
    kernel: str, reference: dict[str, Any], registered: dict[str, Any]
) -> None:
    names = [case.name for case in _cases(kernel)]
    outcomes = zip(names, registered[kernel], reference[kernel], strict=True)
    for name, actual, expected in outcomes:
        _assert_same(kernel, name, actual, expected)


def test_launchers_and_state_classes(
    reference: dict[str, Any], registered: dict[str, Any]
) -> None:
    _assert_same("", "launchers", registered["launchers"], reference["launchers"])


@pytest.mark.parametrize("kernel", sorted(CPU_KERNELS))
def test_cases_change_memory(kernel: str) -> None:
    changed = 0
    for fresh, case in zip(_cases(kernel), _cases(kernel), strict=True):
        before = fresh.launch(lambda *args, **constexprs: None)
        after = _launch_ours(kernel, case)
        changed += any(
            not torch.equal(old, new) for old, new in zip(before, after, strict=True)
        )
    assert changed >= 2


def test_every_kernel_is_covered() -> None:
    # The children look each of these names up in vLLM.
    assert GENERATORS.keys() == CPU_KERNELS.keys()


def test_log_softmax_in_chunks(
    monkeypatch: pytest.MonkeyPatch, reference: dict[str, Any]
) -> None:
    monkeypatch.setattr(cpu_kernels, "_MAX_CHUNK_ELEMENTS", 5000)
    kernel = LOGPROB + "_topk_log_softmax_kernel"
    for case, expected in zip(_cases(kernel), reference[kernel], strict=True):
        _assert_same(kernel, case.name, _launch_ours(kernel, case), expected)


def test_ranks_of_bfloat16() -> None:
    # The interpreter compares the bit patterns of bfloat16, so it is no reference.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 300, generator=generator).bfloat16()
    ids = torch.arange(7)
    counts, expected = torch.empty(2, 7, dtype=torch.int64)
    cpu_kernels.ranks(counts, logits, 300, ids, 300, 1024)
    cpu_kernels.ranks(expected, logits.float(), 300, ids, 300, 1024)
    assert torch.equal(counts, expected)
    assert len(set(counts.tolist())) == 7


def test_arbitrary_ids_of_rejected_rows_do_not_raise() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    scores, counts = torch.empty(2, 1), torch.empty(2, dtype=torch.int64)
    ids = torch.tensor([[-1], [99]])
    cpu_kernels.topk_log_softmax(scores, logits, 3, ids, 1, 1, 3, 1024, 1)
    cpu_kernels.ranks(counts, logits, 3, ids[:, 0], 3, 1024)
    expected = logits.log_softmax(-1)[[0, 1], [0, 2]]
    torch.testing.assert_close(scores[:, 0], expected)
    assert counts.tolist() == [3, 1]


if __name__ == "__main__":
    _child(*sys.argv[1:])
