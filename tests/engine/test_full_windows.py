# SPDX-License-Identifier: Apache-2.0
"""Where windows of whole canvases lie in a batch, and what they see."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_unmask.engine.full_windows import CanvasWindows

BLOCK = 4
# Rows of each query without windows, its first position, its windows, and the cached
# positions behind it; None does not speculate.
REQUESTS: list[tuple[int, int, int | None, int]] = [
    (7, 3, None, 0),
    (10, 0, 2, 0),  # a whole canvas
    (4, 9, 3, 6),  # a block, with a cache on either side
    (6, 5, 0, 0),
]


def batch() -> tuple[Any, CanvasWindows]:
    lengths = [rows * (1 + (num or 0)) for rows, _, num, _ in REQUESTS]
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    mine = [i for i, (_, _, num, _) in enumerate(REQUESTS) if num is not None]
    rows, first, num, beyond = np.array([REQUESTS[i] for i in mine], np.int64).T
    windows = CanvasWindows(
        np.array(mine), num, rows, first, bounds[mine] + rows, beyond, BLOCK
    )
    made = SimpleNamespace(num_reqs=len(REQUESTS), query_start_loc_np=bounds)
    return made, windows


def test_rows_of_the_platform_s_attention() -> None:
    """A row for each query; windows in pieces no longer than a block."""
    made, windows = batch()
    plan, behind = windows.cut(made)
    bounds = made.query_start_loc_np
    assert plan.query_start[0] == 0 and plan.query_start[-1] == bounds[-1]
    lengths = np.diff(plan.query_start)
    assert (lengths > 0).all()
    for i, (rows, *_) in enumerate(REQUESTS):
        mine = np.flatnonzero(plan.request == i)
        assert plan.query_start[mine[0]] == bounds[i]
        assert behind[mine].tolist() == [False] + [True] * (len(mine) - 1)
        assert lengths[mine[0]] == rows
        assert plan.after[mine[0]] == bounds[i + 1] - bounds[i] - rows
        assert (lengths[mine[1:]] <= BLOCK).all()
    assert (np.diff(plan.request) >= 0).all()


def test_what_windows_see() -> None:
    made, windows = batch()
    table = torch.arange(8, dtype=torch.int32).view(4, 2)
    metadata = windows.metadata(table, int(made.query_start_loc_np[-1]))
    found = []
    bounds = metadata.cu_rows.tolist()
    assert metadata.holes is not None
    for i, seen in enumerate(metadata.prefix_lens.tolist()):
        if seen >= 0:
            request = int(metadata.block_table[i, 0]) // 2
            hole = metadata.holes[i].tolist()
            found.append((request, bounds[i], bounds[i + 1], seen, hole))
    assert found == [
        # Itself alone.
        (1, 17, 27, 0, [0, 10]),
        (1, 27, 37, 0, [0, 10]),
        # 9 positions before the block, and the 6 behind its 4.
        (2, 41, 45, 15, [9, 4]),
        (2, 45, 49, 15, [9, 4]),
        (2, 49, 53, 15, [9, 4]),
    ]
    assert (metadata.mask == -1).all()
    assert metadata.mask.shape == (made.query_start_loc_np[-1], 1)
    assert metadata.max_window == 10
    alone = windows._replace(beyond=windows.beyond * 0)
    assert alone.metadata(table, 59).holes is None


def test_places_of_windows() -> None:
    _, windows = batch()
    assert windows.starts == [
        (0, 0, 17),
        (0, 1, 27),
        (1, 0, 41),
        (1, 1, 45),
        (1, 2, 49),
    ]
