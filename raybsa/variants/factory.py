"""The two functions that make a variant from plain arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from raybsa.variants.adaptive import BlockSparseAdaptive
from raybsa.variants.base import BlockSparseBase
from raybsa.variants.distributed import BlockSparseDistributed, DistributedConfig
from raybsa.variants.multihead import BlockSparseMultihead
from raybsa.variants.source import DEFAULT_DENSITY, PatternLike, adaptive_options

VARIANTS = ("auto", "base", "adaptive", "distributed")


def create_block_sparse_attention(
    variant: str = "auto",
    *,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    density: float | None = None,
    sparsity_ratio: float | None = None,
    block_size: int = 64,
    pattern: PatternLike | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
    distributed_config: DistributedConfig | Mapping[str, Any] | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
) -> nn.Module:
    """A module that takes q, k and v as (B, H, S, D) and returns the same.

    Args:
        variant: ``"base"``, ``"adaptive"`` or ``"distributed"``; ``"auto"`` is ``"base"``, or ``"adaptive"`` where the
            pattern is named so.
        density: share of the allowed blocks to keep, in (0, 1]. None keeps what the pattern gives by itself; where
            there is no pattern either, 0.1.
        sparsity_ratio: another word for ``density`` (0.01 keeps 1 % of the blocks); give one of the two.
        distributed_config: for ``"distributed"`` alone; a mapping has the arguments of a ``DistributedConfig``.
        num_heads, head_dim, num_kv_heads: of q and k; what is adaptive needs the first two, the others take any.
        pattern: as in BlockSparseBase; for ``"adaptive"`` None or ``{"name": "adaptive", "params": {...}}`` with the
            options of ``BlockSelector``.
        segment_lengths, dilation_rates, block_size, causal, dropout, scale, backend: as in BlockSparseBase.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message names what was wanted and what came.
    """
    if variant not in VARIANTS:
        raise ValueError(
            f"variant must be one of {list(VARIANTS)}, got {variant!r} "
            "(create_multihead_block_sparse makes the multihead variant)"
        )
    density = _density(density, sparsity_ratio)
    if distributed_config is not None and variant != "distributed":
        raise ValueError(f"distributed_config goes with variant 'distributed', got it with {variant!r}")
    options = adaptive_options(pattern)
    heads: dict[str, Any] = {"num_heads": num_heads, "head_dim": head_dim, "num_kv_heads": num_kv_heads}
    arguments: dict[str, Any] = {
        "segment_lengths": segment_lengths,
        "dilation_rates": dilation_rates,
        "block_size": block_size,
        "causal": causal,
        "dropout": dropout,
        "scale": scale,
        "backend": backend,
    }
    if variant == "adaptive" or (variant == "auto" and options is not None):
        if pattern is not None and options is None:
            raise ValueError(
                f"variant 'adaptive' chooses its blocks itself and takes no other pattern, got {pattern!r}"
            )
        density = DEFAULT_DENSITY if density is None else density
        return BlockSparseAdaptive(**arguments, **heads, density=density, **(options or {}))
    arguments |= {"pattern": pattern, "density": density}
    if variant == "distributed":
        if isinstance(distributed_config, Mapping):
            distributed_config = DistributedConfig(**distributed_config)
        return BlockSparseDistributed(distributed_config, **arguments, **heads)
    return BlockSparseBase(**arguments)


def create_multihead_block_sparse(
    embed_dim: int,
    num_heads: int,
    *,
    density: float | None = None,
    sparsity_ratio: float | None = None,
    block_size: int = 64,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    pattern: PatternLike | None = None,
    causal: bool = False,
    backend: str = "auto",
    dropout: float = 0.0,
    bias: bool = True,
    add_bias_kv: bool = False,
    add_zero_attn: bool = False,
    kdim: int | None = None,
    vdim: int | None = None,
    batch_first: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> BlockSparseMultihead:
    """A drop-in for ``nn.MultiheadAttention(embed_dim, num_heads, ...)`` with a pattern.

    Args:
        density, sparsity_ratio: as in ``create_block_sparse_attention``.
        block_size, segment_lengths, dilation_rates, pattern, causal, backend: as in BlockSparseBase.
        dropout, bias, ..., dtype: as in ``nn.MultiheadAttention``.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message names what was wanted and what came.
    """
    return BlockSparseMultihead(
        embed_dim,
        num_heads,
        dropout,
        bias,
        add_bias_kv,
        add_zero_attn,
        kdim,
        vdim,
        batch_first,
        device,
        dtype,
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        pattern=pattern,
        density=_density(density, sparsity_ratio),
        block_size=block_size,
        causal=causal,
        backend=backend,
    )


def _density(density: float | None, sparsity_ratio: float | None) -> float | None:
    if density is not None and sparsity_ratio is not None:
        raise ValueError(
            f"density and sparsity_ratio are one thing, give one: got density={density!r} and "
            f"sparsity_ratio={sparsity_ratio!r}"
        )
    return sparsity_ratio if density is None else density
