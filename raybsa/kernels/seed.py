"""The seed of dropout as a tensor: drawn by an operation that torch knows to be random, so that checkpointing, compiled
backwards, CUDA graphs and ``torch.manual_seed`` treat it as they treat torch's own dropout."""

from __future__ import annotations

import torch
from torch import Tensor


def seed_for(seed: int | None, device: torch.device) -> Tensor:
    """() int64 on ``device``: ``seed``, of which the lower 32 bits count, or where that is None a number drawn from
    torch's default generator of the device."""
    if seed is None:
        return torch.randint(2**31 - 1, (), device=device)
    return torch.full((), seed & 0xFFFFFFFF, dtype=torch.int64, device=device)
