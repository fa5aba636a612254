"""A row's best columns in one program, on a GPU: forced ones first, ascending, as ``Rules`` and ``top_columns`` say.

The bar that the chosen scores pass is found bit by bit, from the highest: 32 counts over the row, no sort. Scores that
lie on the bar fill what is left from the lowest column on.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from raybsa.kernels.triton_launch import launcher
from raybsa.selectors.shape import Shape

MAX_COLUMNS = 16_384
MAX_COLUMNS_AT_ONCE, ROWS_AT_ONCE = 1024, 16  # what fits a program's registers with its scores
INNER = tl.constexpr(16)


def choose(scores: Tensor, shape: Shape, first: int, out: Tensor) -> None:
    """Writes the columns of some rows into ``out``.

    Args:
        scores: (groups, R, columns) float32, contiguous: rows ``first .. first + R - 1`` of the shape's, whose rules
            have no segments.
        out: (groups, m) int32, m the shape's kept blocks.
    """
    groups, rows, columns = scores.shape
    padded = max(16, triton.next_power_of_2(columns))
    constants = (shape.rules.causal, padded, 1, 0)
    _launch((scores, None), shape, out, (rows, groups), (first, rows), constants, 4 if padded <= 2048 else 8)


def choose_by(u: Tensor, w: Tensor, shape: Shape, out: Tensor) -> None:
    """The same for all rows, the scores ``u @ w.T`` made on the way.

    Args:
        u: (B, Hkv, rows, d) float32 of the shape's rows, contiguous.
        w: (B, Hkv, columns, d) the same, at most ``MAX_COLUMNS_AT_ONCE`` columns.
    """
    rows, inner = u.shape[2:]
    padded = max(16, triton.next_power_of_2(w.shape[2]))
    grid = (triton.cdiv(rows, ROWS_AT_ONCE), u.shape[0] * u.shape[1])
    constants = (shape.rules.causal, padded, ROWS_AT_ONCE, inner)
    _launch((u, w), shape, out, grid, (0, rows), constants, min(16, max(4, padded // 64)))


def _launch(
    scored: tuple[Tensor, Tensor | None],
    shape: Shape,
    out: Tensor,
    grid: tuple[int, int],
    some: tuple[int, int],
    constants: tuple[int, ...],
    warps: int,
) -> None:
    tensors = (*scored, shape.rows, shape.begin, out)
    launch = launcher(select_kernel, tensors, (), constants, warps)
    launch(grid, tensors, (*some, shape.columns, out.shape[1], shape.rules.sinks, shape.rules.window))


@triton.jit(do_not_specialize=["first", "count_rows", "columns", "kept", "sinks", "window"])
def select_kernel(
    scores,
    w,
    rows,
    begin,
    out,
    first,
    count_rows,
    columns,
    kept,
    sinks,
    window,
    CAUSAL: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Program (``ROWS`` rows, group); with D, ``scores`` is u."""
    LOWEST: tl.constexpr = -2147483648
    FREE: tl.constexpr = 1 << 20
    group = tl.program_id(1).to(tl.int64)
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = line < count_rows
    row = tl.load(rows + first + line, mask=inside, other=0).to(tl.int32)
    start = tl.load(begin + first + line, mask=inside, other=0)
    end = tl.load(begin + first + line + 1, mask=inside, other=0)
    count = (end - start).to(tl.int32)[:, None]
    col = tl.arange(0, N)[None, :]
    diagonal = tl.minimum(row, columns - 1)[:, None]
    allowed = (col < (diagonal + 1 if CAUSAL else columns)) & inside[:, None]
    if D > 0:
        score = tl.zeros([ROWS, N], tl.float32)
        for step in tl.static_range(0, D, INNER):
            inner = step + tl.arange(0, INNER)
            u_at = scores + (group * count_rows + line)[:, None] * D + inner[None, :]
            a = tl.load(u_at, mask=inside[:, None] & (inner < D)[None, :], other=0.0)
            w_at = w + (group * columns + col) * D + inner[:, None]
            b = tl.load(w_at, mask=(col < columns) & (inner < D)[:, None], other=0.0)
            score = tl.dot(a, b, score, input_precision="tf32x3")
    else:
        score = tl.load(scores + (group * count_rows + line)[:, None] * columns + col, mask=allowed, other=0.0)
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    distance = tl.abs(col - diagonal)
    rank = tl.where(distance < window, 1 + sinks + 2 * distance + (col > diagonal).to(tl.int32), FREE)
    rank = tl.where(distance == 0, 0, tl.where(col < sinks, 1 + col, rank))
    key = tl.where(allowed, tl.where(rank < FREE, 0x7FFFFFFF - rank, key), LOWEST)
    bar = tl.where(tl.sum((key >= 0).to(tl.int32), 1, keep_dims=True) >= count, 0, LOWEST)
    for bit in range(31):
        higher = bar + (1 << (30 - bit))
        bar = tl.where(tl.sum((key >= higher).to(tl.int32), 1, keep_dims=True) >= count, higher, bar)
    above, level = key > bar, key == bar
    left = count - tl.sum(above.to(tl.int32), 1, keep_dims=True)
    chosen = (above | (level & (tl.cumsum(level.to(tl.int32), 1) <= left))) & allowed
    to = out + group * kept + start[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(to, tl.broadcast_to(col, [ROWS, N]), mask=chosen)
