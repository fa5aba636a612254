"""The node of autograd around each backend of ours: what it keeps, and whose gradients it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.transforms import BIAS, MASK, Rest, differentiate, tensors_of


def run(call: AttentionCall, module: ModuleType) -> tuple[Tensor, Tensor | None]:
    """out and lse (where the call wants it) of a call of ordinary tensors by a backend of ours, differentiable.

    Args:
        module: with ``forward(call, for_gradient) -> (out, lse)``, where lse may be None unless the call wants it or
            the backend's gradient does, and ``gradients(call, out, lse, grad_out, grad_lse, wanted) -> gradients of q,
            k, v, attn_mask, block_bias``; ``wanted`` says which of the last two are asked for.
    """
    if not call.needs_grad:
        found: tuple[Tensor, Tensor | None] = module.forward(call)
        return found
    return _Attention.apply(*tensors_of(call), call, module)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, call, module = args
        out, lse = module.forward(call, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.rest, ctx.version = Rest.of(call, module), call.layout.version
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        rest: Rest = ctx.rest
        if rest.layout.version != ctx.version:
            raise RuntimeError("the layout's tensors were written to between the attention and its gradient")
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        wanted = (ctx.needs_input_grad[MASK], ctx.needs_input_grad[BIAS])
        grads = _gradients(rest, tensors, out, lse, grad_out, grad_lse, wanted)
        of_q, of_k, of_v, of_mask, of_bias = grads
        return of_q, of_k, of_v, of_mask, None, None, of_bias, None, None, None


def _gradients(
    rest: Rest,
    tensors: Sequence[Tensor | None],
    out: Tensor,
    lse: Tensor | None,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: tuple[bool, bool],
) -> Sequence[Tensor | None]:
    if torch.is_grad_enabled():  # a graph of the gradients is wanted
        return differentiate(grad_out, grad_lse, out, lse, tensors, rest, wanted)
    call, kind = rest.call(tensors), out.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        found: Sequence[Tensor | None] = rest.by.gradients(call, out, lse, grad_out, grad_lse, wanted)
    return found
