"""The Triton backend: own CUDA kernels straight from the CSR layout, forward and backward.

Deterministic: no atomics, sums of parts in a fixed order. dK/dV and dQ each make the scores again (7 matrix products a
kept block in the backward instead of 5), so nothing beyond delta, lse and the parts of split lists is stored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from raybsa.kernels import node
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.kept import kept_with, kept_with_rows
from raybsa.kernels.triton_arguments import Softmax, dot_precision
from raybsa.kernels.triton_plan import MAX_BLOCKS, MAX_MEMBERS
from raybsa.kernels.triton_setup import interpreting, launching_at, why_not_here
from raybsa.layout import BlockLayout

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MAX_ENTRIES = 2**31 - 1


def why_not(call: AttentionCall) -> str | None:
    """Why the Triton kernels cannot serve this call; None where they can."""
    reason = why_not_here(call.q.device)
    if reason is not None:
        return reason
    if call.q.dtype not in DTYPES:
        return f"the Triton kernels take float16, bfloat16 and float32, got {call.q.dtype}"
    if call.q.dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter multiplies no bfloat16"
    if call.q.shape[-1] > MAX_HEAD_DIM:
        return f"the Triton kernels take head_dim up to {MAX_HEAD_DIM}, got {call.q.shape[-1]}"
    if call.attn_mask is not None and call.attn_mask.requires_grad and torch.is_grad_enabled():
        return "the Triton kernels make no gradient of attn_mask (use block_bias, or backend='blocked')"
    return _why_too_large(call)


def _why_too_large(call: AttentionCall) -> str | None:
    layout, members = call.layout, call.queries_per_kv
    entries = layout.nnz_blocks * (members if layout.num_groups == 1 else 1)
    if entries > MAX_ENTRIES or layout.num_q_blocks > MAX_BLOCKS or members > MAX_MEMBERS:
        return (
            f"the Triton kernels count {MAX_ENTRIES} kept blocks, {MAX_BLOCKS} query blocks and {MAX_MEMBERS} query "
            f"heads a KV head at most, got {entries}, {layout.num_q_blocks} and {members}"
        )
    return None


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """out (B, H, Sq, D) in q's dtype and lse (B, H, Sq) float32."""
    return node.run(call, sys.modules[__name__])


def forward(call: AttentionCall, for_gradient: bool = False) -> tuple[Tensor, Tensor]:
    """As ``run``, without a node."""
    with launching_at(call.q):
        return _kernels()(call)


@cache
def _kernels() -> Callable[[AttentionCall], tuple[Tensor, Tensor]]:
    from raybsa.kernels.triton_forward import forward

    return forward


def gradients(
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, None, Tensor | None]:
    """As ``node.run`` asks for them; of attn_mask there is none (``why_not``)."""
    with_bias = wanted[1] and call.block_bias is not None
    forward = Softmax(lse.contiguous(), out, grad_lse)
    delta = torch.empty_like(forward.lse)
    of_q, of_k, of_v, of_bias = _gradients(call, forward, delta, grad_out, with_bias, call.q.dtype)
    return of_q, of_k, of_v, None, of_bias


def backward(
    call: AttentionCall, lse: Tensor, delta: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As ``attention_backward`` says: the weights are ``exp(score - lse)``, whatever keys made that lse."""
    with_bias = call.block_bias is not None
    return _gradients(call, Softmax(lse.contiguous()), delta.contiguous(), grad_out, with_bias, torch.float32)


def _gradients(
    call: AttentionCall, forward: Softmax, delta: Tensor, grad_out: Tensor, with_bias: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v in ``dtype``, and of block_bias if it is wanted; ``delta`` as ``grad_q`` takes it."""
    with launching_at(call.q):
        kept = _launches(call.layout)
        key = ("backward", *_kind(call, forward, grad_out), with_bias, dtype)
        if key not in kept:
            from raybsa.kernels.triton_grad_kv import GradKV
            from raybsa.kernels.triton_grad_q import GradQ

            kept[key] = GradQ(call, forward, grad_out, with_bias, dtype), GradKV(call, grad_out, dtype)
        grad_q, grad_kv = kept[key]
        of_q, of_bias = grad_q(call, forward, delta, grad_out)
        return of_q, *grad_kv(call, forward, delta, grad_out), of_bias


def mass(call: AttentionCall, lse: Tensor) -> Tensor:
    """(nnz,) as ``block_mass``: the gradient of ``lse.sum()`` by block_bias, for which dQ's kernel is run on a gradient
    of zeros: with delta -1 a score's gradient is its weight."""
    softmax, nothing = Softmax(lse), torch.zeros_like(call.q)
    kept, key = _launches(call.layout), ("mass", *_kind(call, softmax, nothing))
    with launching_at(call.q):
        if key not in kept:
            from raybsa.kernels.triton_grad_q import GradQ

            bias, delta = lse.new_zeros(call.layout.nnz_blocks), torch.full_like(lse, -1.0)
            biased = replace(call, block_bias=bias, dropout_p=0.0)
            kept[key] = GradQ(biased, softmax, nothing, True, call.q.dtype), bias, delta
        grad_q, bias, delta = kept[key]
        bias = bias if call.block_bias is None else call.block_bias.detach()
        _, found = grad_q(replace(call, block_bias=bias, dropout_p=0.0), softmax, delta, nothing)
    assert found is not None
    return found


def _launches(layout: BlockLayout) -> dict[tuple[object, ...], Any]:
    """Where the launches of a backward are kept: those of a transient layout serve all that share its rows, as their
    plans are of one size."""
    return kept_with_rows(layout) if layout.transient else kept_with(layout)


def _kind(call: AttentionCall, forward: Softmax, grad_out: Tensor) -> tuple[Any, ...]:
    """What tells launches over the same rows apart."""
    alignment = call.layout.col_indices.data_ptr() % 16
    return dot_precision(call.q.dtype), call.signature, alignment, *forward.signature(grad_out)
