"""raybsa: which block-sparse attention pattern should my model use? This package only re-exports, lazily."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raybsa import gradients, patterns
    from raybsa.kernels.api import block_sparse_attention
    from raybsa.layout import BlockLayout
    from raybsa.spec import PatternSpec
    from raybsa.variants.adaptive import BlockSparseAdaptive
    from raybsa.variants.base import BlockSparseBase
    from raybsa.variants.distributed import BlockSparseDistributed, DistributedConfig
    from raybsa.variants.factory import create_block_sparse_attention, create_multihead_block_sparse
    from raybsa.variants.multihead import BlockSparseMultihead

_HOMES = {
    "BlockLayout": "raybsa.layout",
    "BlockSparseAdaptive": "raybsa.variants.adaptive",
    "BlockSparseBase": "raybsa.variants.base",
    "BlockSparseDistributed": "raybsa.variants.distributed",
    "BlockSparseMultihead": "raybsa.variants.multihead",
    "DistributedConfig": "raybsa.variants.distributed",
    "PatternSpec": "raybsa.spec",
    "block_sparse_attention": "raybsa.kernels.api",
    "create_block_sparse_attention": "raybsa.variants.factory",
    "create_multihead_block_sparse": "raybsa.variants.factory",
}

__all__ = [
    "BlockLayout",
    "BlockSparseAdaptive",
    "BlockSparseBase",
    "BlockSparseDistributed",
    "BlockSparseMultihead",
    "DistributedConfig",
    "PatternSpec",
    "block_sparse_attention",
    "create_block_sparse_attention",
    "create_multihead_block_sparse",
    "gradients",
    "patterns",
]


def __getattr__(name: str) -> Any:
    if name in ("gradients", "patterns"):
        return importlib.import_module(f"raybsa.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'raybsa' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
