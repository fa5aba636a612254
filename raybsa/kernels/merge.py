"""The only lawful way to add two partial attention results over disjoint sets of keys.

``lse = log(exp(lse_a) + exp(lse_b))`` and ``out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)``: the online
softmax of Milakov and Gimelshein (1805.02867), as FlashAttention and ring attention use it.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    lse = torch.logaddexp(lse_a, lse_b)
    finite = torch.where(lse == float("-inf"), 0.0, lse)
    weight_a, weight_b = torch.exp(lse_a - finite)[..., None], torch.exp(lse_b - finite)[..., None]
    out = out_a.to(lse.dtype) * weight_a + out_b.to(lse.dtype) * weight_b
    return out.to(out_a.dtype), lse
