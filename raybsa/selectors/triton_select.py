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


def choose(scores: Tensor, shape: Shape, first: int, out: Tensor) -> None:
    """Writes the columns of some rows into ``out``.

    Args:
        scores: (groups, R, columns) float32, contiguous: rows ``first .. first + R - 1`` of the shape's, whose rules
            have no segments.
        out: (groups, m) int32, m the shape's kept blocks.
    """
    groups, rows, columns = scores.shape
    padded = max(16, triton.next_power_of_2(columns))
    rules = shape.rules
    tensors = (scores, shape.rows, shape.begin, out)
    launch = launcher(select_kernel, tensors, (), (rules.causal, padded), warps=4 if padded <= 2048 else 8)
    launch((rows, groups), tensors, (first, columns, out.shape[1], rules.sinks, rules.window))


@triton.jit(do_not_specialize=["first", "columns", "kept", "sinks", "window"])
def select_kernel(
    scores,
    rows,
    begin,
    out,
    first,
    columns,
    kept,
    sinks,
    window,
    CAUSAL: tl.constexpr,
    N: tl.constexpr,
):
    """Program (row, group)."""
    LOWEST: tl.constexpr = -2147483648
    FREE: tl.constexpr = 1 << 20
    group = tl.program_id(1).to(tl.int64)
    place = first + tl.program_id(0)
    row = tl.load(rows + place).to(tl.int32)
    start = tl.load(begin + place)
    count = (tl.load(begin + place + 1) - start).to(tl.int32)
    col = tl.arange(0, N)
    diagonal = tl.minimum(row, columns - 1)
    allowed = col < (diagonal + 1 if CAUSAL else columns)
    line = scores + (group * tl.num_programs(0) + tl.program_id(0)) * columns
    score = tl.load(line + col, mask=allowed, other=0.0) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    distance = tl.abs(col - diagonal)
    rank = tl.where(distance < window, 1 + sinks + 2 * distance + (col > diagonal).to(tl.int32), FREE)
    rank = tl.where(distance == 0, 0, tl.where(col < sinks, 1 + col, rank))
    key = tl.where(allowed, tl.where(rank < FREE, 0x7FFFFFFF - rank, key), LOWEST)
    bar = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= count, 0, LOWEST)
    for bit in range(31):
        higher = bar + (1 << (30 - bit))
        bar = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= count, higher, bar)
    above, level = key > bar, key == bar
    left = count - tl.sum(above.to(tl.int32), 0)
    chosen = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= left))
    to = out + group * kept + start + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(to, col, mask=chosen)
