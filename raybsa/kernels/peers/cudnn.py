"""cuDNN's block-sparse attention (``cudnn.block_sparse_attention`` of nvidia-cudnn-frontend) as a backend on Hopper.

Forward for blocks of 64 and 128; its backward takes bfloat16, as many KV heads as query heads, head_dim 128 only, and
no gradient of lse. It comes without autograd, which is given here. Nothing is causal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.kept import kept_with
from raybsa.kernels.peers.guards import why_not_hopper, why_not_installed, why_not_plain
from raybsa.kernels.peers.lists import Lists, row_lists

PACKAGE, OLDEST = "nvidia-cudnn-frontend", "1.32.0"
COMPILER, OLDEST_COMPILER = "nvidia-cutlass-dsl", "4.6.2"
BLOCKS = (64, 128)
HEAD_DIMS = (64, 128)
BACKWARD_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16)


def why_not(call: AttentionCall) -> str | None:
    """Why cuDNN cannot serve this call, or not surely right; None where it can."""
    return (
        why_not_installed(PACKAGE, OLDEST)
        or why_not_installed(COMPILER, OLDEST_COMPILER)
        or why_not_hopper(call.q.device, "cuDNN")
        or _why_not_shape(call)
        or (_why_no_gradient(call) if call.needs_grad else None)
        or why_not_plain(call, "cuDNN")
    )


def _why_not_shape(call: AttentionCall) -> str | None:
    layout = call.layout
    if call.q.dtype not in DTYPES:
        return f"cuDNN takes float16 and bfloat16, got {call.q.dtype}"
    if call.q.shape[-1] not in HEAD_DIMS:
        return f"cuDNN's sparse kernels were checked for head_dim {HEAD_DIMS}, got {call.q.shape[-1]}"
    if layout.q_block_size != layout.kv_block_size or layout.q_block_size not in BLOCKS:
        return f"cuDNN takes square blocks of {BLOCKS}, got {layout.q_block_size} x {layout.kv_block_size}"
    return None


def _why_no_gradient(call: AttentionCall) -> str | None:
    if call.q.dtype != torch.bfloat16:
        return f"cuDNN's sparse backward takes bfloat16, got {call.q.dtype}"
    if call.q.shape[-1] != BACKWARD_HEAD_DIM:
        return f"cuDNN's sparse backward takes head_dim {BACKWARD_HEAD_DIM}, got {call.q.shape[-1]}"
    if call.queries_per_kv > 1:
        return "cuDNN's sparse backward takes as many KV heads as query heads"
    return "cuDNN's sparse backward takes no gradient of lse" if call.return_lse else None


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, D) in q's dtype and lse (B, H, Sq) float32, which has no gradient."""
    lists = _lists(call)
    if call.needs_grad:
        return _Cudnn.apply(call.q, call.k, call.v, lists, call.layout.q_block_size, call.scale)
    return _forward(call.q, call.k, call.v, lists, call.layout.q_block_size, call.scale)


class _Cudnn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: Lists, block: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, lists, block, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.lists, ctx.block, ctx.scale = lists, block, scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        from cudnn.block_sparse_attention import block_sparse_attention_backward

        q, k, v, out, lse = ctx.saved_tensors
        lists: Lists = ctx.lists
        found = block_sparse_attention_backward(
            grad_out.contiguous(),
            q.detach(),
            k.detach(),
            v.detach(),
            out,
            lse,
            lists.indices,
            lists.longest,
            q2k_block_nums=None if lists.uniform else lists.counts,
            softmax_scale=ctx.scale,
            sparse_block_size=ctx.block,
        )
        return found["dq_tensor"], found["dk_tensor"], found["dv_tensor"], None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, lists: Lists, block: int, scale: float) -> tuple[Tensor, Tensor]:
    """Where all rows have as many blocks the number is given once: only then does it split long rows at block 64."""
    from cudnn.block_sparse_attention import block_sparse_attention_forward

    found = block_sparse_attention_forward(
        q.detach(),
        k.detach(),
        v.detach(),
        lists.indices,
        lists.longest,
        q2k_block_nums=None if lists.uniform else lists.counts,
        sparse_block_size=block,
        allow_empty_block_nums=lists.shortest == 0,
        softmax_scale=scale,
        kv_splits="auto" if block == 64 else 1,
    )
    return found["o_tensor"], found["lse_tensor"]


def _lists(call: AttentionCall) -> Lists:
    """The rows' lists, kept as long as the layout lives."""
    batch, heads = call.q.shape[:2]
    known, key = kept_with(call.layout), ("cudnn", batch, heads)
    if key not in known:
        known[key] = row_lists(call.layout, batch, heads)
    found = known[key]
    assert isinstance(found, Lists)
    return found
