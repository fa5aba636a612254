"""Gradients of a part of the keys: every backend gives the same, unrounded, and names what does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from raybsa.kernels.api import run_call
from raybsa.kernels.backward import BACKENDS, attention_backward
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.delta import row_delta
from tests.kernels.problems import Problem, relative_error

PROBLEM = Problem("part", batch=1, heads=2, kv_heads=1, groups=2, q_len=70, kv_len=70, causal=True)


def half_of_the_keys(device: str) -> tuple[AttentionCall, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The call over the first keys alone, and lse, delta and grad_out of the whole rows; float16."""
    layout, (q, k, v) = PROBLEM.layout(device), PROBLEM.inputs(torch.float16, device)
    bias = torch.randn(layout.nnz_blocks, device=device)
    whole = AttentionCall(q, k, v, layout, 0.25, None, None, bias, 0.0, None, True, True)
    out, lse = run_call(whole, "blocked")
    grad_out = torch.randn_like(out)
    part, index = layout.select(None, torch.arange(2, device=device), return_index=True)
    call = replace(whole, k=k[:, :, :64], v=v[:, :, :64], layout=part, block_bias=bias[index])
    return call, lse, row_delta(out, grad_out), grad_out


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_same_unrounded_gradients(backend: str, device: str) -> None:
    call, lse, delta, grad_out = half_of_the_keys(device)
    reason = BACKENDS[backend].why_not(call)
    if reason is not None:
        pytest.skip(reason)
    wide = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    wanted = attention_backward(wide, lse.double(), delta.double(), grad_out.double(), backend="blocked")
    for got, exact in zip(attention_backward(call, lse, delta, grad_out, backend=backend), wanted, strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got, exact) <= (2e-3 if backend == "triton" else 1e-5)


def test_what_does_not_fit_is_named() -> None:
    call, lse, delta, grad_out = half_of_the_keys("cpu")
    with pytest.raises(ValueError, match="lse and delta must be"):
        attention_backward(call, lse[:, :, :5], delta, grad_out)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        attention_backward(call, lse, delta, grad_out, backend="flex")
    with pytest.raises(ValueError, match="takes no attn_mask"):
        attention_backward(replace(call, attn_mask=torch.ones(70, 64, dtype=torch.bool)), lse, delta, grad_out)
    double = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot serve this call"):
        attention_backward(double, lse, delta, grad_out, backend="triton")
