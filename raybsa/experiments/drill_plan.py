"""Which faults a drill injects, where and when: plans from (kind, place) pairs or drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from raybsa.cluster.faults import Fault, FaultKind, FaultPlace
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec

Pair = tuple[FaultKind, FaultPlace]
Plan = list[tuple[Fault, ...]]

EVERY = 4  # steps between faults, and between checkpoints
KINDS = (
    FaultKind.EXIT,
    FaultKind.RAY_KILL,
    FaultKind.SIGKILL,
    FaultKind.SIGSTOP,
    FaultKind.OUT_OF_MEMORY,
    FaultKind.TWO_RANKS,
    FaultKind.SPARE,
    FaultKind.DRIVER,
)
LEFT_OUT = {FaultKind.LOST_NODE: "needs a cluster of several nodes: tests/platform/test_lost_host.py"}
DEFAULT: tuple[Pair, ...] = (
    (FaultKind.EXIT, FaultPlace.FORWARD_HOP),
    (FaultKind.SIGKILL, FaultPlace.BACKWARD_HOP),
    (FaultKind.SIGSTOP, FaultPlace.EXCHANGE),
    (FaultKind.RAY_KILL, FaultPlace.BEFORE_COMMIT),
    (FaultKind.OUT_OF_MEMORY, FaultPlace.BEFORE_FORWARD),
    (FaultKind.EXIT, FaultPlace.CHECKPOINT),
    (FaultKind.SIGKILL, FaultPlace.RECOVERY),
)


def question(steps: int, text: str | None) -> TrialSpec:
    """The small training that a drill breaks."""
    attention = AttentionSpec("distributed", PatternSpec("bigbird"), 0.5, 16)
    params = {"text": text, "train_batch": 2, "eval_windows": 2}
    return TrialSpec(
        "byte_lm", (attention,), train_len=256, train_steps=steps, num_heads=2, head_dim=16, task_params=params
    )


def kinds_on(device: str) -> tuple[FaultKind, ...]:
    """The kinds that a drill can inject where the ranks compute."""
    return (*KINDS, FaultKind.CUDA_ERROR) if device == "cuda" else KINDS


def left_out_on(device: str) -> dict[FaultKind, str]:
    """The kinds that it cannot, and why."""
    return LEFT_OUT if device == "cuda" else {FaultKind.CUDA_ERROR: "needs a GPU: --gpus-per-worker"} | LEFT_OUT


def groups(pairs: Sequence[Pair], size: int) -> list[Sequence[Pair]]:
    """Several faults share a run, since making actors is what takes time; each that kills the driver has its own."""
    inside = [pair for pair in pairs if pair[0] is not FaultKind.DRIVER]
    alone = [[pair] for pair in pairs if pair[0] is FaultKind.DRIVER]
    return [*(inside[i : i + size] for i in range(0, len(inside), size)), *alone]


def steps_for(pairs: Sequence[Pair]) -> int:
    return EVERY * (len(pairs) + 3)


def plan_of(pairs: Sequence[Pair], world_size: int, draw: random.Random) -> Plan:
    """One fault a generation, at a rank that is drawn; the first after a checkpoint. A fault while recovering needs one
    to recover from."""
    plan: Plan = []
    for number, (kind, place) in enumerate(pairs, 2):
        rank = draw.randrange(world_size)
        if place is FaultPlace.RECOVERY:
            first = Fault(FaultKind.EXIT, FaultPlace.EXCHANGE, (rank + 1) % world_size, EVERY * number + 1)
            plan.append((first,))
        plan.append((_fault(kind, place, rank, number),))
    return plan


def soak_plan(count: int, world_size: int, seed: int) -> tuple[Plan, int]:
    """``count`` faults of every kind but the driver's death at places that are drawn, one a generation and a stretch of
    ``EVERY`` steps, at most two of them running while recovering; and the steps of the run."""
    draw = random.Random(seed)
    plan: Plan = []
    for number in range(1, count + 1):
        kind, place = draw.choice([kind for kind in KINDS if kind is not FaultKind.DRIVER]), draw.choice([*FaultPlace])
        recent = [faults[0].place for faults in plan[-2:]]
        if place is FaultPlace.RECOVERY and (not recent or recent == [FaultPlace.RECOVERY] * 2):
            place = FaultPlace.EXCHANGE
        plan.append((_fault(kind, place, draw.randrange(world_size), number),))
    return plan, EVERY * (count + 2)


def _fault(kind: FaultKind, place: FaultPlace, rank: int, number: int) -> Fault:
    """The ``number``-th fault. Rank 0 writes checkpoints; that phase comes when ``step`` steps are applied. While
    recovering the step is any, and ``hop`` only tells this fault from others."""
    if place is FaultPlace.CHECKPOINT:
        return Fault(kind, place, 0, EVERY * number)
    if place is FaultPlace.RECOVERY:
        return Fault(kind, place, rank, -1, hop=number)
    return Fault(kind, place, rank, EVERY * number + 1)
