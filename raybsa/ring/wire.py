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
    batch, kv_heads, _, block_size, head_dim = blocks.shape
    return 2, batch * kv_heads // kv_groups, count, block_size * head_dim


def pack(keys: Tensor, values: Tensor, places: Tensor, kv_groups: int) -> Tensor:
    """K and V at ``places`` of blocks (B, Hkv, n, block_size, D), in ``wire_shape``."""
    wire = keys.new_empty(wire_shape(keys, len(places), kv_groups))
    for part, blocks in zip(wire, (keys, values), strict=True):
        torch.index_select(_by_place(blocks.contiguous(), kv_groups), 1, places, out=part)
    return wire


def unpack(wire: Tensor, like: Tensor, places: Tensor, num_blocks: int, kv_groups: int) -> tuple[Tensor, Tensor]:
    """K and V (B, Hkv, num_blocks, block_size, D) with what came at ``places``; the rest is zero.

    ``like``: blocks (B, Hkv, n, block_size, D) of the rank's own. Of one group every block comes, in its order: then
    the wire is what is asked for.
    """
    shape = (*like.shape[:2], num_blocks, *like.shape[3:])
    if kv_groups > 1:
        whole = wire.new_zeros(2, *shape)
        whole.view(*wire.shape[:2], -1, wire.shape[3]).index_copy_(2, places, wire)
        wire = whole
    keys, values = wire.view(2, *shape)
    return keys, values


def add_packed(keys: Tensor, values: Tensor, wire: Tensor, places: Tensor, kv_groups: int) -> None:
    """Adds what came to contiguous blocks (B, Hkv, n, block_size, D) at ``places``, none of which repeats."""
    for blocks, part in zip((keys, values), wire, strict=True):
        _by_place(blocks, kv_groups).index_add_(1, places, part.to(blocks.dtype))


def _by_place(blocks: Tensor, kv_groups: int) -> Tensor:
    """A view (samples and heads that travel together, places, numbers of a block) of contiguous blocks (B, Hkv, n,
    block_size, D)."""
    batch, kv_heads, count, block_size, head_dim = blocks.shape
    return blocks.view(batch * kv_heads // kv_groups, kv_groups * count, block_size * head_dim)
