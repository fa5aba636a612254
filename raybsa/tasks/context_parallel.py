"""torch's two kinds of context parallelism as contenders: the dense SDPA ring, and FlexAttention over gathered K and V.

Prototypes of ``torch.distributed.tensor.experimental`` (torch 2.11 to 2.13), which say themselves which tokens a rank
holds: ``context_parallel`` by dealing a buffer of positions, FlexAttention's by ``_context_parallel_shard``. Both deal
from either end (head and tail), as torch does where nothing else is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from raybsa.kernels import flex
from raybsa.kernels.peers import dense
from raybsa.spec import TrialSpec
from raybsa.tasks.ring_contender import Contender, ring_layout

_MODULE = "torch.distributed.tensor.experimental._attention"
_NEEDED = ("context_parallel", "_context_parallel_shard", "_ContextParallel", "_HeadTailLoadBalancer")
_FLEX_BLOCK = 128  # the only one that torch cuts a block mask into
_SEQ_DIM = 2


def why_no_context_parallel(spec: TrialSpec, device: str, world_size: int, *, flex: bool) -> str | None:
    """Why torch cannot serve the question over ranks here; None where it can."""
    try:
        missing = [name for name in _NEEDED if not hasattr(import_module(_MODULE), name)]
    except ImportError as error:
        return f"torch {torch.__version__} has no context parallelism: {error}"
    if missing:
        return f"torch {torch.__version__} has no {', '.join(missing)} in {_MODULE}"
    if device != "cuda":
        kind = "FlexAttention has no backward" if flex else "torch's ring has no sharding rule for dense attention"
        return f"{kind} on {device}"
    if flex and spec.layer(0).block_size != _FLEX_BLOCK:
        return f"torch deals FlexAttention's masks in blocks of {_FLEX_BLOCK}, not {spec.layer(0).block_size}"
    dealt = 2 * world_size * _FLEX_BLOCK
    return None if spec.seq_len % dealt == 0 else f"torch deals multiples of {dealt} tokens, not {spec.seq_len}"


@contextmanager
def sdpa_context_parallel(spec: TrialSpec, mesh: Any, *, line: str) -> Iterator[Contender]:
    """Dense attention by a kernel of ``dense.LINES`` while torch's SDPA is replaced by its ring."""
    from torch.distributed.tensor.experimental import context_parallel

    tokens = torch.arange(spec.seq_len, device=mesh.device_type)
    with context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[0], no_restore_buffers={tokens}):
        yield Contender(tokens.clone(), partial(dense.attend, line, causal=spec.causal))


@contextmanager
def flex_context_parallel(spec: TrialSpec, mesh: Any) -> Iterator[Contender]:
    """FlexAttention with the pattern's blocks over K and V that are gathered whole before it."""
    from torch._dynamo import config
    from torch.distributed.tensor.parallel import parallelize_module

    experimental = import_module(_MODULE)
    balancer = experimental._HeadTailLoadBalancer(spec.seq_len, mesh.size(), mesh.device_type)
    tokens = torch.arange(spec.seq_len, device=mesh.device_type)
    shared = [tokens, _whole_mask(spec, mesh.device_type)]
    with config.patch(recompile_limit=64):  # the mask is compiled anew for every question
        mine, mask = experimental._context_parallel_shard(mesh, shared, [0, _SEQ_DIM], load_balancer=balancer)
    module = _Flex(mask, spec.num_heads != (spec.num_kv_heads or spec.num_heads))
    plan = experimental._ContextParallel(_SEQ_DIM, experimental._ContextParallel.AttentionType.FLEX)
    yield Contender(mine, parallelize_module(module, mesh, plan))


class _Flex(nn.Module):
    """What ``_ContextParallel`` hooks into: its forward gets the gathered K and V."""

    def __init__(self, mask: Any, enable_gqa: bool) -> None:
        super().__init__()
        self._mask, self._enable_gqa = mask, enable_gqa

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flex.attend(query, key, value, block_mask=self._mask, enable_gqa=self._enable_gqa)


def _whole_mask(spec: TrialSpec, device: str) -> Any:
    """The whole sequence's BlockMask, of which torch reads the mask function and the lengths alone."""
    from torch.nn.attention.flex_attention import BlockMask

    layout = ring_layout(spec, device)
    if layout.num_groups != 1:
        raise ValueError(f"torch deals a mask that all heads share, got a layout of {layout.num_groups} groups")
    kept, size, causal = layout.to_dense()[0], layout.q_block_size, spec.causal

    def sees(batch: Tensor, head: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        of_block = kept[q_index // size, kv_index // size]
        return of_block & (kv_index <= q_index) if causal else of_block

    blocks = layout.num_q_blocks
    counts = torch.zeros(1, 1, blocks, dtype=torch.int32, device=device)
    indices = torch.zeros(1, 1, blocks, blocks, dtype=torch.int32, device=device)
    return BlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=size, mask_mod=sees, seq_lengths=(spec.seq_len, spec.seq_len)
    )
