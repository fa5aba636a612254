"""An AttentionSpec as a module that tasks can train and time."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from raybsa import patterns
from raybsa.spec import DENSE, AttentionSpec, TrialSpec
from raybsa.variants.factory import create_block_sparse_attention


class DenseAttention(nn.Module):
    """torch's own scaled dot-product attention: the baseline. q (B, H, S, D), k and v (B, Hkv, S, D)."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=q.shape[1] != k.shape[1])


def build_attention(spec: AttentionSpec, *, causal: bool) -> nn.Module:
    """The module of one layer: forward(q, k, v) -> (B, H, S, D)."""
    if spec.variant == DENSE:
        return DenseAttention(causal)
    return create_block_sparse_attention(
        spec.variant,
        pattern=spec.pattern,
        density=spec.density,
        block_size=spec.block_size,
        causal=causal,
        backend=spec.backend,
    )


def layer_density(spec: TrialSpec, index: int) -> float:
    """nnz blocks / allowed blocks of layer ``index`` at ``seq_len``; 1 for the dense baseline."""
    attention = spec.layer(index)
    if attention.pattern is None:
        return 1.0
    layout = patterns.build(attention.pattern).layout(
        spec.seq_len,
        num_heads=spec.num_heads,
        q_block_size=attention.block_size,
        causal=spec.causal,
        density=attention.density,
    )
    return layout.density
