"""Random choices without repeats in O(choices): a keyed permutation of 0 .. size - 1, evaluated where it is asked.

Swap-or-not, Hoang, Morris and Rogaway 2012, eprint 2012/254: each round pairs every value with another (``key - value``
modulo size) and swaps the pair or not by a hash of both, so it is a permutation for any size. 16 rounds leave a value
where it was with a probability of 2**-16, which is enough for layouts and not for secrets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raybsa.counter import Stream, hash_u32
from raybsa.kernels.triton_setup import INSTALLED

_ROUNDS = 16
_CHUNK = 1 << 17  # values at once, so that the rounds work in a CPU's cache


def permuted(value: Tensor, row: Tensor, size: Tensor, key: Tensor) -> Tensor:
    """The image of each value under its row's permutation, the same on every device.

    Args:
        value: (n,) int64 in 0 .. size - 1 of its row.
        row: (n,) int64 into ``size`` and ``key``.
        size: (rows,) int64, positive.
        key: (rows,) int64 32-bit numbers, one a permutation.
    """
    if value.device.type == "cuda" and INSTALLED:
        from raybsa.patterns.triton_permutation import permuted_by_triton

        return permuted_by_triton(value, row, size, key, _ROUNDS)
    keys = [hash_u32(turn, Stream.LAYOUT, key) for turn in range(_ROUNDS)]
    pivots = [key % size for key in keys]
    parts = zip(value.split(_CHUNK), row.split(_CHUNK), strict=True)
    return torch.cat([_swapped(part, its_row, size, keys, pivots) for part, its_row in parts])


def _swapped(value: Tensor, row: Tensor, size: Tensor, keys: list[Tensor], pivots: list[Tensor]) -> Tensor:
    sizes = size[row]
    for turn, (key, pivot) in enumerate(zip(keys, pivots, strict=True)):
        other = pivot[row] - value
        other = torch.where(other < 0, other + sizes, other)
        coin = hash_u32(turn, Stream.LAYOUT, key[row] ^ torch.maximum(value, other)) & 1
        value = torch.where(coin.bool(), other, value)
    return value
