# SPDX-License-Identifier: Apache-2.0
"""The kernels behind `vllm_unmask.kernels.row_statistics`, for GPUs.

Every tile of every row is a program of its own, which leaves six numbers; one program
a row puts them together and reads the tile again in which its draw lies. Bytes moved:
the logits once, and 28 for each tile of `TILE` logits. Truncated rows are read about a
hundred times more, see `triton_truncation`.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from vllm_unmask.kernels.row_statistics.triton_tiles import TILE, is_kept, load_tile
from vllm_unmask.kernels.row_statistics.triton_truncation import truncation_kernel

if TYPE_CHECKING:
    from vllm_unmask.kernels.row_statistics import Constraints, Sampling

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_NO_TOKEN = tl.constexpr(1 << 30)
# Numbers of a tile: largest logit, second, sum of weights, of weights times their
# logarithms, and sum of the weights that a draw takes.
_PARTS = tl.constexpr(5)


@triton.jit
def _read_law(law: tl.tuple, row: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """How one row is sampled.

    Args:
        law: float32 [rows] temperatures, bool [rows] for plain statistics, and int32
            [rows] twice, as `truncation_kernel` leaves them; any of it may be None.
        row: int64.

    Returns:
        Temperature of its draw, 0 for greedy; that of its statistics; whether these
        are of the plain softmax.
    """
    temperature, plain, borders, _ = law
    heat = tl.full([], 0.0, tl.float32)
    if temperature is not None:
        heat = tl.load(temperature + row)
    before = heat == 0.0
    if plain is not None:
        before = before | tl.load(plain + row)
    return heat, tl.where(before, 1.0, heat), before


@triton.jit
def tile_kernel(
    parts: tl.tensor,
    tokens: tl.tensor,
    batch: tl.tuple,
    law: tl.tuple,
    TILE: tl.constexpr,
) -> None:
    """Statistics of one tile of one row: grid (rows, tiles).

    Args:
        parts: float32 [rows, tiles, 5], written, see above.
        tokens: int32 [rows, tiles], written: of the largest logit.
        batch: see `triton_tiles`.
        law: of the rows, see above.
        TILE: logits of a tile.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    heat, own, before = _read_law(law, row)
    token = tile * TILE + tl.arange(0, TILE)
    x = load_tile(batch, row, token)
    peak = tl.max(x, 0)
    best = tl.min(tl.where(x == peak, token, _NO_TOKEN), 0)
    # Of a tile without a finite logit only its token is read: nothing may be NaN.
    base = tl.where((peak > float("-inf")) & (peak < float("inf")), peak, 0.0)
    depth = tl.where(x < float("inf"), x - base, 0.0)
    kept = x
    left = depth
    if law[2] is not None:
        # A greedy row is not cut, whatever its temperature is divided by.
        divisor = tl.where(heat > 0.0, heat, 1.0)
        stays = is_kept(x, token, divisor, tl.load(law[2] + row), tl.load(law[3] + row))
        left = tl.where(stays, depth, float("-inf"))
        kept = tl.where(before, x, tl.where(stays, x, float("-inf")))
        depth = tl.where(before, depth, left)
    power = depth * (_LOG2E / own)
    weights = tl.exp2(power)
    total = tl.sum(weights, 0)
    # A weight of 0 counts for nothing, and would with -inf be NaN.
    doubt = tl.sum(weights * tl.maximum(power, -200.0), 0)
    second = tl.max(tl.where(token == best, float("-inf"), kept), 0)
    place = parts + (row * tl.num_programs(1) + tile) * _PARTS
    tl.store(place, peak)
    tl.store(place + 1, second)
    tl.store(place + 2, total)
    tl.store(place + 3, doubt)
    if heat > 0.0:
        tl.store(place + 4, tl.sum(tl.exp2(left * (_LOG2E / heat)), 0))
    tl.store(tokens + row * tl.num_programs(1) + tile, best)


# The number of rows follows the batch: one kernel serves all of them.
@triton.jit(do_not_specialize=["rows"])
def row_kernel(
    found: tl.tensor,
    values: tl.tensor,
    rows: tl.tensor,
    parts: tl.tensor,
    tokens: tl.tensor,
    tiles: tl.tensor,
    batch: tl.tuple,
    law: tl.tuple,
    draws: tl.tensor,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One row from its tiles: grid (rows,).

    Args:
        found: int64 [2, rows], written: tokens and candidates.
        values: float32 [6, rows], written: the other fields in order.
        rows: number of rows.
        parts: as `tile_kernel` leaves them.
        tokens: likewise.
        tiles: of a row.
        batch: see `triton_tiles`.
        law: of the rows, see above.
        draws: float64 [rows] or None.
        TILES: ``tiles`` or more, a power of two.
        TILE: logits of a tile.
    """
    row = tl.program_id(0).to(tl.int64)
    heat, own, _ = _read_law(law, row)
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    place = parts + (row * tiles + tile) * _PARTS
    peaks = tl.load(place, mask=inside, other=float("-inf"))
    seconds = tl.load(place + 1, mask=inside, other=float("-inf"))
    totals = tl.load(place + 2, mask=inside, other=0.0)
    doubts = tl.load(place + 3, mask=inside, other=0.0)
    best = tl.load(tokens + row * tiles + tile, mask=inside, other=_NO_TOKEN)

    peak = tl.max(peaks, 0)
    known = (peak > float("-inf")) & (peak < float("inf"))
    token = tl.min(tl.where(peaks == peak, best, _NO_TOKEN), 0)
    # The largest logit has weight 1; where nothing has, all of the tile is cut.
    others = tl.where(totals > 0.0, peaks, float("-inf"))
    others = tl.where(best == token, seconds, others)
    second = tl.max(others, 0)
    live = inside & (peaks > float("-inf"))
    shift = tl.where(live, peaks - peak, 0.0)
    scale = _LOG2E / own
    decay = tl.where(live, tl.exp2(shift * scale), 0.0)
    total = tl.sum(totals * decay, 0)
    doubt = tl.sum((doubts + totals * shift * scale) * decay, 0)

    safe = tl.where(known, total, 1.0)
    entropy = tl.maximum((tl.log2(safe) - doubt / safe) * _LN2, 0.0)
    gap = (peak - second) / own
    log_sum = peak / own + tl.log2(safe) * _LN2
    runner = tl.exp2((second - peak) * scale) / safe
    candidate = token
    confidence = 1.0 / safe
    tl.store(values + row, tl.where(known, confidence, 0.0))
    tl.store(values + rows + row, tl.where(known, runner, 0.0))
    tl.store(values + 2 * rows + row, tl.where(known, gap, 0.0))
    uniform = tl.log2(batch[2].to(tl.float32)) * _LN2
    tl.store(values + 3 * rows + row, tl.where(known, entropy, uniform))
    tl.store(values + 4 * rows + row, tl.where(known, log_sum, peak))
    tl.store(found + row, token.to(tl.int64))
    # The first is known to the compiler, which must not look at what follows it.
    if draws is not None:  # noqa: SIM102
        if known & (heat > 0.0):
            warmth = _LOG2E / heat
            drawn = tl.load(place + 4, mask=inside, other=0.0).to(tl.float64)
            drawn = tl.where(live, drawn * tl.exp2(shift * warmth), 0.0)
            target = tl.load(draws + row) * tl.sum(drawn, 0)
            reached = tl.cumsum(drawn, 0)
            # The first tile that passes the target; by rounding maybe none does.
            passing = tl.where((reached > target) & (drawn > 0.0), tile, TILES)
            ending = tl.max(tl.where(drawn > 0.0, tile, 0), 0)
            chosen = tl.minimum(tl.min(passing, 0), ending)
            passed = tl.sum(tl.where(tile < chosen, drawn, 0.0), 0)

            at = chosen * TILE + tl.arange(0, TILE)
            x = load_tile(batch, row, at)
            weights = tl.exp2((x - peak) * warmth)
            if law[2] is not None:
                border = tl.load(law[2] + row)
                last = tl.load(law[3] + row)
                weights = tl.where(is_kept(x, at, heat, border, last), weights, 0.0)
            reached = passed + tl.cumsum(weights.to(tl.float64), 0)
            passing = tl.where((reached > target) & (weights > 0.0), at, _NO_TOKEN)
            ending = tl.max(tl.where(weights > 0.0, at, -1), 0)
            candidate = tl.minimum(tl.min(passing, 0), ending)
            logit = tl.max(tl.where(at == candidate, x, float("-inf")), 0)
            confidence = tl.exp2((logit - peak) * scale) / safe
    tl.store(found + rows + row, candidate.to(tl.int64))
    tl.store(values + 5 * rows + row, tl.where(known, confidence, 0.0))


def row_statistics(
    logits: torch.Tensor, sampling: "Sampling | None", constraints: "Constraints"
) -> tuple[torch.Tensor, ...]:
    """Documented in the package."""
    rows, vocab = logits.shape
    device = logits.device
    found = torch.empty((2, rows), dtype=torch.int64, device=device)
    values = torch.empty((6, rows), dtype=torch.float32, device=device)
    if rows:
        tiles = triton.cdiv(vocab, TILE)
        parts = torch.empty((rows, tiles, _PARTS.value), device=device)
        tokens = torch.empty((rows, tiles), dtype=torch.int32, device=device)
        batch = _batch(logits, constraints)
        temperature, draws, top_k, top_p, min_p, plain = sampling or (None,) * 6
        borders = lasts = None
        if any(option is not None for option in (top_k, top_p, min_p)):
            borders = torch.empty(rows, dtype=torch.int32, device=device)
            lasts = torch.empty_like(borders)
            options = (temperature, top_k, top_p, min_p)
            truncation_kernel[(rows,)](
                borders, lasts, batch, options, TILE=TILE, num_warps=16
            )
        law = (temperature, plain, borders, lasts)
        tile_kernel[(rows, tiles)](parts, tokens, batch, law, TILE=TILE, num_warps=8)
        row_kernel[(rows,)](
            found,
            values,
            rows,
            parts,
            tokens,
            tiles,
            batch,
            law,
            draws,
            TILES=triton.next_power_of_2(tiles),
            TILE=TILE,
            num_warps=8,
        )
    return (found[0], *values[:5], found[1], values[5])


def _batch(logits: torch.Tensor, constraints: "Constraints") -> tuple[Any, ...]:
    """What `triton_tiles` calls a batch."""
    bitmasks = constraints.bitmasks
    return (
        logits,
        logits.stride(0),
        logits.shape[1],
        constraints.mask_id,
        constraints.static_mask,
        bitmasks,
        0 if bitmasks is None else bitmasks.stride(0),
        constraints.bitmask_rows,
        constraints.bias_starts,
        constraints.bias_tokens,
        constraints.bias_values,
    )
