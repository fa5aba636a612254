"""Our attention as one operator of torch, for whatever must not run our kernels now or must not look into them: graphs
of ``torch.compile`` and ``torch.export``, traces, fake and meta tensors, dispatch modes, subclasses of Tensor.

An operator takes tensors and numbers only. A layout goes in as its own tensors, so that a graph or a saved program
holds it; where a graph serves any length, as the bytes of the rule that gives it (``raybsa.patterns.written``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from raybsa.aside import untraced
from raybsa.kernels.backward import BACKENDS, own_backend
from raybsa.kernels.call import AttentionCall, check_call, compute_dtype
from raybsa.kernels.kept import layout_of
from raybsa.kernels.ordinary import has_numbers
from raybsa.layout import BlockLayout
from raybsa.patterns.written import WrittenRule, rule_in


def can_serve(backend: str) -> bool:
    """Whether a call goes to this operator, which itself asks ``why_not`` the rest."""
    return backend == "auto" or backend in BACKENDS


def run(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, D) in q's dtype and lse (B, H, Sq) in the compute dtype, by the operator."""
    found: tuple[Tensor, Tensor] = attention(*_arguments(call, backend))
    return found


def gradients(
    call: AttentionCall,
    backend: str,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, attn_mask and block_bias (the last two where ``wanted``), by the operator."""
    *grads, of_mask, of_bias = attention_backward(grad_out, grad_lse, out, lse, *_arguments(call, backend), *wanted)
    return (*grads, of_mask if wanted[0] else None, of_bias if wanted[1] else None)


def _arguments(call: AttentionCall, backend: str) -> tuple[Any, ...]:
    ids = call.segment_ids or (None, None)
    tensors = (call.q, call.k, call.v, call.attn_mask, *ids, call.block_bias, call.seed)
    return (*tensors, *_written(call.layout, call.q), call.scale, call.dropout_p, call.deterministic, backend)


def _written(layout: BlockLayout | WrittenRule, q: Tensor) -> tuple[Any, ...]:
    """crow_indices, col_indices, q_block_ids, kv_block_ids, the rule, and the layout's sizes; as q is, where that is a
    tensor without numbers."""
    if isinstance(layout, WrittenRule):
        return None, None, None, None, layout.tensor, [0] * 6
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout must be a BlockLayout, got {type(layout).__name__}")
    tensors: Sequence[Tensor | None] = (
        layout.crow_indices,
        layout.col_indices,
        layout.q_block_ids,
        layout.kv_block_ids,
    )
    if not torch.compiler.is_compiling() and not has_numbers(q):
        tensors = [None if x is None else _without_numbers(x, q) for x in tensors]
    return (*tensors, None, [*map(int, layout.sizes), int(layout.transient)])


def _without_numbers(x: Tensor, like: Tensor) -> Tensor:
    """A tensor of a layout, fake or on the meta device as ``like`` is. A trace takes it as it is, and says itself what
    it makes of constants."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is not None:
        return x
    if isinstance(like, FakeTensor) and not isinstance(x, FakeTensor):
        x = like.fake_mode.from_tensor(x)
    return x.to(like.device)


@torch.library.custom_op("raybsa::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    block_bias: Tensor | None,
    seed: Tensor | None,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    q_block_ids: Tensor | None,
    kv_block_ids: Tensor | None,
    rule: Tensor | None,
    sizes: Sequence[int],
    scale: float,
    dropout_p: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, D) and lse (B, H, Sq) in the compute dtype.

    Args:
        rule: bytes of a written rule, where the tensors of a layout are not given.
        sizes: q_len, kv_len, q_block_size, kv_block_size, causal and transient of the layout that is given.
    """
    with untraced():
        layout = _layout(q, k, crow_indices, col_indices, q_block_ids, kv_block_ids, rule, sizes)
        segment_ids = None if q_ids is None or kv_ids is None else (q_ids, kv_ids)
        rest = (segment_ids, block_bias, dropout_p, seed, deterministic, True)
        call = AttentionCall(q, k, v, layout, scale, attn_mask, *rest)
        check_call(call)
        with torch.autocast(q.device.type, enabled=False):
            out, lse = own_backend(call, backend).forward(call)
        return _laid_out(out, q), lse.contiguous()


@attention.register_fake
def _shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))


@torch.library.custom_op("raybsa::attention_backward", mutates_args=())
def attention_backward(
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
    seed: Tensor | None,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    q_block_ids: Tensor | None,
    kv_block_ids: Tensor | None,
    rule: Tensor | None,
    sizes: Sequence[int],
    scale: float,
    dropout_p: float,
    deterministic: bool,
    backend: str,
    of_mask: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, attn_mask and block_bias; the last two empty unless ``of_mask`` and ``of_bias`` say so."""
    with untraced():
        layout = _layout(q, k, crow_indices, col_indices, q_block_ids, kv_block_ids, rule, sizes)
        segment_ids = None if q_ids is None or kv_ids is None else (q_ids, kv_ids)
        rest = (segment_ids, block_bias, dropout_p, seed, deterministic, True)
        call = AttentionCall(q, k, v, layout, scale, attn_mask, *rest)
        with torch.autocast(q.device.type, enabled=False):
            module = own_backend(call, backend, of_mask)
            *grads, grad_mask, grad_bias = module.gradients(call, out, lse, grad_out, grad_lse, (of_mask, of_bias))
        laid_out = [_laid_out(grad, x) for grad, x in zip(grads, (q, k, v), strict=True)]
        extra = [
            q.new_empty(0) if x is None or like is None else _laid_out(x, like)
            for x, like in ((grad_mask, attn_mask), (grad_bias, block_bias))
        ]
        return laid_out[0], laid_out[1], laid_out[2], extra[0], extra[1]


@attention_backward.register_fake
def _gradient_shapes(
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
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_mask, of_bias = rest[-2:]
    extra = [
        torch.empty_like(x) if x is not None and wanted else q.new_empty(0)
        for x, wanted in ((attn_mask, of_mask), (block_bias, of_bias))
    ]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), extra[0], extra[1]


_TENSORS = 13  # of the arguments of ``attention``
_MASK, _BIAS = 3, 6


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:_TENSORS])
    ctx.rest = inputs[_TENSORS:]


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    of_mask, of_bias = ctx.needs_input_grad[_MASK], ctx.needs_input_grad[_BIAS]
    grads = attention_backward(grad_out, grad_lse, out, lse, *tensors, *ctx.rest, of_mask, of_bias)
    of_q, of_k, of_v, grad_mask, grad_bias = grads
    found: list[Any] = [None] * (_TENSORS + len(ctx.rest))
    found[:3] = of_q, of_k, of_v
    found[_MASK], found[_BIAS] = grad_mask if of_mask else None, grad_bias if of_bias else None
    return tuple(found)


attention.register_autograd(_differentiate, setup_context=_keep)


def _layout(
    q: Tensor,
    k: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    q_block_ids: Tensor | None,
    kv_block_ids: Tensor | None,
    rule: Tensor | None,
    sizes: Sequence[int],
) -> BlockLayout:
    if rule is not None:
        return rule_in(rule).layout(q.shape[2], k.shape[2], q.shape[1], q.device)
    crow, col = cast(Tensor, crow_indices), cast(Tensor, col_indices)
    return layout_of(crow, col, q_block_ids, kv_block_ids, tuple(sizes))


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in memory of its own, laid out as the fakes say: as torch lays out what is empty like ``like``."""
    wanted = torch.empty_like(like)
    alone = x.untyped_storage().nbytes() == x.nbytes
    return x if alone and x.stride() == wanted.stride() else wanted.copy_(x)
