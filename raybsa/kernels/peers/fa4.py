"""FlashAttention 4 (``flash_attn.cute`` of flash-attn-4) as a backend: block lists of 128 x 128 on Hopper.

Its block lists on sm_90 fit one tile only, so other blocks are refused (flash-attention PR 2903). Its sparse backward
at head_dim 64 was silently wrong before 4.0.0b36 (issue 2623). A block that the diagonal cuts needs a mask function,
which this adapter does not give. dQ is summed with atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.kept import kept_with
from raybsa.kernels.peers.guards import why_not_hopper, why_not_installed, why_not_plain
from raybsa.kernels.peers.lists import Lists, column_lists, row_lists

PACKAGE, OLDEST = "flash-attn-4", "4.0.0b36"
BLOCK = 128
HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)


def why_not(call: AttentionCall) -> str | None:
    """Why FA4 cannot serve this call, or not surely right; None where it can."""
    return (
        why_not_installed(PACKAGE, OLDEST)
        or why_not_hopper(call.q.device, "FA4")
        or _why_not_shape(call)
        or why_not_plain(call, "FA4")
    )


def _why_not_shape(call: AttentionCall) -> str | None:
    layout = call.layout
    if call.q.dtype not in DTYPES:
        return f"FA4 takes float16 and bfloat16, got {call.q.dtype}"
    if call.q.shape[-1] not in HEAD_DIMS:
        return f"FA4's sparse kernels were checked for head_dim {HEAD_DIMS}, got {call.q.shape[-1]}"
    if (layout.q_block_size, layout.kv_block_size) != (BLOCK, BLOCK):
        return f"FA4 takes blocks of {BLOCK} x {BLOCK}, got {layout.q_block_size} x {layout.kv_block_size}"
    return None


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """out (B, H, Sq, D), and lse (B, H, Sq) float32 if the call wants it; differentiable by FA4's own autograd."""
    from flash_attn.cute import flash_attn_func

    out, lse = flash_attn_func(
        call.q.transpose(1, 2),
        call.k.transpose(1, 2),
        call.v.transpose(1, 2),
        softmax_scale=call.scale,
        pack_gqa=False,
        block_sparse_tensors=_blocks(call, "rows"),
        block_sparse_tensors_bwd=_blocks(call, "columns") if call.needs_grad else None,
        return_lse=call.return_lse,
    )
    return out.transpose(1, 2), lse if call.return_lse else None


def _blocks(call: AttentionCall, side: str) -> Any:
    """FA4's tensors of a side, kept as long as the layout lives."""
    batch, heads = call.q.shape[:2]
    known, key = kept_with(call.layout), ("fa4", side, batch, heads)
    if key not in known:
        make = row_lists if side == "rows" else column_lists
        known[key] = _tensors(make(call.layout, batch, heads))
    return known[key]


def _tensors(lists: Lists) -> Any:
    """All blocks are full; the list of partial ones is empty, and its indices are never read."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(lists.counts),
        mask_block_idx=torch.zeros_like(lists.indices),
        full_block_cnt=lists.counts,
        full_block_idx=lists.indices,
        block_size=(BLOCK, BLOCK),
    )
