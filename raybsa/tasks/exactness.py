"""How exact a layer's attention is: its errors against the dense reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from raybsa.spec import TrialSpec
from raybsa.tasks.attention import timed_attention
from raybsa.tasks.speed import synthetic_qkv


def relative_errors(spec: TrialSpec, length: int, device: torch.device) -> tuple[float, float | None]:
    """(forward, gradient): max abs difference / max abs reference of layer 0 at ``length`` tokens.

    The reference sees the same q, k, v, rounded to the trial's dtype, in float64 and needs O(length**2) memory. The
    gradient is that of the sum of out * out; the worst of dq, dk and dv counts; None where the backend has none.
    """
    if spec.layer(0).pattern is None:
        raise ValueError("errors are those of block-sparse attention, got the dense baseline")
    exact = replace(spec, attention=tuple(replace(layer, backend="reference") for layer in spec.attention))
    inputs = synthetic_qkv(replace(spec, seq_len=length), device)
    wide = tuple(x.double() for x in inputs)
    module = timed_attention(spec, 0).to(device, inputs[0].dtype)
    reference = timed_attention(exact, 0).to(device, torch.float64)
    reference.load_state_dict(module.state_dict())
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
