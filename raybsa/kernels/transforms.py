"""Attention under ``torch.func``: nodes that grad and vmap (per-sample gradients) understand, any number of times.

The kernels serve first derivatives, also of many samples at one time; what is differentiated again is made of torch's
own operations (``composite``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raybsa.kernels import composite
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.eager import eagerly
from raybsa.layout import BlockLayout

By = Any  # what computes: ``forward`` and ``gradients`` as ``raybsa.kernels.node`` asks for them
Tensors = tuple[Tensor | None, ...]
MASK, Q_IDS, KV_IDS, BIAS, SEED = range(3, 8)  # places among a call's tensors, after q, k and v


class Rest(NamedTuple):
    """What a node keeps of a call besides its tensors."""

    layout: BlockLayout
    scale: float
    dropout_p: float
    deterministic: bool
    return_lse: bool
    by: By

    @classmethod
    def of(cls, call: AttentionCall, by: By) -> Rest:
        return cls(call.layout, call.scale, call.dropout_p, call.deterministic, call.return_lse, by)

    def call(self, tensors: Sequence[Any]) -> AttentionCall:
        """The call of these tensors, as ``tensors_of`` gives them."""
        q, k, v, mask, q_ids, kv_ids, bias, seed = tensors
        segment_ids = None if q_ids is None else (q_ids, kv_ids)
        numbers = (self.dropout_p, seed, self.deterministic, self.return_lse)
        return AttentionCall(q, k, v, self.layout, self.scale, mask, segment_ids, bias, *numbers)


def tensors_of(call: AttentionCall) -> Tensors:
    """q, k, v, attn_mask, both segment_ids, block_bias and the seed."""
    return (call.q, call.k, call.v, call.attn_mask, *(call.segment_ids or (None, None)), call.block_bias, call.seed)


def run(call: AttentionCall, by: By) -> tuple[Tensor, Tensor]:
    """out and lse of a call under ``torch.func.grad``, ``vmap`` and what is made of them."""
    found: tuple[Tensor, Tensor] = Attention.apply(*tensors_of(call), Rest.of(call, by)._replace(return_lse=True))
    return found


class Attention(torch.autograd.Function):
    """(q, k, v, attn_mask, q_ids, kv_ids, block_bias, seed, rest) -> out, lse."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        *tensors, rest = args
        call = rest.call(tensors)
        found: tuple[Tensor, Tensor] = eagerly(rest.by.forward, call, True)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, rest = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *tensors)
        ctx.rest = rest

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        wanted = (ctx.needs_input_grad[MASK], ctx.needs_input_grad[BIAS])
        of_q, of_k, of_v, of_mask, of_bias = differentiate(grad_out, grad_lse, out, lse, tensors, ctx.rest, wanted)
        return of_q, of_k, of_v, of_mask, None, None, of_bias, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        *tensors, rest = args
        dims = in_dims[: len(tensors)]
        folded = _fold(info.batch_size, dims, tensors, rest)
        if folded is None:
            parts = [Attention.apply(*each, rest) for each in _each(info.batch_size, dims, tensors)]
            return tuple(torch.stack(x) for x in zip(*parts, strict=True)), (0, 0)
        found = Attention.apply(*folded, rest)
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in found), (0, 0)


def differentiate(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    tensors: Sequence[Tensor | None],
    rest: Rest,
    wanted: tuple[bool, bool],
) -> Tensors:
    """Gradients of q, k, v, attn_mask and block_bias (the latter where ``wanted``), which can be differentiated."""
    found: Tensors = Gradients.apply(grad_out, grad_lse, out, lse, *tensors, (rest, wanted))
    return found


class Gradients(torch.autograd.Function):
    """(grad_out, grad_lse, out, lse, *as Attention, (rest, wanted)) -> gradients of q, k, v, attn_mask, block_bias."""

    @staticmethod
    def forward(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor | None, *args: Any) -> Tensors:
        *tensors, (rest, wanted) = args
        call = rest.call(tensors)
        found: Tensors = eagerly(rest.by.gradients, call, out, lse, grad_out, grad_lse, wanted)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        grad_out, grad_lse, _, _, *tensors, (rest, _) = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_out, grad_lse, *tensors)
        ctx.rest = rest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """out and lse follow from q, k and v: what they give to the gradients is in those of q, k and v."""
        grad_out, grad_lse, *tensors = ctx.saved_tensors
        found = composite.second_gradients(ctx.rest.call(tensors), grad_out, grad_lse, grads)
        of_grad_out, of_grad_lse, of_q, of_k, of_v, of_mask, of_bias = found
        return of_grad_out, of_grad_lse, None, None, of_q, of_k, of_v, of_mask, None, None, of_bias, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        *every, (rest, wanted) = args
        size, dims = info.batch_size, in_dims[: len(every)]
        folded = None if any(wanted) else _fold(size, dims[4:], every[4:], rest)
        if folded is None:
            parts = [Gradients.apply(*each, (rest, wanted)) for each in _each(size, dims, every)]
            found = tuple(None if x[0] is None else torch.stack(x) for x in zip(*parts, strict=True))
        else:
            ours = zip(every[:4], dims[:4], strict=True)
            first = [None if x is None else _with_samples(x, dim, size) for x, dim in ours]
            results = Gradients.apply(*first, *folded, (rest, wanted))
            found = tuple(None if x is None else x.unflatten(0, (size, -1)) for x in results)
        return found, tuple(None if x is None else 0 for x in found)


def _fold(
    size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor | None], rest: Rest
) -> list[Tensor | None] | None:
    """The call of ``size`` samples of calls as one of ``size * B`` samples; None where samples do not share a layout,
    a bias or what dropout is drawn by."""
    q = tensors[0]
    assert q is not None
    batch, heads = (q if in_dims[0] is None else q.select(in_dims[0], 0)).shape[:2]
    if rest.dropout_p or rest.layout.num_groups not in (1, heads) or in_dims[BIAS] is not None:
        return None
    mask, bias = tensors[MASK], tensors[BIAS]
    of_samples = [None if x is mask or x is bias else x for x in tensors]
    folded = [None if x is None else _with_samples(x, dim, size) for x, dim in zip(of_samples, in_dims, strict=True)]
    folded[MASK] = None if mask is None else _fold_mask(mask, in_dims[MASK], size, batch)
    folded[BIAS] = bias
    return folded


def _with_samples(x: Tensor, dim: int | None, size: int) -> Tensor:
    """(size * B, ...) of (B, ...) with or without a dimension of samples at ``dim``."""
    moved = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return moved.flatten(0, 1)


def _fold_mask(mask: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """A mask that broadcasts to (B, H, Sq, Skv) as one that does to (size * B, H, Sq, Skv)."""
    if dim is None and (mask.dim() < 4 or mask.shape[0] == 1):
        return mask
    moved = mask.expand(size, *mask.shape) if dim is None else mask.movedim(dim, 0)
    whole = moved.reshape(size, *(1,) * (5 - moved.dim()), *moved.shape[1:])
    return whole.expand(-1, batch, -1, -1, -1).flatten(0, 1)


def _each(size: int, in_dims: Sequence[Any], tensors: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    """The tensors of every sample."""

    def of(x: Tensor | None, dim: int | None, number: int) -> Tensor | None:
        return x if x is None or dim is None else x.select(dim, number)

    return [[of(x, dim, number) for x, dim in zip(tensors, in_dims, strict=True)] for number in range(size)]
