"""A small pre-norm causal transformer whose layers attend as a TrialSpec says.

Positions are rotary (Su et al., RoFormer, 2104.09864), so that a model trained at one length can run at another; the
embedding is tied to the output. Half of each key is that of the token before (token shift: Peng et al., RWKV,
2305.13048), so that a single layer can look for what followed an earlier occurrence, and context pays off within a
short training. Parameters are drawn on the CPU from the seed alone: equal on every device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybsa.ring.sequence import ShardedSequence
from raybsa.selectors.gate import Gate
from raybsa.spec import TrialSpec
from raybsa.tasks.attention import build_attention

_ROTARY_BASE = 200.0  # lower than usual: these models train for minutes at some hundred tokens
_ROTARY_TOKENS = 512  # for longer sequences the base is their length


class Transformer(nn.Module):
    """tokens (B, S) int64 -> logits (B, S, vocab_size).

    Args:
        spec: layers, heads, head size and the attention of each layer; the width is ``num_heads * head_dim``.
        vocab_size: number of different tokens.
    """

    def __init__(self, spec: TrialSpec, vocab_size: int) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.rotary_base = float(spec.train_len) if spec.train_len > _ROTARY_TOKENS else _ROTARY_BASE
        width = spec.num_heads * spec.head_dim
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Layer(spec, index) for index in range(spec.num_layers))
        self.norm = nn.RMSNorm(width)
        self._initialise(torch.Generator().manual_seed(spec.seed))

    def forward(self, tokens: Tensor, sequence: ShardedSequence | None = None) -> Tensor:
        """Where ``sequence`` is split across ranks, ``tokens`` (B, S) and the logits are this rank's; every layer must
        then attend with the variant "distributed", bound to the same partition."""
        sequence = sequence or ShardedSequence.whole(tokens.shape[1], tokens.device)
        x = self.embedding(tokens)
        rotation = rotary(sequence.positions, self.head_dim, x, self.rotary_base)
        for layer in self.layers:
            x = layer(x, rotation, sequence)
        return self.norm(x) @ self.embedding.weight.T

    def _initialise(self, generator: torch.Generator) -> None:
        """Normal, 1 / sqrt(fan-in); what writes into the residual stream is smaller (Radford et al., GPT-2, 2019)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                scale = 1.0 / math.sqrt(2 * len(self.layers)) if writes else 1.0
                nn.init.normal_(parameter, std=scale / math.sqrt(parameter.shape[1]), generator=generator)
        for module in self.modules():
            if isinstance(module, Gate):
                module.reset_parameters(generator)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). x is (B, S, width)."""

    def __init__(self, spec: TrialSpec, index: int) -> None:
        super().__init__()
        width, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads or spec.num_heads
        self.head_dim, self.sizes = spec.head_dim, (spec.num_heads, kv_heads, kv_heads)
        self.attention = build_attention(spec, index)
        self.qkv = nn.Linear(width, sum(self.sizes) * spec.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], sequence: ShardedSequence) -> Tensor:
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split(self.sizes, dim=1)
        attended = self.attention(rotate(q, rotation), rotate(shift_half(k, sequence), rotation), v.contiguous())
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


def shift_half(k: Tensor, sequence: ShardedSequence) -> Tensor:
    """k (B, H, S, D) whose second half of channels comes from the token before; the first token keeps its own."""
    own, before = k.chunk(2, dim=-1)
    return torch.cat([own, sequence.previous(before)], dim=-1)


def rotary(positions: Tensor, head_dim: int, like: Tensor, base: float = _ROTARY_BASE) -> tuple[Tensor, Tensor]:
    """(S, head_dim / 2) cosines and sines of the angles of ``positions`` (S,), in the dtype of ``like``."""
    rates = base ** -(torch.arange(0, head_dim, 2, device=like.device) / head_dim)
    angles = positions[:, None] * rates
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, H, S, D) with each pair (x[d], x[d + D/2]) turned by its position's angle."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
