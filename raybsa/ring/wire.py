"""What travels: K and V (or their gradients) of chosen blocks, in one contiguous buffer, and back into place.

A *place* names a block of one KV group: ``kv_group * num_blocks + block``. With one group a block travels with all its
samples and KV heads, with a group per KV head with all samples of that head, else alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def as_blocks(x: Tensor, block_size: int) -> Tensor:
    """(B, Hkv, n, block_size, D) of x (B, Hkv, S, D); a ragged end is filled with zeros."""
    missing = -x.shape[2] % block_size
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return x.unflatten(2, (-1, block_size))


def as_tokens(blocks: Tensor, tokens: int) -> Tensor:
    """(B, Hkv, tokens, D) of blocks (B, Hkv, n, block_size, D)."""
    return blocks.flatten(2, 3)[:, :, :tokens]


def wire_shape(blocks: Tensor, count: int, kv_groups: int) -> tuple[int, ...]:
    """The shape of K and V of ``count`` places, from blocks (B, Hkv, n, block_size, D)."""
    return (2, count, *_by_group(blocks, kv_groups).shape[2:])


def pack(keys: Tensor, values: Tensor, places: Tensor, kv_groups: int, dtype: torch.dtype) -> Tensor:
    """(2, len(places), ...) in ``dtype``: K and V at ``places`` of blocks (B, Hkv, n, block_size, D)."""
    at = (places // keys.shape[2], places % keys.shape[2])
    return torch.stack([_by_group(x, kv_groups)[at].to(dtype) for x in (keys, values)])


def unpack(wire: Tensor, like: Tensor, places: Tensor, num_blocks: int, kv_groups: int) -> tuple[Tensor, Tensor]:
    """K and V (B, Hkv, num_blocks, block_size, D) with what came at ``places``; the rest is zero.

    ``like``: blocks (B, Hkv, n, block_size, D) of the rank's own.
    """
    at = (places // num_blocks, places % num_blocks) if num_blocks else (places, places)
    shape = (*like.shape[:2], num_blocks, *like.shape[3:])
    fill = like.new_empty if kv_groups == 1 else like.new_zeros  # of one group every block comes; of more, some may not
    pair = (fill(shape), fill(shape))
    for whole, part in zip(pair, wire, strict=True):
        _by_group(whole, kv_groups)[at] = part.to(whole.dtype)
    return pair


def add_packed(keys: Tensor, values: Tensor, wire: Tensor, places: Tensor, kv_groups: int) -> None:
    """Adds what came to blocks (B, Hkv, n, block_size, D) at ``places``, none of which repeats."""
    at = (places // keys.shape[2], places % keys.shape[2])
    for whole, part in zip((keys, values), wire, strict=True):
        _by_group(whole, kv_groups)[at] += part.to(whole.dtype)


def _by_group(blocks: Tensor, kv_groups: int) -> Tensor:
    """A view (kv_groups, n, what travels together ...) of blocks (B, Hkv, n, block_size, D)."""
    batch, kv_heads = blocks.shape[:2]
    if kv_groups == 1:
        return blocks.permute(2, 0, 1, 3, 4)[None]
    if kv_groups == kv_heads:
        return blocks.permute(1, 2, 0, 3, 4)
    assert kv_groups == batch * kv_heads
    return blocks.flatten(0, 1)[:, :, None]
