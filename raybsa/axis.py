"""Axis: the query side or the key side of a layout: a sequence cut into blocks, and which of them are at hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from raybsa.aside import made_aside


@dataclass(frozen=True, eq=False)
class Axis:
    """One side of a layout.

    Args:
        side: which, for what is refused.
        length: tokens of the whole (global) sequence.
        block_size: tokens of a block; the last block may be ragged.
        ids: (count,) int64, strictly increasing global ids of the blocks at hand; None means all of them.
        device: where ``ids`` and what follows from them live.
    """

    side: Literal["q", "kv"]
    length: int
    block_size: int
    ids: Tensor | None
    device: torch.device

    def __post_init__(self) -> None:
        ids = self.ids
        if ids is not None and (ids.dim() != 1 or ids.dtype != torch.int64):
            raise ValueError(f"{self.side}_block_ids must be int64 (num_blocks,), got {ids.dtype} {tuple(ids.shape)}")

    @property
    def count(self) -> int:
        """Blocks at hand."""
        return num_blocks(self.length, self.block_size) if self.ids is None else len(self.ids)

    @cached_property
    def tokens(self) -> int:
        """Tokens at hand."""
        if self.ids is None:
            return self.length
        if not len(self.ids):
            return 0
        ragged = max(0, (int(self.ids[-1]) + 1) * self.block_size - self.length)
        return len(self.ids) * self.block_size - ragged

    @property
    def all_ids(self) -> Tensor:
        """(count,) int64: the ids, also where they go without saying."""
        return torch.arange(self.count, device=self.device) if self.ids is None else self.ids

    @made_aside
    def starts(self) -> Tensor:
        """(count,) int64: global position of each block's first token."""
        return self.all_ids * self.block_size

    @made_aside
    def lasts(self) -> Tensor:
        """(count,) int64: global position of each block's last token."""
        return (self.starts + self.block_size).clamp(max=self.length) - 1

    def keep(self, wanted: Tensor | None) -> tuple[Axis, Tensor | None]:
        """The axis with the blocks ``wanted`` (global ids) alone, and (n,) int64 their places at hand; itself and None
        where all are kept.

        Raises:
            ValueError: ids that do not ascend strictly, or that are not at hand.
        """
        if wanted is None:
            return self, None
        wanted = wanted.to(self.device, torch.int64)
        held = self.all_ids
        place = torch.searchsorted(held, wanted)
        found = torch.cat([held, held.new_full((1,), -1)])[place]
        if bool((wanted.diff() <= 0).any() or (found != wanted).any() or (wanted < 0).any()):
            raise ValueError(
                f"{self.side}_blocks must be strictly increasing ids of blocks at hand, got {wanted.tolist()[:16]}"
            )
        return Axis(self.side, self.length, self.block_size, wanted, self.device), place

    def to(self, device: torch.device | str) -> Axis:
        """The axis with its ids on ``device``."""
        ids = None if self.ids is None else self.ids.to(device)
        return Axis(self.side, self.length, self.block_size, ids, torch.device(device))

    def validate(self) -> None:
        """Raises ValueError where the ids do not ascend strictly within the sequence's blocks."""
        if self.ids is None or not len(self.ids):
            return
        total = num_blocks(self.length, self.block_size)
        if bool((self.ids.diff() <= 0).any()) or int(self.ids[0]) < 0 or int(self.ids[-1]) >= total:
            raise ValueError(f"{self.side}_block_ids must ascend strictly within 0..{total - 1}")


def num_blocks(length: int, block_size: int) -> int:
    """Blocks that cover ``length`` tokens; the last may be ragged."""
    return -(-length // block_size)


def check_geometry(q_len: int, kv_len: int, q_block_size: int, kv_block_size: int) -> None:
    """Raises ValueError unless lengths are positive and block sizes are positive powers of two."""
    for name, length in (("q_len", q_len), ("kv_len", kv_len)):
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(f"{name} must be a positive integer, got {length!r}")
    for name, size in (("q_block_size", q_block_size), ("kv_block_size", kv_block_size)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size & (size - 1):
            raise ValueError(f"{name} must be a positive power of two, got {size!r}")


def whole_axes(
    q_len: int, kv_len: int, q_block_size: int, kv_block_size: int | None, device: torch.device
) -> tuple[Axis, Axis]:
    """The query and the key side of whole sequences; KV blocks are as query blocks unless said. Checks the geometry."""
    kv_block_size = q_block_size if kv_block_size is None else kv_block_size
    check_geometry(q_len, kv_len, q_block_size, kv_block_size)
    return Axis("q", q_len, q_block_size, None, device), Axis("kv", kv_len, kv_block_size, None, device)
