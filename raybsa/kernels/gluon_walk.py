"""What the kernels on Hopper share, whose loads have warps of their own (FlashAttention-3's schedule, 2407.08608).

A processor runs one or two programs, which stay and take one work after another: an item of the plan, and so many of
its tokens as the program's groups of warps hold, 64 each. One more warp takes the works and issues the loads: the
tokens that are kept, the tiles that are walked, and on to the next work while this one is computed. For plain calls (no
mask, segments, bias or dropout) of 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
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
from raybsa.kernels.triton_setup import current_stream, is_hopper, processors
from raybsa.kernels.triton_tiles import Tile

LOG2E = gl.constexpr(1.4426950408889634)
GROUP_ROWS = gl.constexpr(64)  # tokens of one group of warps
FACTS = gl.constexpr(8)  # room for what is told of a work


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
    """

    def __init__(self, kernel: Any, form: Form, work: Work, block: int, copies: int, device: torch.device) -> None:
        self._kernel, self._form = kernel, form
        self.works = work.items.shape[0] * (block // (form.groups * GROUP_ROWS.value))
        self.total = self.works * copies
        self._programs = (max(1, min(form.programs * processors(device), self.total)), 1)
        self._device, self._dealt = device, dict[int, Tensor]()
        self._launch: Launcher | None = None

    def __call__(
        self, tensors: Tensors, numbers: tuple[int | float, ...], constants: tuple[Any, ...], boxes: Callable[[], Boxes]
    ) -> None:
        """Runs it on ``(*tensors, how many works programs have taken)``; constants and boxes matter in the first call
        only."""
        tensors = (*tensors, self._count())
        if self._launch is None:
            registers = 128 if self._form.programs == 2 else None  # of a thread, before the groups trade them
            self._launch = launcher(
                self._kernel, tensors, (), constants, 4, 1, boxes(), describe=_descriptor, registers=registers
            )
        self._launch(self._programs, tensors, numbers)

    def _count(self) -> Tensor:
        """(1,) int32 zero, which the kernel leaves as zero: one a stream, as launches on two may run at one time, and
        one a launch in a CUDA graph, which may be replayed on any."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.zeros(1, dtype=torch.int32, device=self._device)
        stream = current_stream(self._device.index)
        if stream not in self._dealt:
            self._dealt[stream] = torch.zeros(1, dtype=torch.int32, device=self._device)
        return self._dealt[stream]


def _descriptor(tensor: Tensor, box: tuple[int, ...]) -> Any:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box), layout)


@gluon.jit
def take(dealt, total):
    """The number of the next work, ``total`` or more where none is left; when all programs have heard so, ``dealt`` is
    zero again, for the next launch."""
    # `atom.inc` wraps around by itself; and of one `atom.add` for all lanes ptxas makes a branch after which the lanes
    # of this warp go on apart (of Triton 3.6).
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    counted = gl.inline_asm_elementwise(
        "{ .reg .pred first; setp.eq.s32 first, $1, 0; mov.u32 $0, 0; @first atom.global.inc.u32 $0, [$2], $3; }",
        "=r,r,l,r",
        [lane, dealt + lane * 0, lane * 0 + (total + gl.num_programs(0) - 1)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    return gl.sum(counted, 0)


@gluon.jit
def place(items, index, total, groups, blocks, parts, item_count, BLOCK: gl.constexpr, GROUPS: gl.constexpr):
    """Of work ``index``: its flat head, block, first token in it, begin, turn and end, and its part.

    The flat head is -1 where there is no such work; the part is a row of all copies' parts, -1 for a whole list, less
    for work that writes nothing.
    """
    TURNS: gl.constexpr = BLOCK // (GROUPS * GROUP_ROWS)
    known = gl.minimum(index, total - 1)
    copy = known // item_count
    number = known % item_count
    item = items + (number // TURNS) * 8
    line, begin, turn = gl.load(item), gl.load(item + 1), gl.load(item + 2)
    end, part = gl.load(item + 3), gl.load(item + 4)
    flat_head = gl.where(index < total, copy * groups + line // blocks, -1)
    part_row = gl.where(part >= 0, copy * parts + part, part)
    return flat_head, line % blocks, (number % TURNS) * GROUPS * GROUP_ROWS, begin, turn, end, part_row


@gluon.jit
def _tell(told, at, value):
    told.index(at).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def _hear(told, at):
    return gl.sum(told.index(at).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def tell(told, slot, flat_head, block, in_block, begin, turn, end, part_row):
    """Leaves what ``place`` said in shared memory, for the groups that compute."""
    _tell(told, slot * FACTS, flat_head)
    _tell(told, slot * FACTS + 1, block)
    _tell(told, slot * FACTS + 2, in_block)
    _tell(told, slot * FACTS + 3, begin)
    _tell(told, slot * FACTS + 4, turn)
    _tell(told, slot * FACTS + 5, end)
    _tell(told, slot * FACTS + 6, part_row)


@gluon.jit
def hear(told, slot):
    """What ``tell`` left."""
    at = slot * FACTS
    head, block, in_block = _hear(told, at), _hear(told, at + 1), _hear(told, at + 2)
    begin, turn, end = _hear(told, at + 3), _hear(told, at + 4), _hear(told, at + 5)
    return head, block, in_block, begin, turn, end, _hear(told, at + 6)
