"""From q and k to what a choice compares: u of query blocks and w of KV blocks, whose products are scores."""

from __future__ import annotations

import torch
from torch import Tensor

from raybsa.selectors.gate import Gate, position_waves
from raybsa.selectors.pooling import block_stats, blocks_before, key_features, query_features, runs_kernels
from raybsa.selectors.rules import Rules
from raybsa.selectors.visibility import Visibility


def compare_whole(
    gate: Gate | None, q: Tensor, k: Tensor, rules: Rules, visible: Visibility | None = None
) -> tuple[Tensor, Tensor]:
    """u (B, Hkv, num_q_blocks, d) and w (B, Hkv, num_kv_blocks, d) of q (B, H, Sq, D) and k (B, Hkv, Skv, D).

    On a GPU, where no gradient is wanted and there are no masks, by kernels of our own.
    """
    if visible is not None:
        own, keys = (block_stats(q, rules.block_size, visible.queries), block_stats(k, rules.block_size, visible.keys))
        return compare(gate, own, blocks_before(own) if rules.causal else None, keys, rules, None, visible)
    if gate is not None and gate.dtype == torch.float32 and runs_kernels(q) and not torch.is_grad_enabled():
        from raybsa.selectors.triton_gate import gated

        waves = position_waves(-(-max(q.shape[2], k.shape[2]) // rules.block_size), q.device)
        return gated(q, k, gate, waves, rules.block_size, rules.causal)
    own, keys = block_stats(q, rules.block_size), block_stats(k, rules.block_size)
    return compare(gate, own, blocks_before(own) if rules.causal else None, keys, rules)


def compare(
    gate: Gate | None,
    own: Tensor,
    before: Tensor | None,
    keys: Tensor,
    rules: Rules,
    rows: Tensor | None = None,
    visible: Visibility | None = None,
) -> tuple[Tensor, Tensor]:
    """u (B, Hkv, rows, d) and w (B, Hkv, num_kv_blocks, d) of the blocks' statistics.

    Args:
        gate: None compares mean queries with mean keys.
        own, before: (B, H, rows, 3, D) as ``query_features`` takes them.
        keys: (B, Hkv, num_kv_blocks, 3, D) of all of k.
        rows: (rows,) int64 numbers of the query blocks; None: the first ones.
        visible: what these rows may look at; None: all.
    """
    if visible is not None:
        own, before = visible.readable(own, before)
    if gate is None:
        mean = own[:, :, :, 0] if before is None else before[:, :, :, 0] + own[:, :, :, 2] / rules.block_size
        return mean.unflatten(1, (keys.shape[1], -1)).mean(2), keys[:, :, :, 0]
    with torch.autocast(own.device.type, enabled=False):
        waves = position_waves(max(own.shape[2], keys.shape[2]), keys.device)
        features = query_features(own, before, keys.shape[1])
        u = gate.queries(features, waves[: own.shape[2]] if rows is None else waves[rows])
        features = key_features(keys, None if visible is None else visible.keys_before)
        return u, gate.keys(features, waves[: keys.shape[2]])
