"""What the ranks of a ring tell each other before any waits for another: what is wrong, or what is about to run."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from raybsa.comm import Communicator
from raybsa.gradients.codec import Codec
from raybsa.ring.partition import Partition
from raybsa.ring.plan import RingPlan


def signature(
    q: Tensor,
    k: Tensor,
    plan: RingPlan,
    scale: float | None,
    segment_ids: Tensor | None,
    dropout_p: float,
    seed: int | None,
    codec: Codec,
) -> str:
    """What every rank must say alike; tokens differ by rank and are the partition's, which the plan's digest covers."""
    return (
        f"plan {plan.digest}, {q.dtype}, batch {q.shape[0]}, {q.shape[1]} query and {k.shape[1]} KV heads of "
        f"{q.shape[3]}, scale {scale}, segments {segment_ids is not None}, dropout {dropout_p} from seed {seed}, "
        f"gradients by {_spec_of(codec)}"
    )


def problem_with(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: RingPlan,
    communicator: Communicator,
    block_bias: Tensor | None,
    dropout_p: float,
    seed: int | None,
) -> str | None:
    """What is wrong with this rank's arguments; every rank hears of it before any waits for another."""
    rank = communicator.rank
    if plan.world_size != communicator.world_size:
        return f"the plan is for {plan.world_size} ranks, the communicator has {communicator.world_size}"
    problem = _problem_with_shards(q, k, v, plan.partition, rank)
    if problem is not None:
        return problem
    if len({x.dtype for x in (q, k, v)}) > 1:
        return f"q, k and v of rank {rank} must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
    batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    if kv_heads * plan.queries_per_kv != heads:
        return f"the plan is for {plan.queries_per_kv} query heads a KV head, got {heads} and {kv_heads}"
    if plan.layout.num_groups not in (1, heads, batch * heads):
        return (
            f"the plan's layout must have 1, {heads} (heads) or {batch * heads} (batch * heads) groups, "
            f"got {plan.layout.num_groups}"
        )
    kept = plan.of_rank(rank).layout.nnz_blocks
    if block_bias is not None and block_bias.shape != (kept,):
        return (
            f"block_bias of rank {rank} must be ({kept},), one a block of plan.of_rank({rank}).layout, "
            f"got {tuple(block_bias.shape)}"
        )
    return "dropout_p needs a seed, the same on every rank: got None" if dropout_p and seed is None else None


def check_shards(q: Tensor, k: Tensor, partition: Partition, communicator: Communicator) -> None:
    """Raises ValueError on every rank where one's q or k holds other tokens than the partition deals it."""
    problem = _problem_with_shards(q, k, k, partition, communicator.rank)
    communicator.agree("the shards", problem or f"partition {partition.digest()}, all tokens there")
    if problem is not None:
        raise ValueError(problem)


@lru_cache(maxsize=64)
def _spec_of(codec: Codec) -> str:
    return str(codec.spec)


def _problem_with_shards(q: Tensor, k: Tensor, v: Tensor, partition: Partition, rank: int) -> str | None:
    tokens = partition.lengths[rank]
    if q.shape[2] == tokens == k.shape[2] and v.shape == k.shape and q.shape[::3] == k.shape[::3]:
        return None
    return (
        f"rank {rank} holds {tokens} tokens of the plan's partition, got q {tuple(q.shape)}, k {tuple(k.shape)} "
        f"and v {tuple(v.shape)}"
    )
