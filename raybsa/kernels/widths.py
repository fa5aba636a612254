"""Sizes that no kernel is asked for: values of another width than the keys, and sizes of zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from raybsa.aside import shape_of
from raybsa.kernels.call import AttentionCall, compute_dtype


def is_for_kernels(call: AttentionCall) -> bool:
    """Whether there is something to attend, and values are as wide as keys."""
    (batch, _, queries, width), keys = shape_of(call.q), shape_of(call.k)[2]
    return bool(batch and queries and keys and shape_of(call.v)[-1] == width)


def in_sizes_of_kernels(
    call: AttentionCall, run: Callable[[AttentionCall], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """out and lse of any call by what runs those that are for kernels."""
    nothing = nothing_to_attend(call.q, call.k, call.v)
    if nothing is not None:
        return nothing
    width = shape_of(call.v)[-1]
    if width == shape_of(call.q)[-1]:
        return run(call)
    q, k, v = one_width(call.q, call.k, call.v)
    out, lse = run(replace(call, q=q, k=k, v=v))
    return out[..., :width], lse


def one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, or v, filled up with zeros to the width of the other: columns of zeros change no score, and what they
    give are zeros."""
    missing = shape_of(v)[-1] - shape_of(q)[-1]
    if missing <= 0:
        return q, k, F.pad(v, (0, -missing)) if missing else v
    return F.pad(q, (0, missing)), F.pad(k, (0, missing)), v


def nothing_to_attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """out (B, H, Sq, Dv), zeros, and lse (B, H, Sq), -inf, where there are no samples, no queries or no keys; None
    where there are. Differentiable, with gradients of zeros.

    Raises:
        ValueError: sizes that do not fit together.
    """
    (batch, heads, queries, head_dim), keys = shape_of(q), shape_of(k)[2]
    if batch and queries and keys:
        return None
    kv_heads = max(k.shape[1], 1)
    if k.shape[::3] != (batch, head_dim) or v.shape[:3] != k.shape[:3] or heads % kv_heads:
        raise ValueError(f"q, k and v must fit together, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")
    copies = heads // kv_heads
    scores = q @ k.repeat_interleave(copies, 1).transpose(-1, -2)  # of no elements
    lse = scores.sum(-1, dtype=compute_dtype(q.dtype)) - float("inf")
    return scores @ v.repeat_interleave(copies, 1), lse
