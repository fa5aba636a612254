"""The masks of other people's modules, in the words of the kernels and of torch's SDPA; for ``swap`` alone."""

from __future__ import annotations

import torch
from torch import Tensor

from raybsa.kernels.call import AttentionCall


def settle_mask(mask: Tensor | None, is_causal: bool) -> tuple[bool, Tensor | None]:
    """Whether a call is causal, and what is left to say by a mask once a causal layout says that.

    A mask that differs by query and shows no later key makes a call causal; it is dropped where it says nothing else.

    Args:
        mask: broadcastable to (B, H, Sq, Skv), bool (True = attend) or added to the scores.
        is_causal: the caller's word; the mask is then not read.
    """
    if is_causal:
        return True, None
    if mask is None or mask.dim() < 2 or 1 in mask.shape[-2:]:
        return False, mask
    earlier = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    shown = mask if mask.dtype == torch.bool else mask != -torch.inf
    if bool((shown & ~earlier).any()):
        return False, mask
    plain = shown | ~earlier if mask.dtype == torch.bool else mask.masked_fill(~earlier, 0) == 0
    return True, None if bool(plain.all()) and not mask.requires_grad else mask


def dense_mask(call: AttentionCall) -> tuple[Tensor | None, bool]:
    """``attn_mask`` and ``is_causal`` by which torch's SDPA computes a call over all of its layout's blocks."""
    mask = call.attn_mask
    if call.segment_ids is not None:
        q_ids, kv_ids = call.segment_ids
        mask = _both(mask, q_ids[:, None, :, None] == kv_ids[:, None, None, :])
    if not call.layout.causal or mask is None:
        return mask, call.layout.causal
    earlier = torch.ones(call.q.shape[2], call.k.shape[2], dtype=torch.bool, device=mask.device).tril()
    return _both(mask, earlier), False


def _both(mask: Tensor | None, shown: Tensor) -> Tensor:
    """What both show; ``shown`` is bool."""
    if mask is None:
        return shown
    return mask & shown if mask.dtype == torch.bool else torch.where(shown, mask, -torch.inf)
