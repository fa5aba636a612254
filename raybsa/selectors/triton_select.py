"""A row's best columns in one program, on a GPU: forced ones first, ascending, as ``Rules`` and ``top_columns`` say.

The bar that the chosen scores pass is found bit by bit, from the highest, until as many pass as are wanted: at most 32
counts over the row, no sort. Scores that lie on the bar fill what is left from the lowest column on.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from raybsa.kernels.triton_launch import launcher
from raybsa.selectors.shape import Shape

MAX_COLUMNS = 16_384
COLUMNS_A_WARP = 1024  # fewer warps: counts need no barrier within one
BITS_A_LOOK = tl.constexpr(4)  # between two looks whether the bar is found


def choose(scores: Tensor, shape: Shape, first: int, out: Tensor) -> None:
    """Writes the columns of some rows into ``out``.

    Args:
        scores: (groups, R, columns) float32, contiguous: rows ``first .. first + R - 1`` of the shape's, whose rules
            have no segments.
        out: (groups, m) int32, m the shape's kept blocks.
    """
    groups, rows, columns = scores.shape
    padded = max(16, triton.next_power_of_2(columns))
    rules, warps = shape.rules, min(8, max(1, padded // COLUMNS_A_WARP))
    tensors = (scores, shape.rows, shape.begin, out)
    launch = launcher(select_kernel, tensors, (), (rules.causal, padded), warps)
    launch((rows, groups), tensors, (first, rows, columns, out.shape[1], rules.sinks, rules.window))


@triton.jit(do_not_specialize=["first", "count_rows", "columns", "kept", "sinks", "window"])
def select_kernel(
    scores,
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
):
    """Program (row, group)."""
    LOWEST: tl.constexpr = -2147483648
    FREE: tl.constexpr = 1 << 20
    LEVEL: tl.constexpr = 1 << 16  # more than the columns: two counts in one number
    line, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(rows + first + line).to(tl.int32)
    start = tl.load(begin + first + line)
    count = (tl.load(begin + first + line + 1) - start).to(tl.int32)
    col = tl.arange(0, N)
    diagonal = tl.minimum(row, columns - 1)
    allowed = col < (diagonal + 1 if CAUSAL else columns)
    score = tl.load(scores + (group * count_rows + line) * columns + col, mask=allowed, other=0.0)
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    distance = tl.abs(col - diagonal)
    rank = tl.where(distance < window, 1 + sinks + 2 * distance + (col > diagonal).to(tl.int32), FREE)
    rank = tl.where(distance == 0, 0, tl.where(col < sinks, 1 + col, rank))
    key = tl.where(allowed, tl.where(rank < FREE, 0x7FFFFFFF - rank, key), LOWEST)
    passing = tl.sum((key >= 0).to(tl.int32))
    bar = tl.where(passing >= count, 0, LOWEST)
    bit, found = 30, passing == count
    while (bit >= 0) & (found == 0):
        for _ in tl.static_range(BITS_A_LOOK):
            higher = bar + (1 << tl.maximum(bit, 0))
            passing = tl.sum((key >= higher).to(tl.int32))
            bar = tl.where((passing >= count) & (bit >= 0), higher, bar)
            found |= passing == count
            bit -= 1
    above, level = key > bar, key == bar
    left = count - tl.sum(above.to(tl.int32))
    places = tl.cumsum(above.to(tl.int32) + level.to(tl.int32) * LEVEL)
    on_bar = places // LEVEL
    chosen = (above | (level & (on_bar <= left))) & allowed
    to = out + group * kept + start + places % LEVEL + tl.minimum(on_bar, left) - 1
    tl.store(to, col, mask=chosen)
