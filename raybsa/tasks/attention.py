"""An AttentionSpec as a module that tasks can train and time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybsa import patterns
from raybsa.layout import BlockLayout
from raybsa.spec import ADAPTIVE, DENSE, DENSITY_MEANING, DISTRIBUTED, TrialSpec
from raybsa.variants.factory import create_block_sparse_attention, create_multihead_block_sparse
from raybsa.variants.source import layout_source

MULTIHEAD = "multihead"
VARIANTS = ("base", MULTIHEAD, DISTRIBUTED)  # that compute fixed patterns; what is learned has one of its own


class DenseAttention(nn.Module):
    """torch's own scaled dot-product attention: the baseline. q (B, H, S, D), k and v (B, Hkv, S, D)."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=q.shape[1] != k.shape[1])


def build_attention(spec: TrialSpec, index: int) -> nn.Module:
    """The module of layer ``index``: forward(q, k, v) -> (B, H, S, D)."""
    require_current(spec)
    attention = spec.layer(index)
    if attention.variant == DENSE:
        return DenseAttention(spec.causal)
    return create_block_sparse_attention(
        attention.variant,
        pattern=attention.pattern,
        density=attention.density,
        block_size=attention.block_size,
        causal=spec.causal,
        backend=attention.backend,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        num_kv_heads=spec.num_kv_heads,
    )


class ProjectedAttention(nn.Module):
    """A multihead module seen as q, k, v (B, H, S, D) -> (B, H, S, D): heads side by side are its embedding."""

    def __init__(self, multihead: nn.MultiheadAttention, causal: bool) -> None:
        super().__init__()
        self.multihead, self.causal = multihead, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
        mask = nn.Transformer.generate_square_subsequent_mask(q.shape[2], q.device, q.dtype) if self.causal else None
        out, _ = self.multihead(*tokens, need_weights=False, attn_mask=mask, is_causal=self.causal)
        return out.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)


def timed_attention(spec: TrialSpec, index: int, *, dense: bool = False) -> nn.Module:
    """What a speed trial calls for layer ``index``: forward(q, k, v) -> (B, H, S, D); ``dense``: its torch counterpart.

    Variant "multihead" brings its projections, and so does its counterpart, ``nn.MultiheadAttention``.
    """
    attention = spec.layer(index)
    if attention.variant != MULTIHEAD:
        return DenseAttention(spec.causal) if dense else build_attention(spec, index)
    width = spec.num_heads * spec.head_dim
    if dense:
        return ProjectedAttention(nn.MultiheadAttention(width, spec.num_heads, batch_first=True), spec.causal)
    multihead = create_multihead_block_sparse(
        width,
        spec.num_heads,
        batch_first=True,
        pattern=attention.pattern,
        density=attention.density,
        block_size=attention.block_size,
        causal=spec.causal,
        backend=attention.backend,
    )
    return ProjectedAttention(multihead, causal=False)


def layer_layout(spec: TrialSpec, index: int, length: int | None = None) -> BlockLayout:
    """The blocks of layer ``index`` at ``length`` tokens (``seq_len``), on the CPU: those of the dense baseline all, of
    a learned pattern as many as it keeps."""
    require_current(spec)
    attention, length = spec.layer(index), length or spec.seq_len
    source = layout_source(
        attention.rule,
        None,
        None,
        density=attention.density,
        block_size=attention.block_size,
        causal=spec.causal,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        num_kv_heads=spec.num_kv_heads,
    )
    return source.layout(length, length, spec.num_heads, torch.device("cpu"))


def layer_size(spec: TrialSpec, index: int) -> str:
    """What the density of layer ``index`` came to at ``seq_len``, in words: ``window of 416 tokens``; empty where there
    is nothing to say."""
    attention = spec.layer(index)
    if attention.density is None or attention.rule.name == ADAPTIVE or not spec.is_current:
        return ""
    rule, size = patterns.build(attention.rule), attention.block_size
    return rule.member(
        spec.seq_len, density=attention.density, q_block_size=size, causal=spec.causal, or_least=True
    ).size


def require_current(spec: TrialSpec) -> None:
    """Raises ValueError for a question whose densities had an earlier meaning: its blocks are no longer made."""
    if not spec.is_current:
        raise ValueError(
            f"this question was asked when a density was a share of every row (meaning {spec.density_meaning}), and "
            f"now it is one of all blocks in the pattern's own shape (meaning {DENSITY_MEANING}): ask it anew"
        )


def layer_density(spec: TrialSpec, index: int) -> float:
    """nnz blocks / allowed blocks of layer ``index`` at ``seq_len``; 1 for the dense baseline."""
    return 1.0 if spec.layer(index).pattern is None else layer_layout(spec, index).density
