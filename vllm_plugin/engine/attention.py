# SPDX-License-Identifier: Apache-2.0
"""Virtual rows: block-causal attention from any backend that can do full attention.

A request's query is cut on the block grid. Every piece becomes a row of its own
for the attention backend: same KV pages, its own query range, and a sequence
length that ends with its block. KV of the whole batch is written before
attention reads it, so each row sees its block in full and everything before it.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.utils import AttentionGroup

from vllm_unmask.engine import cpu_loops
from vllm_unmask.engine.windows import (
    ATTRIBUTE,
    Windows,
    window_metadata,
    window_rows,
)

if TYPE_CHECKING:
    from vllm_unmask.engine.full_windows import CanvasWindows


class RowPlan(NamedTuple):
    """How the queries of a batch are cut into rows."""

    request: np.ndarray[Any, Any]  # int64 [rows] row -> batch index of its request
    query_start: np.ndarray[Any, Any]  # int32 [rows + 1] row -> first query token
    # int32 [rows] tokens of the request's query that lie after the row
    after: np.ndarray[Any, Any]
    # int32 [rows] those that lie after the row's block
    after_block: np.ndarray[Any, Any]


class Parts(NamedTuple):
    """Where blocks are cut into parts that do not see what is right of them."""

    length: np.ndarray[Any, Any]  # int64 [requests], positions of a part
    # int64 [requests], leading tokens of the query in blocks that are whole
    long: np.ndarray[Any, Any]
    start: torch.Tensor  # int64 [requests], absolute position where parts begin


def plan_rows(
    num_scheduled: np.ndarray[Any, Any], block_length: int, parts: Parts | None = None
) -> RowPlan:
    """Cut each request's query into blocks, and these into parts.

    Every query starts on the block grid or stays inside a block (the scheduler sees to
    it), so the cut depends on the query lengths alone and needs nothing from the
    device.

    Args:
        num_scheduled: int [requests], query length of each request.
        block_length: positions in a block.
        parts: of the requests; None for whole blocks.
    """
    lengths = num_scheduled.astype(np.int32, copy=False)
    if parts is None:
        whole = np.full(len(lengths), block_length, np.int64)
        return RowPlan(*cpu_loops.cut_rows(lengths, block_length, whole, whole * 0))
    return RowPlan(*cpu_loops.cut_rows(lengths, block_length, parts.length, parts.long))


def build_block_causal_metadata(
    input_batch: InputBatch,
    block_tables: tuple[torch.Tensor, ...],
    slot_mappings: torch.Tensor,
    attn_groups: list[list[AttentionGroup]],
    kv_cache_config: KVCacheConfig,
    block_length: int,
    windows: Windows | None,
    num_final: torch.Tensor | None = None,
    beyond: np.ndarray[Any, Any] | None = None,
    parts: Parts | None = None,
) -> dict[str, Any]:
    """Attention metadata of a batch under the block-causal mask.

    Rows in windows are cut like the others, and see next to nothing: what they see
    instead is added to the metadata.

    Args:
        input_batch: vLLM's batch.
        block_tables: of each KV group, gathered for the batch.
        slot_mappings: of each KV group.
        attn_groups: of each KV group.
        kv_cache_config: of the engine.
        block_length: positions in a block.
        windows: of the batch.
        num_final: int64 [requests], leading rows of each query that see their block
            only up to themselves; None for none.
        beyond: as in `build_row_metadata`, of queries inside a block.
        parts: of the requests, not together with ``num_final``; None for none.

    Returns:
        Layer name -> the backend's metadata, as ``build_attn_metadata`` does.
    """
    device = input_batch.seq_lens.device
    num_reqs = input_batch.num_reqs
    num_scheduled = input_batch.num_scheduled_tokens[:num_reqs]
    plan = plan_rows(num_scheduled, block_length, parts)
    request = async_tensor_h2d(plan.request, device=device, dtype=torch.int64)
    after = async_tensor_h2d(plan.after_block, device=device, dtype=torch.int32)
    if parts is not None:
        first = async_tensor_h2d(plan.query_start[:-1], device=device)
        short = input_batch.positions[first.long()] >= parts.start[request]
        of_part = async_tensor_h2d(plan.after, device=device, dtype=torch.int32)
        after = torch.where(short, of_part, after)
    query_start = torch.from_numpy(plan.query_start)
    upper_bound = input_batch.seq_lens_cpu_upper_bound[torch.from_numpy(plan.request)]
    seq_lens = input_batch.seq_lens[request] - after
    if beyond is not None:
        seq_lens, upper_bound = _reach(seq_lens, upper_bound, beyond[plan.request])
    causal: bool | torch.Tensor = False
    if num_final is not None:
        ends = input_batch.query_start_loc[:num_reqs] + num_final
        starts = async_tensor_h2d(plan.query_start[:-1], device=device)
        causal = (starts < ends[request]).to(torch.int32)
    if windows is not None:
        starts = async_tensor_h2d(plan.query_start, device=device)
        behind = window_rows(windows, input_batch.num_tokens)[starts[:-1].long()]
        seq_lens = torch.where(behind, starts.diff(), seq_lens)
    metadata = build_attn_metadata(
        attn_groups=attn_groups,
        num_reqs=len(plan.request),
        num_tokens=input_batch.num_tokens,
        query_start_loc_gpu=async_tensor_h2d(plan.query_start, device=device),
        query_start_loc_cpu=query_start,
        max_query_len=min(block_length, int(num_scheduled.max())),
        seq_lens=seq_lens,
        max_seq_len=int(upper_bound.max()),
        block_tables=tuple(table[request] for table in block_tables),
        slot_mappings=slot_mappings,
        kv_cache_config=kv_cache_config,
        seq_lens_cpu_upper_bound=upper_bound,
        positions=input_batch.positions,
        causal=causal,
    )
    if windows is not None:
        (table,) = block_tables
        behind_canvas = window_metadata(windows, table, input_batch.num_tokens)
        for of_layer in metadata.values():
            setattr(of_layer, ATTRIBUTE, behind_canvas)
    return metadata


def build_row_metadata(
    input_batch: InputBatch,
    block_tables: tuple[torch.Tensor, ...],
    slot_mappings: torch.Tensor,
    attn_groups: list[list[AttentionGroup]],
    kv_cache_config: KVCacheConfig,
    causal: bool,
    beyond: np.ndarray[Any, Any] | None = None,
    windows: "CanvasWindows | None" = None,
) -> dict[str, Any]:
    """Attention metadata of a batch with one row a request, for the backend as it is.

    Args:
        input_batch: vLLM's batch.
        block_tables: of each KV group, gathered for the batch.
        slot_mappings: of each KV group.
        attn_groups: of each KV group.
        kv_cache_config: of the engine.
        causal: whether a query position sees nothing to its right.
        beyond: int64 [requests], positions in the cache behind each query that it
            sees as well; None for none.
        windows: rows behind queries, which get rows of their own that see next to
            nothing; None for none.

    Returns:
        As `build_block_causal_metadata`.
    """
    num_reqs = input_batch.num_reqs
    seq_lens = input_batch.seq_lens[:num_reqs]
    upper_bound = input_batch.seq_lens_cpu_upper_bound[:num_reqs]
    if beyond is not None:
        seq_lens, upper_bound = _reach(seq_lens, upper_bound, beyond)
    bounds = input_batch.query_start_loc_np[: num_reqs + 1]
    query_start = input_batch.query_start_loc[: num_reqs + 1]
    tables = block_tables
    if windows is not None:
        device = seq_lens.device
        plan, behind = windows.cut(input_batch)
        bounds, query_start = (
            plan.query_start,
            async_tensor_h2d(plan.query_start, device=device),
        )
        request = async_tensor_h2d(plan.request, device=device)
        seq_lens = seq_lens[request] - async_tensor_h2d(plan.after, device=device)
        of_window = async_tensor_h2d(behind, device=device)
        seq_lens = torch.where(of_window, query_start.diff(), seq_lens)
        upper_bound = upper_bound[torch.from_numpy(plan.request)]
        tables = tuple(table[request] for table in block_tables)
    metadata = build_attn_metadata(
        attn_groups=attn_groups,
        num_reqs=len(bounds) - 1,
        num_tokens=input_batch.num_tokens,
        query_start_loc_gpu=query_start,
        query_start_loc_cpu=torch.from_numpy(bounds),
        max_query_len=int(np.diff(bounds).max()),
        seq_lens=seq_lens,
        max_seq_len=int(upper_bound.max()),
        block_tables=tables,
        slot_mappings=slot_mappings,
        kv_cache_config=kv_cache_config,
        seq_lens_cpu_upper_bound=upper_bound,
        positions=input_batch.positions,
        causal=causal,
    )
    if windows is not None:
        (table,) = block_tables
        of_windows = windows.metadata(table, input_batch.num_tokens)
        for of_layer in metadata.values():
            setattr(of_layer, ATTRIBUTE, of_windows)
    return metadata


def _reach(
    seq_lens: torch.Tensor, upper_bound: torch.Tensor, beyond: np.ndarray[Any, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence lengths and their bounds on the host, so many positions longer."""
    more = async_tensor_h2d(beyond, device=seq_lens.device, dtype=seq_lens.dtype)
    return seq_lens + more, upper_bound + torch.from_numpy(beyond).to(upper_bound.dtype)


def count_final_rows(
    batch: InputBatch, pending: torch.Tensor, length: int, asynchronous: bool
) -> torch.Tensor:
    """Leading rows of each query whose KV a step makes final, int64 [requests].

    Args:
        batch: vLLM's.
        pending: bool [slots], whether a complete block awaits its final forward.
        length: positions of a block.
        asynchronous: whether a step was in flight when this one was scheduled.
    """
    num_reqs, device = batch.num_reqs, batch.seq_lens.device
    to_device = partial(async_tensor_h2d, device=device, dtype=torch.int64)
    query_len = batch.num_scheduled_tokens[:num_reqs]
    num_drafts = batch.num_draft_tokens_per_req
    if num_drafts is None:
        return to_device(query_len)
    known = query_len - num_drafts
    lead = np.zeros_like(known) if asynchronous else known // length * length
    slots = to_device(batch.idx_mapping_np[:num_reqs])
    final = torch.where(pending[slots], length, to_device(lead))
    return torch.where(to_device(num_drafts) > 0, final, to_device(query_len))
