"""torch's dense SDPA by a named kernel: the line that sparse kernels are measured against (its time × density)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

IDEAL = "sdpa-cudnn"
LINES = {IDEAL: SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Dense attention (B, H, Sq, D) by the kernel of this name; raises RuntimeError where torch cannot use it."""
    with sdpa_kernel(LINES[name]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
