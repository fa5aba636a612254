"""Butterfly: blocks whose numbers differ in one bit. Pixelated Butterfly, Dao et al. 2021, arXiv:2112.00029."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.grid import Grid
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots

_CHOICES = 4  # a causal row may see half of its partners or fewer: ask for more than it needs


@dataclass(frozen=True)
class Butterfly(Pattern):
    """Tokens see one another iff the numbers of their KV blocks differ in at most one bit: the flat sum of all levels
    of an FFT's butterfly.

    A density sets how many partners a row has: the same number in all rows, as far as they see so many blocks, and one
    more in evenly spread ones. Those that differ in one bit come first, then in two, in three, ...; low bits before
    high ones.
    """

    family: ClassVar[str] = "butterfly"

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        row, unit = grid.units
        reach = max(grid.num_kv_blocks, grid.q_len // grid.kv_block_size + 1)
        partners = unit[:, None] ^ 2 ** torch.arange(reach.bit_length(), device=grid.device)
        return row.repeat_interleave(partners.shape[1]), partners.reshape(-1)

    def own(self, grid: Grid) -> Tensor:
        return grid.allowed  # rows are even

    def order(self, slots: Slots) -> Tensor:
        flips = _flips(slots.grid)
        unit, turn = slots.first + slots.rank % slots.width, slots.rank // slots.width
        index = _CHOICES * turn[:, None] + torch.arange(_CHOICES, device=turn.device)
        return unit[:, None] ^ flips[index.clamp(max=len(flips) - 1)]


def _flips(grid: Grid) -> Tensor:
    """(2**bits,) int64: every set of bits to flip, small sets first, then by value; the empty set is one of them."""
    bits = max(1, (grid.num_kv_blocks - 1).bit_length())
    flips = torch.arange(2**bits, device=grid.device)
    size = torch.zeros_like(flips)
    for bit in range(bits):
        size += flips >> bit & 1
    return flips[torch.argsort(size * len(flips) + flips)]
