"""The dense weights that ``need_weights=True`` asks for: O(Sq * Skv) memory, as in nn.MultiheadAttention."""

from __future__ import annotations

import torch
from torch import Tensor

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.ordinary import is_shape_alone
from raybsa.kernels.reference import dropout_factor, masked_scores, softmax


def attention_weights(call: AttentionCall, extra_keys: Tensor | None) -> Tensor:
    """(B, H, Sq, Skv + E) in q's dtype: the weights that ``call`` gives its values, dropout included.

    They sum to 1 over the kept blocks (before dropout); a query with nothing to attend has weights 0. Differentiable.

    Args:
        call: the arguments; k and v have as many heads as q.
        extra_keys: (B, H, E, D) keys that every query sees, or None.
    """
    if is_shape_alone(call.q):
        return _shaped(call, extra_keys)
    with torch.autocast(call.q.device.type, enabled=False):
        scores = masked_scores(call)
        if extra_keys is not None:
            extra = call.q.to(scores.dtype) @ extra_keys.to(scores.dtype).transpose(-1, -2) * call.scale
            scores = torch.cat([scores, extra], -1)
        weights = softmax(scores)
        if call.dropout_p:
            weights = weights * dropout_factor(call, torch.arange(weights.shape[-1], device=weights.device))
        return weights.to(call.q.dtype)


def _shaped(call: AttentionCall, extra_keys: Tensor | None) -> Tensor:
    """The weights' shape, type and whose gradients they have, of fake tensors and of those on the meta device."""
    keys = call.k if extra_keys is None else torch.cat([call.k, extra_keys], 2)
    return torch.softmax(call.q @ keys.transpose(-1, -2), -1)
