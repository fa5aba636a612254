"""block_mass: how much of its rows' attention each kept block holds, from the rows' lse."""

from __future__ import annotations

import torch
from torch import Tensor

from raybsa.kernels import triton_backend
from raybsa.kernels.call import AttentionCall, check_call, compute_dtype
from raybsa.kernels.chunks import plan_chunks
from raybsa.kernels.gather import BlockTable
from raybsa.kernels.scores import ChunkScores, take_rows

INF = float("inf")


@torch.no_grad()
def block_mass(call: AttentionCall, lse: Tensor, sharpness: float = 1.0) -> Tensor:
    """(nnz,) in the compute dtype: the sum of the weights between the queries and keys of each kept block.

    It is the gradient of ``lse.sum()`` by ``block_bias``, of one product instead of a backward's five; on a GPU where
    the Triton kernels can serve the call, of their dQ kernel. A row of blocks holds as much as it has queries that see
    something; heads and samples that share a layout are summed. Dropout plays no part.

    Args:
        call: what was attended.
        lse: (B, H, Sq) of the whole rows, of which this call may hold a part of the keys; -inf where a row saw nothing.
        sharpness: the power to which a query's weights of a block are taken, once summed over its keys. Only at 1 there
            is a kernel.
    """
    check_call(call)
    if sharpness == 1.0 and call.q.is_cuda and triton_backend.why_not(call) is None:
        return triton_backend.mass(call, lse.contiguous())
    with torch.autocast(call.q.device.type, enabled=False):
        plan, dtype, layout = plan_chunks(call), compute_dtype(call.q.dtype), call.layout
        queries, keys = (
            BlockTable.of(x, size) for x, size in ((call.q, layout.q_block_size), (call.k, layout.kv_block_size))
        )
        norms = BlockTable.of(lse.masked_fill(lse == -INF, INF)[..., None], layout.q_block_size)
        mass = torch.zeros(layout.nnz_blocks, dtype=dtype, device=layout.device)
        for chunk in plan.chunks:
            at = ChunkScores(call, chunk, plan.columns)
            taken = keys.take(keys.index(chunk.kv_head, at.kv_block), len(chunk.row), dtype)
            scores = at.scores(take_rows(queries, at, dtype), taken)
            weights = at.without_padding(scores.sub_(take_rows(norms, at, dtype)).exp_())
            held = weights.view(*weights.shape[:2], chunk.width, -1).sum(3)
            sums = (held if sharpness == 1.0 else held.pow_(sharpness)).sum(1)
            mass.index_add_(0, at.slots.view(-1), sums.view(-1))
        return mass
