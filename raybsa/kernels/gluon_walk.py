"""What the kernels on Hopper share, whose loads have warps of their own (FlashAttention-3's schedule, 2407.08608).

A processor runs one or two programs, which stay: each takes every n-th work, an item of the plan and so many of its
tokens as its groups of warps hold, 64 each. One more warp issues the loads: the tokens that are kept, the tiles that
are walked, and on to the next work while this one is computed. For plain calls (no mask, segments, bias or dropout) of
16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.triton_descriptors import Boxes, boxes_of
from raybsa.kernels.triton_launch import Launcher, Tensors, launcher
from raybsa.kernels.triton_plan import Work
from raybsa.kernels.triton_setup import is_hopper, processors
from raybsa.kernels.triton_tiles import Tile

LOG2E = gl.constexpr(1.4426950408889634)
GROUP_ROWS = gl.constexpr(64)  # tokens of one group of warps
PATIENCE = gl.constexpr(64)  # looks, of somewhat under a microsecond, at how far the others are
CACHED = 25 << 20  # bytes of two tensors of a head, half of L2
ALIKE = 1.1  # lists are alike where the longest is no longer than so many times the mean


@dataclass(frozen=True)
class Form:
    """How a program is cut.

    Args:
        groups: of warps that compute, 64 tokens each; with one of them a processor runs two programs.
        cols: tokens of a tile that is walked.
        kept: works whose kept tokens shared memory holds.
        stages: walked tiles that it holds beside them.
    """

    groups: int
    cols: int
    kept: int
    stages: int

    @property
    def programs(self) -> int:
        """A processor's."""
        return 2 // self.groups

    def boxes(self, kept_block: int, walked_block: int, kept: dict[int, Any], walked: dict[int, Any]) -> Boxes:
        """What goes in as descriptors, and its tiles; empty where a tensor's strides or address do not allow it."""
        tile = Tile(GROUP_ROWS.value, self.cols, 4, self.stages, True)
        ours, theirs = boxes_of(tile, kept_block, tile.rows, kept), boxes_of(tile, walked_block, tile.cols, walked)
        return ours + theirs if ours and theirs else ()


def is_plain(call: AttentionCall) -> bool:
    """Whether these kernels serve what the call asks for, on its device."""
    fits = call.q.dtype in (torch.float16, torch.bfloat16) and call.scale > 0
    return fits and call.extra is None and is_hopper(call.q.device)


class Walk:
    """The launch of one of these kernels: all works of a plan, by programs that stay.

    Args:
        block: tokens of a block of the kept side.
        copies: how many heads share each list of the plan.
        together: programs begin their works together, so that what they load at one time lies close in the sequence:
            for lists that are alike and walk over more than L2 holds.
    """

    def __init__(self, kernel: Any, form: Form, work: Work, block: int, copies: int, like: Tensor, together: bool):
        self._kernel, self._form = kernel, form
        self.works = work.items.shape[0] * (block // (form.groups * GROUP_ROWS.value))
        self.total = self.works * copies
        self._programs = (max(1, min(form.programs * processors(like.device), self.total)), 1)
        self.meeting = like.new_zeros(2, dtype=torch.int32) if together else None
        self._launch: Launcher | None = None

    def __call__(self, tensors: Tensors, numbers: tuple[int | float, ...], boxes: Boxes, constants: tuple[Any, ...]):
        """Runs it; boxes and constants matter in the first call only."""
        if self._launch is None:
            registers = 128 if self._form.programs == 2 else None  # of a thread, before the groups trade them
            self._launch = launcher(
                self._kernel, tensors, (), constants, 4, 1, boxes, describe=_descriptor, registers=registers
            )
        self._launch(self._programs, tensors, numbers)


def walk_together(work: Work, walked_tokens: int, head_dim: int) -> bool:
    """Whether programs should begin the works of a plan together: see ``Walk``. Reads the longest list back."""
    if 4 * walked_tokens * head_dim <= CACHED or work.parts or not work.items.shape[0]:
        return False
    lengths = (work.items[:, 3] - work.items[:, 1]).float()
    return bool(lengths.max() <= ALIKE * lengths.mean())


def _descriptor(tensor: Tensor, box: tuple[int, ...]) -> Any:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box), layout)


@gluon.jit
def place(items, index, total, groups, blocks, parts, item_count, BLOCK: gl.constexpr, GROUPS: gl.constexpr):
    """Of work ``index``: its flat head, block, first token in it, begin, turn and end, and its part.

    The part is a row of all copies' parts; -1 for a whole list, less for work that is none.
    """
    TURNS: gl.constexpr = BLOCK // (GROUPS * GROUP_ROWS)
    index = gl.minimum(index, total - 1)
    copy = index // item_count
    number = index % item_count
    item = items + (number // TURNS) * 8
    line, begin, turn = gl.load(item), gl.load(item + 1), gl.load(item + 2)
    end, part = gl.load(item + 3), gl.load(item + 4)
    flat_head = copy * groups + line // blocks
    part_row = gl.where(part >= 0, copy * parts + part, part)
    return flat_head, line % blocks, (number % TURNS) * GROUPS * GROUP_ROWS, begin, turn, end, part_row


@gluon.jit
def hide_keys(
    s,
    i,
    whole,
    col_indices,
    kv_starts,
    begin,
    q_position,
    kv_tokens,
    KV_BLOCK: gl.constexpr,
    COLS: gl.constexpr,
    CAUSAL: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Scores (queries, keys) of tile ``i`` of a row, with what the diagonal or the ragged end cuts at -inf.

    Nothing is cut before tile ``whole``.
    """
    if i >= whole:
        PER: gl.constexpr = KV_BLOCK // COLS
        block = gl.load(col_indices + begin + i // PER)
        lane = (i % PER) * COLS + gl.arange(0, COLS, gl.SliceLayout(0, LAYOUT))
        s = gl.where((block * KV_BLOCK + lane < kv_tokens)[None, :], s, float("-inf"))
        if CAUSAL:
            first = block * KV_BLOCK
            if kv_starts is not None:
                first = gl.load(kv_starts + block).to(gl.int32)
            s = gl.where((first + lane)[None, :] <= q_position[:, None], s, float("-inf"))
    return s


@gluon.jit
def meet(meeting, number, total):
    """Waits until all programs have come to their work ``number``, or for so long that somebody must be kept away.

    Nothing but speed depends on it. ``meeting`` counts the arrivals of a launch; works that only some programs have are
    not waited for.
    """
    if meeting is not None:
        programs = gl.num_programs(0)
        if (number > 0) & (number < total // programs):
            seen = gl.atomic_add(meeting, 1) + 1
            looks = 0
            while (seen < number * programs) & (looks < PATIENCE):
                seen = gl.load(meeting, volatile=True)
                looks += 1


@gluon.jit
def part(meeting):
    """After its last work: the last program to leave makes the count ready for the next launch."""
    if meeting is not None:
        if gl.atomic_add(meeting + 1, 1) == gl.num_programs(0) - 1:
            gl.store(meeting, 0)
            gl.store(meeting + 1, 0)
