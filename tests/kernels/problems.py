"""Attention problems for the backends' shared tests: layouts of every awkward kind, inputs, and the error measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from raybsa import BlockLayout, block_sparse_attention
from raybsa.kernels.cpp_build import why_no_compiler

needs_a_compiler = pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))


@dataclass(frozen=True)
class Problem:
    """A shape: its id says all that is odd about it."""

    name: str
    kind: str = "random"
    causal: bool = False
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    q_len: int = 128
    kv_len: int = 128
    q_block: int = 32
    kv_block: int = 32
    groups: int = 1
    head_dim: int = 16

    def layout(self, device: str = "cpu") -> BlockLayout:
        rows, cols = -(-self.q_len // self.q_block), -(-self.kv_len // self.kv_block)
        i = torch.arange(rows)[:, None] * self.q_block
        j = torch.arange(cols)[None, :] * self.kv_block
        mask = {
            "random": torch.rand(self.groups, rows, cols) < 0.5,
            "window": ((i - j).abs() <= max(self.q_block, self.kv_block)).expand(self.groups, -1, -1),
            "global": ((i == 0) | (j == 0) | (i == j)).expand(self.groups, -1, -1),
            "dense": torch.ones(self.groups, rows, cols, dtype=torch.bool),
        }[self.kind].clone()
        if self.kind == "random":
            mask[:, rows // 2] = False  # a row of blocks with nothing to attend
        return BlockLayout.from_dense(
            mask.to(device),
            q_len=self.q_len,
            kv_len=self.kv_len,
            q_block_size=self.q_block,
            kv_block_size=self.kv_block,
            causal=self.causal,
        )

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        shapes = [(self.heads, self.q_len)] + [(self.kv_heads, self.kv_len)] * 2
        return [torch.randn(self.batch, h, n, self.head_dim, dtype=dtype, device=device) for h, n in shapes]


PROBLEMS = [
    Problem("random"),
    Problem("random-causal", causal=True),
    Problem("window-causal-ragged", kind="window", causal=True, q_len=117, kv_len=117),
    Problem("global-ragged", kind="global", q_len=101, kv_len=101),
    Problem("dense-causal", kind="dense", causal=True),
    Problem("per-head", groups=4),
    Problem("per-sample-gqa-causal", groups=8, kv_heads=2, causal=True),
    Problem("mqa-cross-ragged", kv_heads=1, q_len=70, kv_len=150),
    Problem("causal-more-queries-than-keys", causal=True, q_len=150, kv_len=70, kind="dense"),
    Problem("causal-more-keys-than-queries", causal=True, q_len=70, kv_len=150, kind="dense"),
    Problem("unequal-blocks-causal", causal=True, q_block=64, kv_block=16, groups=4),
    Problem("tall-blocks-causal-ragged", causal=True, q_block=16, kv_block=64, q_len=121, kv_len=121),
    Problem("one-token", q_len=1, kv_len=1, kind="dense", batch=1),
    Problem("batch-of-one-odd-head-dim", batch=1, head_dim=24, kind="global"),
]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Max abs difference / max abs reference; two zeros are equal."""
    if not wanted.numel():
        return 0.0
    difference = (got.double() - wanted.double()).abs().max().item()
    scale = wanted.double().abs().max().item()
    return difference / scale if scale else difference


def outputs_and_gradients(
    inputs: list[Tensor], layout: BlockLayout, grad_out: Tensor, grad_lse: Tensor, **options: Any
) -> dict[str, Tensor]:
    """out, lse (0 where -inf) and the gradient of every floating-point input, for given upstream gradients."""
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    leaves = {"q": q, "k": k, "v": v}
    for name in ("attn_mask", "block_bias"):
        given = options.get(name)
        if given is not None and given.is_floating_point():
            options[name] = leaves[name] = given.detach().clone().requires_grad_()
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, **options)
    finite = torch.where(lse == float("-inf"), torch.zeros_like(lse), lse)
    ((out * grad_out).sum() + (finite * grad_lse).sum()).backward()
    results = {"out": out.detach(), "lse": finite.detach()}
    return results | {f"grad {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def in_double(inputs: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    return [x.double() for x in inputs], wide
