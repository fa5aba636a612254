"""Power of two: blocks at distances 1, 2, 4, 8, ... LogSparse Transformer, Li et al. 2019, arXiv:1907.00235."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.grid import Grid
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots


@dataclass(frozen=True)
class PowerOfTwo(Pattern):
    """Tokens see one another iff the distance of their KV blocks is 0 or a power of two.

    A density sets how many distances a row sees: the same number in all rows, as far as they see so many blocks, and
    one more in evenly spread ones. The distances get finer evenly on the logarithmic scale: first the powers of two,
    then the middle of each octave, then its quarters, its eighths, ...; short distances before long ones at each step.
    """

    family: ClassVar[str] = "power_of_two"

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        row, unit = grid.units
        reach = max(grid.num_kv_blocks, grid.q_len // grid.kv_block_size + 1)
        powers = 2 ** torch.arange(reach.bit_length(), device=grid.device)
        cols = torch.cat([unit[:, None] - powers, unit[:, None] + powers], 1)
        return row.repeat_interleave(cols.shape[1]), cols.reshape(-1)

    def own(self, grid: Grid) -> Tensor:
        return grid.allowed  # rows are even

    def order(self, slots: Slots) -> Tensor:
        distance = _distances(slots.grid)
        pair = 2 * slots.rank[:, None] + torch.arange(2, device=slots.rank.device)
        distance = distance[pair.clamp(max=len(distance) - 1)]
        return torch.stack([slots.first[:, None] - distance, slots.last[:, None] + distance], 2).flatten(1)


def _distances(grid: Grid) -> Tensor:
    """(num_kv_blocks,) int64: 1, 2, 4, ..., 3, 6, 12, ..., 5, 10, ..., 7, 14, ...: all distances, in order."""
    distance = torch.arange(1, grid.num_kv_blocks + 1, device=grid.device)
    bits = grid.num_kv_blocks.bit_length()
    octave = sum((distance >= 2**k).long() for k in range(1, bits)) + torch.zeros_like(distance)
    place = distance - 2**octave
    step = torch.zeros_like(distance)  # the place's bits in reverse: 0, then 1/2, then 1/4 and 3/4 of the octave, ...
    for bit in range(bits):
        step |= torch.where(bit < octave, (place >> bit & 1) << (octave - 1 - bit).clamp(min=0), 0)
    return distance[torch.argsort(step * bits + octave)]
