"""What a selector sees of q and k: a few numbers a block. O(N) work, and nothing of a query's own future.

A causal row of blocks may not choose by its own tokens, for they are the future of its first token. So its query is
pooled over the block *before* it, and of its own block only the first token is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raybsa.kernels.triton_setup import why_not_here


def runs_kernels(x: Tensor) -> bool:
    """Whether kernels of our own may compute what needs no gradient: on a GPU, outside of ``torch.compile``, which
    fuses torch's operations itself."""
    return x.is_cuda and not torch.compiler.is_compiling() and why_not_here(x.device) is None


def block_stats(x: Tensor, block_size: int) -> Tensor:
    """(B, H, n, 3, D) in at least float32: mean, maximum and first token of each block of ``x`` (B, H, S, D).

    A ragged last block is pooled over its own tokens. On a GPU, where no gradient is wanted, in one pass.
    """
    if runs_kernels(x) and not (x.requires_grad and torch.is_grad_enabled()):
        from raybsa.selectors.triton_pool import pooled

        return pooled(x, block_size)
    whole = x.shape[2] // block_size * block_size
    parts = [_stats(x[:, :, :whole].unflatten(2, (-1, block_size)))] if whole else []
    if whole < x.shape[2]:
        parts.append(_stats(x[:, :, None, whole:]))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _stats(blocks: Tensor) -> Tensor:
    """(B, H, n, 3, D) of (B, H, n, tokens, D)."""
    wide = torch.float64 if blocks.dtype == torch.float64 else torch.float32
    return torch.stack([blocks.mean(3, dtype=wide), blocks.amax(3).to(wide), blocks[:, :, :, 0].to(wide)], 3)


def key_features(stats: Tensor) -> Tensor:
    """(B, Hkv, n, 4 D): mean and maximum of each block and of the block before it, 0 where there is none: what a query
    asks for often lies right after what it resembles."""
    own = stats[:, :, :, :2]
    return torch.cat([own, blocks_before(own)], 3).flatten(3)


def query_features(stats: Tensor, before: Tensor | None, kv_heads: int) -> Tensor:
    """(B, Hkv, n, H / Hkv * 3 D): mean, maximum and first token, query heads of a KV head side by side.

    Args:
        stats: (B, H, n, 3, D) of the rows' own blocks.
        before: (B, H, n, 3, D) of the blocks before them, 0 where there is none: a causal row's mean and maximum. None
            where rows may choose by all their tokens.
        kv_heads: Hkv.
    """
    if before is not None:
        stats = torch.cat([before[:, :, :, :2], stats[:, :, :, 2:]], 3)
    grouped = stats.unflatten(1, (kv_heads, -1))
    return grouped.permute(0, 1, 3, 2, 4, 5).flatten(3)


def blocks_before(stats: Tensor) -> Tensor:
    """(B, H, n, 3, D): the statistics one block on, 0 in the first place."""
    return torch.nn.functional.pad(stats[:, :, :-1], (0, 0, 0, 0, 1, 0))
