"""ShardedSequence: what a model's other layers need to know of a sequence that is split across ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raybsa.comm import Communicator
from raybsa.ring.partition import Partition
from raybsa.ring.shared_partitions import partitions_of


@dataclass(frozen=True, eq=False)
class ShardedSequence:
    """One rank's view of a sequence: where its tokens are, and what stands before each of them.

    Args:
        partition: who owns which tokens: the one that the layers on this group go by.
        communicator: of ``partition.world_size`` ranks.

    Raises:
        ValueError: a partition for another number of ranks, or another one than the group has for this length; also
            where it is used once that was forgotten.
    """

    partition: Partition
    communicator: Communicator

    def __post_init__(self) -> None:
        if self.partition.world_size != self.communicator.world_size:
            raise ValueError(
                f"the partition is for {self.partition.world_size} ranks, the communicator has "
                f"{self.communicator.world_size}"
            )
        partitions_of(self.communicator).settle(self.partition)

    @classmethod
    def whole(cls, seq_len: int, device: torch.device | str = "cpu") -> ShardedSequence:
        """All tokens on one rank."""
        one_block = 1 << (seq_len - 1).bit_length()
        partition = Partition(seq_len, one_block, torch.zeros(1, dtype=torch.int64), 1)
        return cls(partition, Communicator(device=device))

    @cached_property
    def positions(self) -> Tensor:
        """(tokens,) int64: the global positions of this rank's tokens, on the communicator's device."""
        return self.partition.tokens(self.communicator.rank).to(self.communicator.device)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a whole tensor; (B, S) by default."""
        partitions_of(self.communicator).confirm(self.partition)
        return self.partition.shard(x, self.communicator.rank, dim)

    def previous(self, x: Tensor) -> Tensor:
        """x (B, H, tokens, D) of the token before each of this rank's tokens; the first of all keeps its own.

        Differentiable; the few that stand on another rank travel ("halo" in the ledger), and so do their gradients.
        """
        partitions_of(self.communicator).confirm(self.partition)
        out = _Previous.apply(x, self)
        assert isinstance(out, Tensor)
        return out

    @cached_property
    def halo(self) -> Halo:
        return Halo.of(self.partition, self.communicator.rank, self.communicator.device)


@dataclass(frozen=True, eq=False)
class Halo:
    """Where the tokens before a rank's tokens are.

    Args:
        place: (tokens,) int64 into the rank's tokens followed by those received, peers in ascending order.
        sends: peer -> (n,) places of the rank's own tokens that stand before a token of the peer.
        receives: peer -> how many come from it.
    """

    place: Tensor
    sends: dict[int, Tensor]
    receives: dict[int, int]

    @classmethod
    def of(cls, partition: Partition, rank: int, device: torch.device) -> Halo:
        owner, local = _homes(partition)
        mine = partition.tokens(rank)
        before = (mine - 1).clamp(min=0)
        place, receives, offset = local[before].clone(), {}, len(mine)
        sends = {}
        ends = mine[mine + 1 < partition.seq_len]
        for peer in range(partition.world_size):
            if peer == rank:
                continue
            theirs = (owner[before] == peer).nonzero()[:, 0]
            if len(theirs):
                place[theirs] = offset + torch.arange(len(theirs))
                receives[peer], offset = len(theirs), offset + len(theirs)
            given = ends[owner[ends + 1] == peer]
            if len(given):
                sends[peer] = local[given].to(device)
        return cls(place.to(device), sends, receives)


def _homes(partition: Partition) -> tuple[Tensor, Tensor]:
    """(seq_len,) int64 twice: the rank of every token, and its place among that rank's tokens."""
    owner = partition.owner_of(1)
    local = torch.empty_like(owner)
    for rank in range(partition.world_size):
        mine = partition.tokens(rank)
        local[mine] = torch.arange(len(mine))
    return owner, local


class _Previous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sequence: ShardedSequence) -> Tensor:
        halo = sequence.halo
        ctx.sequence, ctx.tokens = sequence, x.shape[2]
        sends = {peer: x.index_select(2, places).contiguous() for peer, places in halo.sends.items()}
        receives = {peer: _like(x, count) for peer, count in halo.receives.items()}
        sequence.communicator.exchange("halo", sends, receives).wait()
        return torch.cat([x, *receives.values()], 2).index_select(2, halo.place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sequence: ShardedSequence = ctx.sequence
        halo = sequence.halo
        total = _like(grad, ctx.tokens + sum(halo.receives.values())).zero_()
        total.index_add_(2, halo.place, grad)
        own, *back = total.split([ctx.tokens, *halo.receives.values()], 2)
        own = own.contiguous()
        sends = {peer: part.contiguous() for peer, part in zip(halo.receives, back, strict=True)}
        receives = {peer: _like(grad, len(places)) for peer, places in halo.sends.items()}
        sequence.communicator.exchange("halo", sends, receives).wait()
        for peer, places in halo.sends.items():
            own.index_add_(2, places, receives[peer])
        return own, None


def _like(x: Tensor, tokens: int) -> Tensor:
    return x.new_empty(*x.shape[:2], tokens, *x.shape[3:])
