"""One launch that cuts lists of blocks into items of work, the longest first: what a dozen torch operations would do.

Every program reads the lengths of all lists, to know how many items stand before its own, and writes the items of its
own lists. Items count as equally long within a class of length, where they keep their order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from raybsa.kernels.triton_launch import launcher

LISTS = 512  # a program
LENGTHS = 4  # items count as equally long within this fraction of the bound, and then keep their order
LONGEST = tl.constexpr(LENGTHS)  # the class of items as long as the bound
PARTS, SPLITS = tl.constexpr(LENGTHS + 1), tl.constexpr(LENGTHS + 2)  # counted as if they were classes too
CLASSES = tl.constexpr(8)
NO_PART, NOTHING = tl.constexpr(-1), tl.constexpr(-2)


def write_items(
    offsets: Tensor, turn: Tensor, items: Tensor, splits: Tensor, totals: Tensor, bound: int, step: int
) -> None:
    """Fills in ``items`` and ``splits`` as ``Work`` has them, and the numbers of items, split lists and parts.

    Args:
        offsets: (n + 1,) int64 of the lists.
        turn: (n,) int64, the places where masking begins or ends.
        items: (at least as many as there are, 8) int32; what is left over is work for no one.
        splits: (at least as many as there are, 4) int32; what is left over has no parts.
        totals: (3,) int32.
        bound: the most blocks of an item, a multiple of ``step``.
    """
    lists, tensors = len(turn), (offsets, turn, items, splits, totals)
    launch = launcher(items_kernel, tensors, (offsets.stride(0), turn.stride(0)), (LISTS,))
    launch((max(1, -(-lists // LISTS)), 1), tensors, (lists, bound, step, len(items), len(splits)))


@triton.jit
def _lengths(offsets, offset_step, place, lists, bound, step):
    """Begin, end, number of pieces and the length of all pieces but the last, of some lists."""
    inside = place < lists
    at = offsets + place.to(tl.int64) * offset_step
    begin = tl.load(at, mask=inside, other=0).to(tl.int32)
    end = tl.load(at + offset_step, mask=inside, other=0).to(tl.int32)
    pieces = tl.where(inside, tl.maximum(tl.cdiv(end - begin, bound), 1), 0)
    size = tl.cdiv(end - begin, tl.maximum(pieces, 1) * step) * step
    return begin, end, pieces, size


@triton.jit
def _classes(begin, end, pieces, size, bound):
    """Of some lists: the class of all pieces but the last, that of the last one, and (CLASSES, lists) how many items
    there are of each class, parts and splits."""
    full = (size.to(tl.int64) * LONGEST // bound).to(tl.int32)
    last = ((end - begin - (pieces - 1) * size).to(tl.int64) * LONGEST // bound).to(tl.int32)
    name = tl.arange(0, CLASSES)[:, None]
    is_split = (pieces > 1).to(tl.int32)
    found = tl.where(name == full[None, :], (is_split * (pieces - 1))[None, :], 0)
    found += tl.where(name == last[None, :], (pieces > 0).to(tl.int32)[None, :], 0)
    found += tl.where(name == PARTS, (is_split * pieces)[None, :], 0)
    found += tl.where(name == SPLITS, is_split[None, :], 0)
    return full, last, found


@triton.jit
def _store_item(items, at, line, begin, turn, end, part, mask):
    item = items + at.to(tl.int64) * 8
    tl.store(item, line, mask=mask)
    tl.store(item + 1, begin, mask=mask)
    tl.store(item + 2, tl.minimum(tl.maximum(turn, begin), end), mask=mask)
    tl.store(item + 3, end, mask=mask)
    tl.store(item + 4, part, mask=mask)


@triton.jit(do_not_specialize=["lists", "bound", "step", "most_items", "most_splits"])
def items_kernel(
    offsets,
    turns,
    items,
    splits,
    totals,
    offset_step,
    turn_step,
    lists,
    bound,
    step,
    most_items,
    most_splits,
    LISTS: tl.constexpr,
):
    """Program (LISTS lists)."""
    mine, place = tl.program_id(0), tl.arange(0, LISTS)
    every = tl.zeros([CLASSES, LISTS], tl.int32)
    earlier = tl.zeros([CLASSES, LISTS], tl.int32)
    for chunk in tl.range(0, tl.cdiv(lists, LISTS)):
        begin, end, pieces, size = _lengths(offsets, offset_step, chunk * LISTS + place, lists, bound, step)
        _, _, found = _classes(begin, end, pieces, size, bound)
        every += found
        earlier += tl.where(chunk < mine, found, 0)
    name = tl.arange(0, CLASSES)
    total = tl.sum(every, 1)
    longer = (name[None, :] > name[:, None]) & (name[None, :] <= LONGEST)
    first = tl.sum(tl.where(longer, total[None, :], 0), 1) + tl.sum(earlier, 1)

    line = mine * LISTS + place
    begin, end, pieces, size = _lengths(offsets, offset_step, line, lists, bound, step)
    full, last, found = _classes(begin, end, pieces, size, bound)
    at = first[:, None] + tl.cumsum(found, 1) - found
    at_full = tl.sum(tl.where(name[:, None] == full[None, :], at, 0), 0)
    at_last = tl.sum(tl.where(name[:, None] == last[None, :], at, 0), 0) + tl.where(full == last, pieces - 1, 0)
    part = tl.sum(tl.where(name[:, None] == PARTS, at, 0), 0)
    split = splits + tl.sum(tl.where(name[:, None] == SPLITS, at, 0), 0) * 4
    turn = tl.load(turns + line.to(tl.int64) * turn_step, mask=line < lists, other=0).to(tl.int32)

    rest = begin + (pieces - 1) * size
    of_last = tl.where(pieces > 1, part + pieces - 1, NO_PART)
    _store_item(items, at_last, line, rest, turn, end, of_last, line < lists)
    for piece in tl.range(0, tl.max(pieces) - 1):
        start = begin + piece * size
        _store_item(items, at_full + piece, line, start, turn, start + size, part + piece, piece < pieces - 1)
    tl.store(split, line, mask=pieces > 1)
    tl.store(split + 1, part, mask=pieces > 1)
    tl.store(split + 2, pieces, mask=pieces > 1)
    if mine == 0:
        made = tl.sum(tl.where(name <= LONGEST, total, 0))
        parts, split_lists = tl.sum(tl.where(name == PARTS, total, 0)), tl.sum(tl.where(name == SPLITS, total, 0))
        tl.store(totals, made)
        tl.store(totals + 1, split_lists)
        tl.store(totals + 2, parts)
        zero = tl.zeros([LISTS], tl.int32)
        for start in tl.range(made, most_items, LISTS):
            _store_item(items, start + place, zero, zero, zero, zero, zero + NOTHING, start + place < most_items)
        for start in tl.range(split_lists, most_splits, LISTS):
            left = splits + (start + place) * 4
            for field in tl.static_range(3):
                tl.store(left + field, zero, mask=start + place < most_splits)
