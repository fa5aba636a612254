"""ShardedTrial: one rank's part of a search's trial when its sequence is split, and what is known of it beforehand.

What a Worker does with a whole sequence, step by step: the attention of all layers is timed at ``seq_len`` as a ring's
is (``ring.py``), then the model is trained and judged by ``ShardedTraining``. Every rank makes the same calls in the
same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from raybsa.comm import Communicator
from raybsa.gradients.wire import KIND
from raybsa.ring.partition import imbalance, partition_for
from raybsa.ring.plan import RingPlan, plan_for
from raybsa.ring.shared_partitions import forget_partitions
from raybsa.spec import UNTRAINED, TrialSpec
from raybsa.tasks.attention import layer_layout
from raybsa.tasks.goals import QUALITIES
from raybsa.tasks.ring import time_and_count
from raybsa.tasks.ring_contender import Contender, RankReport, calls_of, report_of
from raybsa.tasks.sharded import ShardedTraining
from raybsa.tasks.speed import AttentionStack
from raybsa.tasks.training import Quality, curves_of
from raybsa.variants.distributed import DistributedConfig, share_partition
from raybsa.variants.source import adaptive_options


@dataclass(frozen=True)
class RankQuality:
    """What one rank knows of a training: the quality, equal on all ranks, and the bytes of the weights' gradients that
    it sends in a step."""

    quality: Quality
    step_bytes: int


class ShardedTrial:
    """Args:
    spec: a task of ``OVER_RANKS`` with as many ``ranks`` as the communicator has.
    communicator: of all ranks.

    Raises:
        ValueError, TypeError: the spec asks for what does not exist or fit; every rank raises.
    """

    def __init__(self, spec: TrialSpec, communicator: Communicator) -> None:
        if spec.ranks.world_size != communicator.world_size:
            raise ValueError(f"the question is one of {spec.ranks.world_size} ranks, got {communicator.world_size}")
        self._spec, self._communicator = spec, communicator
        forget_partitions(communicator)  # an earlier trial's
        self._config = DistributedConfig(**spec.ranks.config)
        self._training: ShardedTraining | None = None
        if spec.task not in UNTRAINED:
            codec = spec.ranks.codec
            self._training = ShardedTraining(spec.alone, communicator.device, self._config, codec=codec)
            self._training.bind(communicator)
        self._seconds, self._step_bytes = 0.0, 0
        self._qualities: list[tuple[int, float]] = []
        self._calls = self._warm_calls()

    def measure(self, repeats: int, budget_s: float) -> RankReport:
        """This rank's times, bytes and memory of the attention of all layers, once; ``repeats`` and ``budget_s`` are
        those of ``measure_rank``."""
        report, calls = report_of(self._communicator), self._calls
        self._calls = {}  # the training needs the memory
        time_and_count(report, calls, self._communicator, repeats=repeats, budget_s=budget_s)
        return report

    def train(self, until: int) -> None:
        """Makes steps until so many are done."""
        training, ledger = self._training, self._communicator.ledger
        assert training is not None
        begin, before, steps = time.perf_counter(), ledger.sent[KIND], until - training.step
        while training.step < until:
            training.prepare()
            training.apply()
        self._seconds += time.perf_counter() - begin
        self._step_bytes = (ledger.sent[KIND] - before) // steps

    def judge(self) -> RankQuality:
        """The quality as it is."""
        training, (name, goal) = self._training, QUALITIES[self._spec.task]
        assert training is not None
        value = training.evaluate()
        self._qualities.append((training.step, value))
        losses = [torch.tensor(loss) for _, loss in training.losses]
        curves = curves_of(losses, self._spec.train_steps, name, self._qualities)
        return RankQuality(Quality(name, goal, value, self._seconds, curves, training.step), self._step_bytes)

    def _warm_calls(self) -> dict[str, Callable[[], Any]]:
        spec, communicator = self._spec, self._communicator
        stack = AttentionStack(spec).to(communicator.device, getattr(torch, spec.dtype))
        partition = share_partition(stack, communicator, spec.seq_len, spec.num_heads, self._config)
        calls = calls_of(Contender(partition.tokens(communicator.rank), stack), spec, communicator)
        for call in calls.values():
            call()
        return calls


def plans_of(spec: TrialSpec, length: int | None = None) -> list[RingPlan]:
    """The plan of every layer at ``length`` tokens (``seq_len``), as the ranks make them; of a learned pattern, whose
    blocks are known when it runs, that of the nearest blocks."""
    layouts = [layer_layout(spec, index, length) for index in range(len(spec.attention))]
    every = [layouts[index % len(layouts)] for index in range(spec.num_layers)]
    partition = partition_for(every, spec.ranks.world_size, strategy=spec.ranks.partition)
    queries_per_kv = spec.num_heads // (spec.num_kv_heads or spec.num_heads)
    return [plan_for(layout, partition, queries_per_kv=queries_per_kv) for layout in every]


def facts_of(spec: TrialSpec, plans: Sequence[RingPlan]) -> dict[str, Any]:
    """Columns of a measurement that follow from the layers' plans: density, balance, and the bytes that had to travel
    where no pattern is learned."""
    shares = [(p, p.layout.q_block_size * p.layout.kv_block_size / p.layout.num_groups) for p in plans]
    work = torch.stack([plan.active_blocks * share for plan, share in shares]).sum(0)
    sizes = (spec.num_kv_heads or spec.num_heads, spec.head_dim, getattr(torch, spec.dtype).itemsize, spec.batch)
    learned = any(adaptive_options(attention.pattern) is not None for attention in spec.attention)
    return {
        "density": fmean(plan.layout.density for plan in plans),
        "imbalance": imbalance(work),
        "needed_forward_bytes": None if learned else sum(plan.bytes_needed(*sizes) for plan in plans),
    }
