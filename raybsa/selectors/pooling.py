"""What a selector sees of q and k: a few numbers a block. O(N) work, and nothing of a query's own future.

A causal row of blocks may not choose by its own tokens, for they are the future of its first token. So its query is
pooled over the block *before* it, and of its own block only the first token is read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raybsa.kernels.triton_setup import why_not_here


def runs_kernels(x: Tensor) -> bool:
    """Whether kernels of our own may compute what needs no gradient: on a GPU, outside of ``torch.compile``, which
    fuses torch's operations itself."""
    return x.is_cuda and not torch.compiler.is_compiling() and why_not_here(x.device) is None


def block_stats(x: Tensor, block_size: int, taken: Tensor | None = None) -> Tensor:
    """(B, H, n, 3, D) in at least float32: mean, maximum and first token of each block of ``x`` (B, H, S, D).

    A ragged last block is pooled over its own tokens. On a GPU, where no gradient is wanted, in one pass.

    Args:
        taken: (b, g, S) bool, b being B or 1 and g the heads, their groups or 1: tokens to pool over, 0 where a block
            has none, and for the first token where it is none of them; None: all.
    """
    if taken is not None:
        return _some_stats(x, block_size, taken)
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


def _some_stats(x: Tensor, block_size: int, taken: Tensor) -> Tensor:
    """Of the tokens ``taken`` (b, g, S). What is not taken gets no gradient either."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    blocks, taken = taken_blocks(x, block_size, taken)
    counts, held = taken.sum(3), torch.where(taken, blocks, 0.0)
    top = torch.where(taken, blocks, float("-inf")).amax(3).to(wide).masked_fill(counts == 0, 0.0)
    return torch.stack([held.sum(3, dtype=wide) / counts.clamp(min=1), top, held[:, :, :, 0].to(wide)], 3)


def taken_blocks(x: Tensor, block_size: int, taken: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, n, block_size, D) and bool (b, H or 1, n, block_size, 1) of x (B, H, S, D) and ``taken`` (b, g, S)."""
    blocks = F.pad(x, (0, 0, 0, -x.shape[2] % block_size)).unflatten(2, (-1, block_size))
    taken = F.pad(per_head(taken, x.shape[1]), (0, -x.shape[2] % block_size))
    return blocks, taken.unflatten(2, (-1, block_size))[..., None]


def per_head(x: Tensor, heads: int) -> Tensor:
    """(b, heads or 1, ...) of ``x`` (b, g, ...), g being 1 or groups of as many heads each."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)


def key_features(stats: Tensor, reads_before: Tensor | None = None) -> Tensor:
    """(B, Hkv, n, 4 D): mean and maximum of each block and of the block before it, 0 where there is none or
    ``reads_before`` (b, g, n) is False: what a query asks for often lies right after what it resembles."""
    own = stats[:, :, :, :2]
    before = blocks_before(own)
    if reads_before is not None:
        before = torch.where(reads_before[..., None, None], before, 0.0)
    return torch.cat([own, before], 3).flatten(3)


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
    return F.pad(stats[:, :, :-1], (0, 0, 0, 0, 1, 0))
