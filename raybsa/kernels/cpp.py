"""The C++ backend: own kernels for CPUs in float32, forward and backward, straight from the CSR layout.

Keys and values are read where they lie: nothing is gathered and nothing planned, so a layout that serves one call costs
no more than a fixed one. Deterministic: the number of threads decides the order of sums, nothing else. The sources in
``cpp_source`` are compiled at first use (``cpp_build``).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from raybsa.kernels import cpp_build, node
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.delta import row_delta

HEAD_DIM_STEP = 16  # vectors of the widest machine
EVEN = 4  # KV heads a thread that share the backward's work evenly enough


def why_not(call: AttentionCall) -> str | None:
    """Why the C++ kernels cannot serve this call; None where they can."""
    if call.q.device.type != "cpu":
        return f"the C++ kernels run on cpu, not on {call.q.device.type}"
    if call.q.dtype != torch.float32:
        return f"the C++ kernels take float32, got {call.q.dtype}"
    if call.q.shape[-1] % HEAD_DIM_STEP or not call.q.shape[-1]:
        return f"the C++ kernels take a head_dim that is a multiple of {HEAD_DIM_STEP}, got {call.q.shape[-1]}"
    if call.extra is not None:
        return f"the C++ kernels take no {call.extra}"
    return cpp_build.why_not()


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """out (B, H, Sq, D) and lse (B, H, Sq), float32; lse only where the call wants it or a gradient."""
    return node.run(call, sys.modules[__name__])


def backward(call: AttentionCall, lse: Tensor, delta: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    """As ``attention_backward`` says: the weights are ``exp(score - lse)``, whatever keys made that lse."""
    filled, _kept = _call(call)
    threads, lists = int(filled.threads), len(call.k) * call.k.shape[1]
    parts = 1 if lists % threads == 0 or lists >= EVEN * threads else -(-EVEN * threads // lists)
    lse, delta, grad_out = lse.contiguous(), delta.contiguous(), _last_together(grad_out)
    grad_q = call.q.new_empty(call.q.shape)
    grad_kv = call.k.new_zeros(2, parts, *call.k.shape)
    addresses = [x.data_ptr() for x in (lse, delta, grad_out)]
    results = [x.data_ptr() for x in (grad_q, grad_kv[0], grad_kv[1])]
    given = _Gradients(*addresses, (ctypes.c_int64 * 3)(*grad_out.stride()[:3]), *results, parts)
    cpp_build.library().raybsa_backward(ctypes.byref(filled), ctypes.byref(given))
    grad_k, grad_v = grad_kv.sum(1) if parts > 1 else grad_kv[:, 0]
    return grad_q, grad_k, grad_v, None


def gradients(
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """As ``node.run`` asks for them."""
    return (*backward(call, lse, row_delta(out, grad_out, grad_lse), grad_out)[:3], None, None)


def forward(call: AttentionCall, for_gradient: bool = False) -> tuple[Tensor, Tensor | None]:
    """As ``run``, without a node."""
    filled, _kept = _call(call)
    out = call.q.new_empty(call.q.shape)
    lse = call.q.new_empty(call.q.shape[:-1]) if call.return_lse or for_gradient else None
    address = None if lse is None else ctypes.c_void_p(lse.data_ptr())
    cpp_build.library().raybsa_forward(ctypes.byref(filled), ctypes.c_void_p(out.data_ptr()), address)
    return out, lse


class _Call(ctypes.Structure):
    """``Call`` of cpp_source/call.h."""

    _fields_: ClassVar[Sequence[Any]] = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "crow", "col", "q_start", "kv_start")),
        *((name, ctypes.c_int64 * 3) for name in ("q_step", "k_step", "v_step")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "groups", "q_blocks", "q_tokens")),
        *((name, ctypes.c_int64) for name in ("kv_tokens", "head_dim", "q_block", "kv_block", "causal", "threads")),
        ("scale", ctypes.c_float),
    ]


class _Gradients(ctypes.Structure):
    """``Gradients`` of cpp_source/backward.cpp."""

    _fields_: ClassVar[Sequence[Any]] = [
        *((name, ctypes.c_void_p) for name in ("lse", "delta", "grad_out")),
        ("grad_out_step", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in ("grad_q", "grad_k", "grad_v")),
        ("parts", ctypes.c_int64),
    ]


def _call(call: AttentionCall) -> tuple[_Call, tuple[Tensor, ...]]:
    """The arguments as the kernels read them, and the tensors that must live as long."""
    layout = call.layout
    q, k, v = (_last_together(x) for x in (call.q, call.k, call.v))
    lists = (layout.crow_indices.contiguous(), layout.col_indices.contiguous())
    kept = (q, k, v, *lists, layout.q_block_starts.contiguous(), layout.kv_block_starts.contiguous())
    steps = ((ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v))
    sizes = (*q.shape[:2], k.shape[1], layout.num_groups, layout.num_q_blocks, q.shape[2], k.shape[2], q.shape[3])
    blocks = (layout.q_block_size, layout.kv_block_size, layout.causal, torch.get_num_threads())
    return _Call(*(x.data_ptr() for x in kept), *steps, *sizes, *blocks, call.scale), kept


def _last_together(x: Tensor) -> Tensor:
    """``x`` with the numbers of a token side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()
