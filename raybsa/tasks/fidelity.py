"""How exact a layer's attention is: its errors against the dense reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from raybsa import patterns
from raybsa.kernels.api import block_sparse_attention
from raybsa.spec import TrialSpec
from raybsa.tasks.attention import build_attention
from raybsa.tasks.speed import synthetic_qkv


def relative_errors(spec: TrialSpec, length: int, device: torch.device) -> tuple[float, float | None]:
    """(forward, gradient): max abs difference / max abs reference of layer 0 at ``length`` tokens.

    The reference sees the same q, k, v, rounded to the trial's dtype, in float64 and needs O(length**2) memory. The
    gradient is that of the sum of out * out; the worst of dq, dk and dv counts; None where the backend has none.
    """
    attention = spec.layer(0)
    if attention.pattern is None:
        raise ValueError("errors are those of block-sparse attention, got the dense baseline")
    inputs = synthetic_qkv(replace(spec, seq_len=length), device)
    layout = patterns.build(attention.pattern).layout(
        length,
        num_heads=spec.num_heads,
        q_block_size=attention.block_size,
        causal=spec.causal,
        density=attention.density,
        device=device,
    )

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = block_sparse_attention(q, k, v, layout, backend="reference")
        assert isinstance(out, Tensor)
        return out

    module = build_attention(attention, causal=spec.causal).to(device)
    wide = tuple(x.double() for x in inputs)
    with torch.no_grad():
        forward = _relative(module(*inputs), reference(*wide))
    try:
        gradients = _gradients(module, inputs)
    except NotImplementedError:  # the backend says that it has no backward here
        return forward, None
    return forward, max(_relative(a, b) for a, b in zip(gradients, _gradients(reference, wide), strict=True))


def _gradients(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(attend(*leaves).square().sum(), leaves)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())
