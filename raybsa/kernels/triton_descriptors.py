"""Which tensors go in as TMA descriptors: on Hopper and later one instruction loads a tile, without pointers."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from raybsa.kernels.triton_launch import Boxes
from raybsa.kernels.triton_tiles import Tile, padded_head_dim


def boxes_of(block_size: int, tile: Tile, walked: dict[int, Tensor]) -> Boxes:
    """The places of the walked tensors (B, H, S, D), each with the tile (tile.cols, padded D) that a program loads.

    Empty where a block does not hold a tile, their strides do not fit or the GPU has no TMA.
    """
    tensors = list(walked.values())
    if not tile.descriptors or block_size < tile.cols or not _has_descriptors(tensors[0].device):
        return ()
    if not all(_fits(tensor) for tensor in tensors):
        return ()
    return tuple((place, (1, 1, tile.cols, padded_head_dim(x.shape[-1]))) for place, x in walked.items())


def _fits(x: Tensor) -> bool:
    """Numbers of a token lie together, everything else begins at multiples of 16 bytes."""
    size = x.element_size()
    steps = all(step > 0 and step * size % 16 == 0 for step in x.stride()[:3])
    return steps and x.stride(3) == 1 and x.data_ptr() % 16 == 0 and x.numel() > 0


@cache
def _has_descriptors(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
