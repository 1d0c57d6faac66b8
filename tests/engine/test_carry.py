# SPDX-License-Identifier: Apache-2.0
"""Which hidden state scores which position where row ``i - 1`` scores token ``i``."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

# On CPU, vLLM's worker replaces what the runner's modules import by name.
import vllm.v1.worker.cpu.shm  # noqa: F401

from vllm_unmask.decoding.drafting import Candidates
from vllm_unmask.engine.carry import Carry
from vllm_unmask.engine.windows import Speculating, Windows

CPU = torch.device("cpu")
L = 4


def carry() -> Carry:
    made = Carry(8, L, 2, torch.float32, CPU)
    made.hidden.fill_(-9)
    return made


def batch(slots: list[int], lengths: list[int], drafts: list[int] | None) -> Any:
    return SimpleNamespace(
        num_reqs=len(slots),
        idx_mapping_np=np.array(slots, np.int32),
        num_scheduled_tokens=np.array(lengths, np.int32),
        query_start_loc_np=np.cumsum([0, *lengths]).astype(np.int32),
        num_draft_tokens_per_req=None if drafts is None else np.array(drafts),
    )


def states(rows: torch.Tensor) -> torch.Tensor:
    """Hidden states that tell their rows."""
    return rows.float().unsqueeze(1) * torch.tensor([1.0, 10.0])


def open_rows(first: list[int]) -> torch.Tensor:
    return (torch.tensor(first).unsqueeze(1) + torch.arange(L)).view(-1)


def read(
    made: Carry,
    of: Any,
    first: list[int],
    start: list[int],
    fixed: list[int],
    slots: list[int],
    more: tuple[torch.Tensor, ...] = (),
    speculating: Speculating | None = None,
) -> list[int]:
    """What the head gets, as rows of the batch; -9 for the untouched beginning."""
    prefills = made.read_prefills(of)
    row = torch.tensor(start) + torch.tensor(first)
    parts = made.read_canvases(
        torch.tensor(slots),
        torch.tensor(first),
        row,
        torch.tensor(fixed),
        [open_rows(row.tolist()), *more],
        speculating,
    )
    rows = torch.cat(parts + prefills)
    assert (rows >= 0).all()
    return made.exchange(states(rows))[:, 0].int().tolist()


def test_every_way_to_the_first_position() -> None:
    """Behind a complete block, carried, behind a prompt, in two, and two prefills."""
    made = carry()
    made.hidden[5] = 77
    lengths = [8, 4, 12, 4, 8, 11, 3]
    slots = [2, 5, 1, 0, 4, 6, 7]
    got = read(
        made,
        batch(slots, lengths, [4, 4, 4, 1, 1, 0, 0]),
        [4, 0, 8, 0, 4],
        [0, 8, 12, 24, 28],
        [0, 0, 0, 3, 3],
        slots[:5],
    )
    assert got == [
        *(3, 4, 5, 6),
        *(77, 8, 9, 10),
        *(19, 20, 21, 22),
        # A position of the prompt has its own row, whatever else is forwarded.
        *(24, 24, 25, 26),
        *(32, 32, 33, 34),
    ]
    kept = made.hidden[:, 0].int().tolist()
    assert [kept[slot] for slot in (2, 5, 1)] == [3, 77, 19]
    # Eight of eleven rows of the prompt are whole blocks; three are not one.
    assert (kept[6], kept[7]) == (36 + 7, -9)
    assert kept[3] == -9


def test_windows_share_the_first_row_of_their_block() -> None:
    """Candidates that of the open block; a next block that of the one before it."""
    made = carry()
    made.hidden[3] = 55
    # Two canvases of [complete | open] and [open], each with three windows behind.
    candidates = Candidates(
        torch.zeros((2, 3, L), dtype=torch.int64),
        torch.tensor([3, 3]),
        opening=torch.tensor([2, 0]),
        leader=torch.tensor([1, -1]),
    )
    windows = Windows(
        np.array([0, 1]),
        torch.tensor([8, 24]),
        torch.tensor([12, 12]),
        torch.tensor([4, 0]),
        candidates,
        torch.zeros(2, dtype=torch.bool),
    )
    speculating = Speculating(np.array([0, 1]), windows, 3)
    got = read(
        made,
        batch([2, 3], [20, 16], [16, 16]),
        [4, 0],
        [0, 20],
        [0, 0],
        [2, 3],
        (windows.logits_rows(3, 36),),
        speculating,
    )
    first = got[2 * L :: L]
    assert got[: 2 * L : L] == [3, 55]
    # Of the first request the third window follows the second one, rows 12 to 15; of
    # the second request the first one follows the open block, rows 20 to 23.
    assert first == [3, 3, 15, 23, 55, 55]
    assert got[2 * L + 1 : 3 * L] == [8, 9, 10]


def test_other_rows_are_left_alone() -> None:
    made = carry()
    some = states(torch.arange(5))
    assert made.exchange(some) is some
    assert made.read_prefills(batch([0], [5], None)) == []
    assert made.exchange(some) is some
    assert (made.hidden == -9).all()
    # A step is exchanged once: what comes after it are other rows.
    made.read_prefills(batch([1], [4], [0]))
    assert len(made.exchange(states(torch.tensor([3])))) == 0
    assert made.hidden[1, 0] == 3
    assert made.exchange(some) is some
