"""The only lawful way to add two partial attention results over disjoint sets of keys.

``lse = log(exp(lse_a) + exp(lse_b))`` and ``out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)``: the online
softmax of Milakov and Gimelshein (1805.02867), as FlashAttention and ring attention use it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raybsa.kernels.triton_setup import has_kernels

INF = float("inf")


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets.

    Args:
        out_a, out_b: (..., D) partial outputs, each normalised by its own softmax.
        lse_a, lse_b: (...) natural-log sums of exponentials, float32 or float64; -inf where a side saw no key.

    Returns:
        out (..., D) in the outputs' dtype, computed in lse's dtype, and lse (...). Where neither side saw a key, out is
        0 and lse is -inf.
    """
    if lse_a.shape != lse_b.shape or out_a.shape != out_b.shape or out_a.shape[:-1] != lse_a.shape:
        raise ValueError(
            f"merge takes out (..., D) and lse (...), got {tuple(out_a.shape)} and {tuple(lse_a.shape)}, "
            f"{tuple(out_b.shape)} and {tuple(lse_b.shape)}"
        )
    lse, weight_a, weight_b = _weights(lse_a, lse_b)
    out = out_a.to(lse.dtype) * weight_a + out_b.to(lse.dtype) * weight_b
    return out.to(out_a.dtype), lse


def _weights(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The merged lse (...), and both sides' weights (..., 1)."""
    blind = (lse_a == -INF) & (lse_b == -INF)
    lse_a, lse_b = torch.where(blind, 0.0, lse_a), torch.where(blind, 0.0, lse_b)  # else nan would be their gradient
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (torch.exp(x - lse).masked_fill(blind, 0.0)[..., None] for x in (lse_a, lse_b))
    return torch.where(blind, -INF, lse), weight_a, weight_b


def merge_rows(
    whole: Tensor, whole_lse: Tensor, out: Tensor, lse: Tensor, rows: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``merge`` of all rows with a part of some of them; what the whole had may be written over.

    Args:
        whole, whole_lse: (B, H, S, D) in any dtype and (B, H, S) float32 or float64, as ``merge`` takes them.
        out, lse: (B, H, n, D) and (B, H, n) of the rows.
        rows: (n,) int64, none twice; None: all of them, in order.
        dtype: what the merged output is returned in; it is computed in lse's dtype.
    """
    if has_kernels(whole) and lse.dtype == torch.float32:
        from raybsa.kernels.triton_rows import merged_rows

        return merged_rows(whole, whole_lse, out, lse, rows, dtype)
    wide = whole.to(lse.dtype)
    here, here_lse = (x if rows is None else x.index_select(2, rows) for x in (wide, whole_lse))
    merged_lse, weight_a, weight_b = _weights(here_lse, lse)
    here.mul_(weight_a).addcmul_(out.to(lse.dtype), weight_b)
    if rows is None:
        return here.to(dtype), merged_lse
    wide.index_copy_(2, rows, here)
    whole_lse.index_copy_(2, rows, merged_lse)
    return wide.to(dtype), whole_lse
