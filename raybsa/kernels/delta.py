"""delta: what the gradient of softmax takes off the gradient of every weight of a row (FlashAttention, 2205.14135)."""

from __future__ import annotations

from torch import Tensor

from raybsa.kernels.call import compute_dtype
from raybsa.kernels.triton_setup import has_kernels


def fast_delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None = None) -> Tensor:
    """As ``row_delta``, on a GPU in one launch of a kernel of ours."""
    if has_kernels(out):
        from raybsa.kernels.triton_rows import fused_delta

        return fused_delta(out, grad_out, grad_lse)
    return row_delta(out, grad_out, grad_lse)


def row_delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None = None) -> Tensor:
    """(B, H, S) in the compute dtype: ``sum(out * grad_out, -1) - grad_lse``, made one (batch, head) at a time.

    Args:
        out: (B, H, S, D) of the attention over all keys of the rows.
        grad_out: (B, H, S, D).
        grad_lse: (B, H, S) or None.
    """
    delta = out.new_empty(out.shape[:-1], dtype=compute_dtype(out.dtype))
    for mine, theirs, target in zip(out.flatten(0, 1), grad_out.flatten(0, 1), delta.flatten(0, 1), strict=True):
        target.copy_((mine.to(delta.dtype) * theirs).sum(-1))
    return delta if grad_lse is None else delta.sub_(grad_lse)
