"""Shared by the variants' tests: the dense mask of a pattern as torch's attention takes it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from raybsa import patterns


@pytest.fixture
def forbidden() -> Callable[..., Tensor]:
    """forbidden(pattern, q_len, kv_len, block_size, ...) -> (G, Sq, Skv) bool: True where a query may NOT attend."""

    def mask(pattern, q_len, kv_len=None, block_size=8, *, heads=1, causal=False, density=None) -> Tensor:
        kv_len = kv_len or q_len
        layout = patterns.build(pattern).layout(
            q_len, kv_len, num_heads=heads, q_block_size=block_size, causal=causal, density=density
        )
        kept = layout.to_dense()
        tokens = kept[:, torch.arange(q_len) // block_size][:, :, torch.arange(kv_len) // block_size]
        if causal:
            tokens = tokens & (torch.arange(kv_len) <= torch.arange(q_len)[:, None])
        return ~tokens

    return mask
