"""Our attention as one operator of torch, so that ``torch.compile`` neither traces into it nor breaks at it.

An operator takes tensors and numbers only. So what gives the layout goes in by its handle (``raybsa.handles``), and a
seed that nobody gave is drawn when the operator runs, which returns it for its backward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raybsa.handles import by_handle
from raybsa.kernels import triton_backend
from raybsa.kernels.backward import BACKENDS, own_backend
from raybsa.kernels.call import AttentionCall, check_call, compute_dtype
from raybsa.kernels.delta import row_delta
from raybsa.layout import BlockLayout

DRAW = -1  # a seed: draw one when the call runs


def can_serve(call: AttentionCall, backend: str) -> bool:
    """Whether a call under ``torch.compile`` goes to this operator (which itself asks ``why_not`` the rest)."""
    mask_grad = call.attn_mask is not None and call.attn_mask.requires_grad
    return (backend == "auto" or backend in BACKENDS) and not mask_grad


def run(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, D) in q's dtype and lse (B, H, Sq) of a call that is being compiled."""
    ids = call.segment_ids or (None, None)
    handle, numbers = call.layout.handle, (call.scale, call.dropout_p, call.seed, call.deterministic)
    out, lse, _ = attention(call.q, call.k, call.v, call.attn_mask, *ids, call.block_bias, handle, *numbers, backend)
    return out, lse


def settle(call: AttentionCall) -> AttentionCall:
    """The call with its layout found and its seed drawn, where they were left until it runs."""
    layout = call.layout
    if not isinstance(layout, BlockLayout) and hasattr(layout, "handle"):
        layout = layout.select(call.q, call.k)[0]
    return replace(call, layout=layout, seed=draw_seed(call.dropout_p) if call.seed == DRAW else call.seed)


def draw_seed(dropout_p: float) -> int:
    """A seed for dropout from torch's default CPU generator, which is left alone where nothing is dropped."""
    if torch.compiler.is_compiling():
        return DRAW
    return int(torch.randint(2**31 - 1, ())) if dropout_p else 0


@torch.library.custom_op("raybsa::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    block_bias: Tensor | None,
    layout: Tensor,
    scale: float,
    dropout_p: float,
    seed: int,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, Sq, D), lse (B, H, Sq) in the compute dtype, and the seed, () int64 on the CPU."""
    call = settle(_call(q, k, v, attn_mask, q_ids, kv_ids, block_bias, layout, scale, dropout_p, seed, deterministic))
    check_call(call)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = own_backend(call, backend).run(call)
    return _laid_out(out, q), lse.contiguous(), torch.tensor(call.seed)


@attention.register_fake
def _shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))
    return torch.empty_like(q), lse, torch.empty((), dtype=torch.int64)


@torch.library.custom_op("raybsa::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    block_bias: Tensor | None,
    layout: Tensor,
    scale: float,
    dropout_p: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and block_bias, the last empty where there is none."""
    numbers = (scale, dropout_p, int(seed), deterministic)
    call = settle(_call(q, k, v, attn_mask, q_ids, kv_ids, block_bias, layout, *numbers))
    module = own_backend(call, backend)
    with torch.autocast(q.device.type, enabled=False):
        if module is triton_backend:
            *grads, of_bias = triton_backend.backward_from_out(call, out, lse, grad_out, grad_lse, True)
        else:
            *grads, of_bias = module.backward(call, lse, row_delta(out, grad_out, grad_lse), grad_out)
    laid_out = [_laid_out(grad.to(x.dtype), x) for grad, x in zip(grads, (q, k, v), strict=True)]
    of_bias = q.new_empty(0) if of_bias is None or block_bias is None else of_bias.to(block_bias.dtype)
    return laid_out[0], laid_out[1], laid_out[2], of_bias


@attention_backward.register_fake
def _gradient_shapes(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = rest[3]
    of_bias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), of_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, scale, dropout_p, _, deterministic, backend = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.rest = (scale, dropout_p, deterministic, backend)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Any, ...]:
    out, *tensors = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    of_q, of_k, of_v, of_bias = attention_backward(grad_out, grad_lse, out, *tensors, *ctx.rest)
    return of_q, of_k, of_v, None, None, None, None if tensors[8] is None else of_bias, *(None,) * 6


attention.register_autograd(_differentiate, setup_context=_keep)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    block_bias: Tensor | None,
    layout: Tensor,
    scale: float,
    dropout_p: float,
    seed: int,
    deterministic: bool,
) -> AttentionCall:
    segment_ids = None if q_ids is None or kv_ids is None else (q_ids, kv_ids)
    rest = (attn_mask, segment_ids, block_bias, dropout_p, seed, deterministic, True)
    return AttentionCall(q, k, v, by_handle(layout), scale, *rest)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in memory of its own, laid out as the fakes say: as torch lays out what is empty like ``like``."""
    wanted = torch.empty_like(like)
    alone = x.untyped_storage().nbytes() == x.nbytes
    return x if alone and x.stride() == wanted.stride() else wanted.copy_(x)
