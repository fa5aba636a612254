"""The blocked backend's workspace stays bounded while the length grows; nothing of size num_blocks**2 appears."""

import pytest
import torch

from raybsa import BlockLayout, block_sparse_attention
from raybsa.kernels import chunks
from raybsa.timing import peak_bytes

HEADS, HEAD_DIM, BLOCK = 2, 16, 16


def window_and_globals(length: int) -> BlockLayout:
    blocks = torch.arange(length // BLOCK)
    first = torch.zeros_like(blocks)
    row = torch.cat([blocks, blocks[1:], first, blocks])
    col = torch.cat([blocks, blocks[:-1], blocks, first])
    return BlockLayout.from_blocks(
        torch.zeros_like(row), row, col, num_groups=1, q_len=length, kv_len=length, q_block_size=BLOCK
    )


def workspace(length: int) -> int:
    """Bytes beyond inputs, output and gradients."""
    layout = window_and_globals(length)
    leaves = [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]

    def step() -> object:
        out = block_sparse_attention(*leaves, layout, backend="blocked")
        return out, torch.autograd.grad(out, leaves, out)

    step()  # the plan is made once and stays with the layout
    results = 4 * leaves[0].numel() * leaves[0].element_size()
    return peak_bytes(step, "cpu") - results


def test_workspace_does_not_grow_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 2**21)
    monkeypatch.setattr(chunks, "PIECE_BYTES", 2**21)
    short, long = workspace(8192), workspace(65536)
    indices = 8 * HEADS * 2 * 65536 // BLOCK  # a flat int64 index a row and a few more of its kind
    assert short < 2**23
    assert long < short + 16 * indices


def test_the_default_bounds_keep_the_workspace_under_512_mb() -> None:
    assert max(chunks.CPU_CHUNK_BYTES, chunks.CUDA_CHUNK_BYTES, chunks.PIECE_BYTES) <= 2**27
