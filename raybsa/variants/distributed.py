"""BlockSparseDistributed: attention over a sequence that is split across ranks; each holds its shard of q, k and v."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from raybsa.comm import Communicator
from raybsa.gradients.catalog import build
from raybsa.gradients.state import State
from raybsa.kernels.call import cast_inputs
from raybsa.kernels.eager import eagerly
from raybsa.kernels.ordinary import check_numbers_at_hand
from raybsa.layout import BlockLayout
from raybsa.ring.agreement import check_shards
from raybsa.ring.attention import ring_attention
from raybsa.ring.mass import ring_block_mass
from raybsa.ring.partition import STRATEGIES, Partition, partition_for
from raybsa.ring.plan import RingPlan, plan_for
from raybsa.ring.shared_partitions import HELP, Dealing, partitions_of
from raybsa.variants.selection import Selection
from raybsa.variants.selector import BlockSelector
from raybsa.variants.sharded_selection import select_shard
from raybsa.variants.source import FixedPattern, PatternLike, layout_source


@dataclass(frozen=True)
class DistributedConfig:
    """How ranks share a sequence. Plain data.

    Args:
        partition: ``"balanced"``, ``"contiguous"``, ``"zigzag"`` or ``"striped"``.
        equal_counts: ranks hold equally many blocks, give or take one; False lets ``"balanced"`` move more.
        gradient_codec: how partial sums of dK and dV travel: the name or the spec of a codec of ``raybsa.gradients``
            (not ``powersgd``, which needs sums over all ranks). What it loses of a fixed pattern is sent with the next
            step's: so a layer with a lossy one serves one attention of a model. A learned pattern's blocks are others
            in each step, and what is lost of them is lost.

    Raises:
        ValueError: an unknown partition or codec.
    """

    partition: str = "balanced"
    equal_counts: bool = True
    gradient_codec: str | Mapping[str, Any] = "none"

    def __post_init__(self) -> None:
        if self.partition not in STRATEGIES:
            raise ValueError(f"partition must be one of {sorted(STRATEGIES)}, got {self.partition!r}")
        if build(self.gradient_codec).name == "powersgd":
            raise ValueError("gradient_codec 'powersgd' needs sums over all ranks, dK and dV go from rank to rank")


class BlockSparseDistributed(nn.Module):
    """``BlockSparseBase`` over ranks: every rank calls it with its tokens and gets its rows, exactly.

    Unbound it is alone: world size 1, on the same path. ``bind`` gives it its group; ``shard`` cuts a whole tensor.
    All layers on one group go by one partition of a length: the one of the first that deals it, which suits its own
    blocks best. ``share_partition`` binds all layers of a model to one that suits them together.

    Args:
        config: how ranks share the sequence; None is whatever the group's partition is, and ``DistributedConfig()``
            where this layer deals it.
        segment_lengths, dilation_rates, pattern, density, block_size, causal, dropout, scale, backend: as in
            ``BlockSparseBase``. The pattern ``"adaptive"`` is learned: every rank chooses blocks for its own rows, by
            the pooled q and k of all (not the method ``"compressed"``); its loss is then this rank's part of a sum.
        num_heads, head_dim, num_kv_heads: of q and k, for the pattern ``"adaptive"`` alone.

    Attributes:
        source: says which blocks the whole sequence keeps.
        communicator: the group it is bound to.
        partition: who owns which tokens; None before the first ``shard``, ``prepare`` or ``bind`` with one: then a call
            goes by the partition that was last asked for on its group.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message names what was wanted and what came.
    """

    def __init__(
        self,
        config: DistributedConfig | None = None,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        *,
        pattern: PatternLike | None = None,
        density: float | None = None,
        block_size: int = 64,
        causal: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        backend: str = "auto",
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        if config is not None and not isinstance(config, DistributedConfig):
            raise TypeError(f"config must be a DistributedConfig, got {type(config).__name__}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}")
        self.config = config or DistributedConfig()
        self._has_config = config is not None  # else this layer goes by whatever the group has
        self.source = layout_source(
            pattern,
            segment_lengths,
            dilation_rates,
            density=density,
            block_size=block_size,
            causal=causal,
            num_heads=num_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
        )
        if isinstance(self.source, BlockSelector) and self.source.method == "compressed":
            raise ValueError("over ranks the adaptive pattern's method is distill, bias or mean-pool, got 'compressed'")
        self.dropout = dropout
        self.scale = scale
        self.backend = backend
        self.communicator = Communicator()
        self.partition: Partition | None = None
        self._codec = build(self.config.gradient_codec)
        self._states: WeakKeyDictionary[RingPlan, dict[int, State]] = WeakKeyDictionary()

    def bind(self, communicator: Communicator, partition: Partition | None = None) -> BlockSparseDistributed:
        """Gives the module its group, again after each rebuild; ``partition`` where layers share one. Returns self.

        Raises:
            ValueError: a partition for another number of ranks, for other blocks than this layer's, or another one than
                the group has for this length; the last names ``share_partition``.
        """
        if partition is not None:
            if partition.world_size != communicator.world_size:
                raise ValueError(
                    f"the partition is for {partition.world_size} ranks, the communicator has {communicator.world_size}"
                )
            partition.owner_of(self._block_size)
            partition = partitions_of(communicator).settle(partition)
        self.communicator, self.partition = communicator, partition
        self._states = WeakKeyDictionary()  # what a codec kept was for the ranks before
        return self

    def prepare(self, seq_len: int, num_heads: int = 1) -> Partition:
        """The group's partition of ``seq_len`` tokens, kept for the calls that follow; where there is none yet, the one
        that suits this layer's own layout best.

        Raises:
            ValueError: the group has one that does not fit this layer: its blocks would lie on several ranks, or its
                ``config`` asks for another; the message names ``share_partition``.
        """
        self.partition = self._settled(seq_len, num_heads)
        return self.partition

    def shard(self, x: Tensor, dim: int = 2) -> Tensor:
        """This rank's tokens of a whole tensor; (B, H, S, D) by default. Differentiable."""
        heads = x.shape[1] if x.dim() == 4 and dim in (2, -2) else 1
        return self.prepare(x.shape[dim], heads).shard(x, self.communicator.rank, dim)

    def gather(self, x: Tensor, dim: int = 2) -> Tensor:
        """The whole tensor from every rank's shard, on every rank. Not differentiable: take losses on shards."""
        partition = self._partition_of(x.shape[dim])
        longest = max(partition.lengths)
        moved = x.detach().movedim(dim, 0)
        padded = moved.new_zeros(longest, *moved.shape[1:])
        padded[: len(moved)] = moved
        parts = self.communicator.all_gather("gather", padded)
        return partition.join([p[:n] for p, n in zip(parts, partition.lengths, strict=True)], 0).movedim(0, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, segment_ids: Tensor | None = None) -> Tensor:
        """(B, H, S, D) in q's dtype: the rows of this rank's tokens. A query with nothing to attend gives 0.

        torch.compile leaves it as it is.

        Args:
            q: (B, H, S, D) this rank's tokens.
            k, v: (B, Hkv, S, D) the same tokens', with H a multiple of Hkv.
            segment_ids: (B, S) int, this rank's tokens'; tokens of different segments do not see each other.

        Raises:
            ValueError: shards that do not fit the partition or differ between ranks; every rank raises.
        """
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.dim() != 4:
                raise ValueError(f"{name} must be (batch, heads, tokens, head_dim), got {tuple(tensor.shape)}")
        return eagerly(self._attend, q, k, v, segment_ids)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        q, k, v = cast_inputs(q, k, v)
        check_numbers_at_hand("a ring", q, k, v)
        plan, selection = self._choose(q, k, segment_ids)
        out, lse = ring_attention(
            q,
            k,
            v,
            plan,
            self.communicator,
            scale=self.scale,
            segment_ids=segment_ids,
            block_bias=selection.block_bias,
            dropout_p=dropout,
            seed=self._shared_seed() if dropout else None,
            return_lse=True,
            gradient_codec=self._codec,
            gradient_states=self._states.setdefault(plan, {}),
            backend=self.backend,
        )
        if isinstance(self.source, BlockSelector) and self.source.distills:
            scale = 1.0 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale
            with torch.autocast(q.device.type, enabled=False):
                found = (q.detach(), k.detach(), lse.detach(), plan, self.communicator)
                sharpness = self.source.sharpness
                mass = ring_block_mass(*found, scale=scale, segment_ids=segment_ids, sharpness=sharpness)
                total = partial(self.communicator.all_reduce, "selector_loss")
                out = self.source.complete_shard(selection, out, mass, total)
        return out

    def plan(self, q: Tensor, k: Tensor) -> RingPlan:
        """The ring's plan for shards of these shapes: its traffic and balance, known before anything runs. Of a learned
        pattern only the work is known beforehand; the traffic told is that of the nearest blocks."""
        partition = self._partition_of(q.shape[2])
        layout = self._layout(partition.seq_len, q.shape[1], q.device)
        return plan_for(layout, partition, queries_per_kv=max(1, q.shape[1] // max(1, k.shape[1])))

    def _choose(self, q: Tensor, k: Tensor, segment_ids: Tensor | None) -> tuple[RingPlan, Selection]:
        """The plan of this call, and the bias and choice of this rank's blocks."""
        partition = self._partition_of(q.shape[2])
        if isinstance(self.source, FixedPattern):
            selection = Selection(self._layout(partition.seq_len, q.shape[1], q.device))
        else:
            check_shards(q, k, partition, self.communicator)  # before ranks wait for each other's choices
            selection = select_shard(self.source, q, k, partition, self.communicator, segment_ids)
        queries_per_kv = max(1, q.shape[1] // max(1, k.shape[1]))
        return plan_for(selection.layout, partition, queries_per_kv=queries_per_kv), selection

    def _layout(self, seq_len: int, num_heads: int, device: torch.device) -> BlockLayout:
        return self.source.layout(seq_len, seq_len, num_heads, device)

    def _partition_of(self, tokens: int) -> Partition:
        """The partition that a call goes by."""
        if self.communicator.world_size == 1:
            return self._settled(tokens)
        shared = partitions_of(self.communicator)
        if self.partition is not None:
            return shared.confirm(self.partition)
        if shared.latest is None:
            raise ValueError(
                f"a rank of {self.communicator.world_size} cannot know the whole sequence from its {tokens} tokens: "
                "call shard(x), prepare(seq_len) or bind(communicator, partition) first"
            )
        return self._settled(shared.latest.seq_len)

    def _settled(self, seq_len: int, num_heads: int = 1) -> Partition:
        """The group's partition of a length; where it has none yet, from now on the one that this layer deals."""
        shared = partitions_of(self.communicator)
        partition = shared.find(seq_len)
        if partition is None:
            layouts = [self._layout(seq_len, num_heads, torch.device("cpu"))]
            return shared.settle(_deal(layouts, self.communicator.world_size, self.config), _dealing(self.config))
        problem = None
        if self._has_config and (dealing := shared.dealing(seq_len)) not in (None, asked := _dealing(self.config)):
            problem = f"this layer's config asks for {asked}, they are dealt by {dealing}"
        try:
            partition.owner_of(self._block_size)
        except ValueError as error:
            problem = f"this layer has blocks of {self._block_size} tokens: {error}"
        if problem is not None:
            raise ValueError(f"{seq_len} tokens are dealt to these ranks already; {problem}; {HELP}")
        return partition

    @property
    def _block_size(self) -> int:
        return self.source.rules.block_size if isinstance(self.source, BlockSelector) else self.source.block_size

    def _shared_seed(self) -> int:
        """Rank 0's draw from torch's default CPU generator."""
        drawn = torch.randint(2**31 - 1, (1,)).to(self.communicator.device)
        return int(self.communicator.all_gather("seed", drawn)[0])

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is unbound: a group belongs to its process."""
        return self.__dict__ | {"communicator": None, "partition": None, "_states": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.communicator, self._states = Communicator(), WeakKeyDictionary()

    def extra_repr(self) -> str:
        scale = "" if self.scale is None else f", scale={self.scale:g}"
        ranks = f"world_size={self.communicator.world_size}, partition={self.config.partition!r}"
        return f"{self.source}, dropout={self.dropout:g}{scale}, backend={self.backend!r}, {ranks}"


def share_partition(
    model: nn.Module,
    communicator: Communicator,
    seq_len: int,
    num_heads: int = 1,
    config: DistributedConfig | None = None,
) -> Partition:
    """Binds every ``BlockSparseDistributed`` of a model to one group and one partition, made from all their layouts, so
    that activations stay where they are between layers. ``config`` says how, for all of them; None: as they say.

    Call it before anything of this length is sharded. Models that do not exchange activations may deal one length each
    in its own way: on a group each, or one after the other (``raybsa.ring.shared_partitions.forget_partitions``).

    Raises:
        ValueError: the model holds none; its layers' configs differ and none is given; or the group has another
            partition of this length, from an earlier shard or another model.
    """
    layers = [module for module in model.modules() if isinstance(module, BlockSparseDistributed)]
    if not layers:
        raise ValueError(f"the model must hold a BlockSparseDistributed, got {type(model).__name__} with none")
    config = config or _config_of(layers)
    layouts = [layer._layout(seq_len, num_heads, torch.device("cpu")) for layer in layers]
    partition = _deal(layouts, communicator.world_size, config)
    partition = partitions_of(communicator).settle(partition, _dealing(config))
    for layer in layers:
        layer.config, layer._has_config, layer._codec = config, True, build(config.gradient_codec)
        layer.bind(communicator, partition)
    return partition


def _config_of(layers: Sequence[BlockSparseDistributed]) -> DistributedConfig:
    """The one that those layers ask for which ask at all."""
    asked = [layer.config for layer in layers if layer._has_config]
    other = next((config for config in asked if config != asked[0]), None)
    if other is not None:
        raise ValueError(f"layers that share a partition ask for {asked[0]} and {other}: give share_partition a config")
    return asked[0] if asked else DistributedConfig()


def _dealing(config: DistributedConfig) -> Dealing:
    return Dealing(config.partition, config.equal_counts)


def _deal(layouts: Sequence[BlockLayout], world_size: int, config: DistributedConfig) -> Partition:
    return partition_for(layouts, world_size, strategy=config.partition, equal_counts=config.equal_counts)
