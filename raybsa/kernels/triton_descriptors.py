"""Tensors as TMA descriptors: on Hopper and later one instruction loads a tile, without a pointer for each token."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from raybsa.kernels.triton_tiles import Tile, padded_head_dim


def as_descriptors(block_size: int, tile: Tile, *tensors: Tensor) -> tuple[tuple[Any, ...], bool]:
    """The tensors (B, H, S, D) as descriptors of (tile.cols, padded D) tiles and True; themselves and False where a
    block does not hold a tile, their strides do not fit or the GPU has none."""
    if not tile.descriptors or block_size < tile.cols or not _has_descriptors(tensors[0].device):
        return tensors, False
    if not all(_fits(tensor) for tensor in tensors):
        return tensors, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    block = [1, 1, tile.cols, padded_head_dim(tensors[0].shape[-1])]
    return tuple(TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x in tensors), True


def _fits(x: Tensor) -> bool:
    """Numbers of a token lie together, everything else begins at multiples of 16 bytes."""
    size = x.element_size()
    steps = all(step > 0 and step * size % 16 == 0 for step in x.stride()[:3])
    return steps and x.stride(3) == 1 and x.data_ptr() % 16 == 0 and x.numel() > 0


@cache
def _has_descriptors(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
