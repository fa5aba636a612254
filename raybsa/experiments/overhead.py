"""What Ray and the coordinator cost: a training under them and the same loop under torchrun, in turn."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from raybsa.cluster.resources import Share
from raybsa.cluster.training import TrainingCoordinator
from raybsa.scratch import scratch
from raybsa.spec import TrialSpec

WARMUP = 3  # steps at the start that are not counted
LIMIT_S = 600.0


@dataclass(frozen=True)
class Run:
    """One training: its median step in milliseconds, and a digest of the weights that it led to."""

    step_ms: float
    digest: str


@dataclass(frozen=True)
class Round:
    """The same training under the coordinator and under torchrun."""

    coordinated: Run
    plain: Run

    @property
    def overhead(self) -> float:
        """By how much a step takes longer under the coordinator, relative."""
        return self.coordinated.step_ms / self.plain.step_ms - 1.0

    @property
    def equal(self) -> bool:
        """Whether both led to the same weights, to the bit."""
        return self.coordinated.digest == self.plain.digest


def rounds(spec: TrialSpec, world_size: int, count: int) -> Iterator[Round]:
    """``count`` rounds on this machine, the one first that came second in the round before; needs a connected Ray
    cluster. Both compute with one thread a rank.

    Raises:
        TooFewResources: the cluster cannot hold the ranks.
        RuntimeError: torchrun failed; the message ends with its last words.
    """
    for number in range(count):
        if number % 2:
            plain = run_plain(spec, world_size)
            yield Round(run_coordinated(spec, world_size), plain)
        else:
            coordinated = run_coordinated(spec, world_size)
            yield Round(coordinated, run_plain(spec, world_size))


def run_coordinated(spec: TrialSpec, world_size: int) -> Run:
    with TrainingCoordinator(spec, Share(1), world_size=world_size, say=lambda text: None) as coordinator:
        result = coordinator.run(evaluate=False)
    return Run(step_ms([*result.applied_at.values()]), result.digest)


def run_plain(spec: TrialSpec, world_size: int) -> Run:
    with scratch("overhead") as folder:
        question, answer = Path(folder, "question.json"), Path(folder, "answer.json")
        question.write_text(json.dumps(spec.to_dict()))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        command = [*torchrun, "-m", "raybsa.tasks.plain", str(question), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"torchrun ended with status {done.returncode}: {done.stderr[-2000:]}")
        found = json.loads(answer.read_text())
    return Run(step_ms(found["applied_at"]), found["digest"])


def step_ms(applied_at: Sequence[float]) -> float:
    """The median time from one step to the next, after the first few.

    Raises:
        ValueError: fewer than two steps beyond those.
    """
    if len(applied_at) < WARMUP + 2:
        raise ValueError(f"at least {WARMUP + 2} steps are wanted to time one, got {len(applied_at)}")
    return 1e3 * statistics.median(after - before for before, after in pairwise(applied_at[WARMUP:]))
