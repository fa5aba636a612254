"""Attention with a few extra keys that every query sees: nn.MultiheadAttention's add_bias_kv and add_zero_attn.

They have no position, so no block holds them: they are attended apart, densely, and merged by lse.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raybsa.kernels.api import run_call
from raybsa.kernels.call import AttentionCall, compute_dtype
from raybsa.kernels.merge import merge
from raybsa.kernels.ordinary import is_shape_alone
from raybsa.kernels.reference import dropout_factor


def attend(call: AttentionCall, extra: tuple[Tensor, Tensor] | None, backend: str) -> Tensor:
    """out (B, H, Sq, D) over the kept blocks and the extra keys.

    Args:
        call: the arguments, with ``return_lse`` where there are extra keys.
        extra: keys and values (B, H, E, D), or None.
        backend: as in ``block_sparse_attention``.
    """
    out, lse = run_call(call, backend)
    return out if extra is None else merge(out, lse, *_attend_extra(call, *extra, out.dtype))[0]


def _attend_extra(call: AttentionCall, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, D) in ``dtype`` and lse (B, H, Sq); of tensors without numbers, their shapes."""
    if is_shape_alone(call.q):
        out, weights = attend_extra_alone(call.q, keys, values, call.scale, 0.0)
        return out, weights.sum(-1, dtype=compute_dtype(call.q.dtype))
    with torch.autocast(call.q.device.type, enabled=False):
        q, k, v = (x.to(compute_dtype(call.q.dtype)) for x in (call.q, keys, values))
        scores = q @ k.transpose(-1, -2) * call.scale
        weights = torch.softmax(scores, -1)
        if call.dropout_p:
            begin = call.k.shape[2]
            columns = torch.arange(begin, begin + k.shape[2], device=k.device)
            weights = weights * dropout_factor(call, columns)
        return (weights @ v).to(dtype), torch.logsumexp(scores, -1)


def attend_extra_alone(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, D) over the extra keys (B, H, E, D) where there are no others, and the weights (B, H, Sq, E)."""
    weights = F.dropout(torch.softmax(q @ keys.transpose(-1, -2) * scale, -1), dropout_p)
    return weights @ values, weights
