"""Which tensors go in as TMA descriptors: on Hopper and later one instruction moves a tile, without pointers."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from raybsa.kernels.triton_launch import Boxes
from raybsa.kernels.triton_tiles import Tile, padded_head_dim


def boxes_of(tile: Tile, block_size: int, tokens: int, tensors: dict[int, Tensor | None]) -> Boxes:
    """The places of the tensors (B, H, S, D), each with the (tokens, padded D) that a program moves at once.

    Empty where a block does not hold so many tokens, the tensors' strides do not fit or the GPU has no TMA.
    """
    given = {place: x for place, x in tensors.items() if x is not None}
    if not tile.descriptors or block_size < tokens or not all(_fits(x) for x in given.values()):
        return ()
    if not all(_has_descriptors(x.device) for x in given.values()):
        return ()
    return tuple((place, (1, 1, tokens, padded_head_dim(x.shape[-1]))) for place, x in given.items())


def _fits(x: Tensor) -> bool:
    """Numbers of a token lie together, everything else begins at multiples of 16 bytes."""
    size = x.element_size()
    steps = all(step > 0 and step * size % 16 == 0 for step in x.stride()[:3])
    return steps and x.stride(3) == 1 and x.data_ptr() % 16 == 0 and x.numel() > 0


@cache
def _has_descriptors(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
