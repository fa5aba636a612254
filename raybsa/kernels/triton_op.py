"""The Triton backend as one operator of torch, so that ``torch.compile`` neither traces into it nor breaks at it.

An operator takes tensors and numbers only, so the layout goes in by its handle (``BlockLayout.handle``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raybsa.kernels import triton_backend
from raybsa.kernels.call import AttentionCall, check_call
from raybsa.layout import BlockLayout


def can_serve(q: Tensor, attn_mask: Tensor | None, backend: str) -> bool:
    """Whether a call under ``torch.compile`` goes to this operator (which itself asks ``why_not`` the rest)."""
    named = backend == "triton" or (backend == "auto" and q.device.type == "cuda")
    mask_grad = attn_mask is not None and attn_mask.requires_grad
    return named and q.dtype in triton_backend.DTYPES and q.shape[-1] <= triton_backend.MAX_HEAD_DIM and not mask_grad


@torch.library.custom_op("raybsa::triton_attention", mutates_args=())
def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    block_bias: Tensor | None,
    layout: int,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, D) and lse (B, H, Sq) float32 of the layout with this handle."""
    call = _call(q, k, v, attn_mask, q_ids, kv_ids, block_bias, layout, scale, dropout_p, seed)
    check_call(call)
    reason = triton_backend.why_not(call)
    if reason is not None:
        raise NotImplementedError(f"backend 'triton' cannot serve this call: {reason}")
    return triton_backend.run(call)


@triton_attention.register_fake
def _shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("raybsa::triton_attention_backward", mutates_args=())
def triton_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    block_bias: Tensor | None,
    layout: int,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and block_bias, the last empty where there is none."""
    call = _call(q, k, v, attn_mask, q_ids, kv_ids, block_bias, layout, scale, dropout_p, seed)
    *grads, of_bias = triton_backend.backward_from_out(call, out, lse, grad_out, grad_lse, True)
    return grads[0], grads[1], grads[2], q.new_empty(0) if of_bias is None else of_bias


@triton_attention_backward.register_fake
def _gradient_shapes(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = rest[3]
    of_bias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), of_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.numbers = inputs[7:]


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    of_q, of_k, of_v, of_bias = triton_attention_backward(grad_out, grad_lse, out, lse, *tensors, *ctx.numbers)
    return of_q, of_k, of_v, None, None, None, of_bias if tensors[6] is not None else None, None, None, None, None


triton_attention.register_autograd(_differentiate, setup_context=_keep)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    block_bias: Tensor | None,
    layout: int,
    scale: float,
    dropout_p: float,
    seed: int,
) -> AttentionCall:
    segment_ids = None if q_ids is None or kv_ids is None else (q_ids, kv_ids)
    found = BlockLayout.of_handle(layout)
    return AttentionCall(q, k, v, found, scale, attn_mask, segment_ids, block_bias, dropout_p, seed, True, True)
