"""The same training, killed at the same place, under our coordinator and under Ray Train with its FailureConfig."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raybsa.cluster.faults import Fault, FaultKind, FaultPlace, mark_file
from raybsa.cluster.member import MemberSettings
from raybsa.comm import Communicator
from raybsa.experiments.drill_plan import question
from raybsa.experiments.drill_ring import Ring
from raybsa.scratch import scratch
from raybsa.spec import TrialSpec
from raybsa.tasks.sharded import ShardedTraining

STEPS, KILLED_AT, VICTIM = 30, 20, 1  # right after a checkpoint, so that Ray Train has nothing to make again
CHECKPOINT_EVERY = 10
RIVAL = "Ray Train"


@dataclass(frozen=True)
class Killed:
    """What one kill led to.

    Args:
        system: who trained.
        seconds: from the kill to when the step that it interrupted had been applied on all ranks.
        digest: of the final weights and moments.
    """

    system: str
    seconds: float
    digest: str


def rounds(world_size: int, count: int, text: str | None = None) -> Iterator[tuple[Killed, Killed, Killed]]:
    """Ours with a warm spare, ours without, and Ray Train, ``count`` times in turn; needs a connected Ray cluster.

    Raises:
        RuntimeError: a training ended without its kill, or did not end.
    """
    for _ in range(count):
        yield (
            under_coordinator(world_size, 1, text),
            under_coordinator(world_size, 0, text),
            under_ray_train(world_size, text),
        )


def under_coordinator(world_size: int, spares: int, text: str | None = None) -> Killed:
    fault = Fault(FaultKind.SIGKILL, FaultPlace.BEFORE_FORWARD, VICTIM, KILLED_AT)
    with scratch("rival") as folder:
        settings = MemberSettings(checkpoints=f"{folder}/checkpoints", checkpoint_every=CHECKPOINT_EVERY, marks=folder)
        ring = Ring(world_size, spares, text=text)
        with ring.coordinator(STEPS, settings, [(fault,)]) as coordinator:
            result = coordinator.run(evaluate=False, stretch=CHECKPOINT_EVERY)
        struck = _time_in(mark_file(folder, fault))
    name = "coordinator, warm spare" if spares else "coordinator, no spare"
    return Killed(name, result.applied_at[KILLED_AT] - struck, result.digest)


def under_ray_train(world_size: int, text: str | None = None) -> Killed:
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # read when ray.train is imported first
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    with scratch("rival") as folder:
        trainer = TorchTrainer(
            _loop,
            train_loop_config={"spec": question(STEPS, text).to_dict(), "folder": folder},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=world_size, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(storage_path=f"{folder}/storage", failure_config=FailureConfig(max_failures=1)),
        )
        trainer.fit()
        applied = [json.loads(line) for line in Path(folder, "applied").read_text().splitlines()]
        again = next(at for step, at in applied if step == KILLED_AT)
        digest = Path(folder, "digest").read_text()
        return Killed(RIVAL, again - _time_in(Path(folder, "killed")), digest)


def _time_in(file: Path) -> float:
    if not file.exists():
        raise RuntimeError(f"the training was to be killed at step {KILLED_AT}, it was not")
    return float(file.read_text())


def _loop(config: dict[str, Any]) -> None:
    """What each of Ray Train's workers runs, with a checkpoint of rank 0 now and then."""
    from ray import train

    folder, rank = Path(config["folder"]), dist.get_rank()
    torch.set_num_threads(1)
    communicators = [Communicator(dist.group.WORLD), Communicator(dist.new_group(backend="gloo"))]
    training = ShardedTraining(TrialSpec.from_dict(config["spec"]), torch.device("cpu"))
    training.bind(*communicators)
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as saved:
            training.step, tensors = torch.load(Path(saved, "state.pt"))
        for own, was in zip(training.state(), tensors, strict=True):
            own.copy_(was)
    while training.step < training.spec.train_steps:
        if (training.step, rank) == (KILLED_AT, VICTIM) and not Path(folder, "killed").exists():
            Path(folder, "killed").write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        training.prepare()
        training.apply()
        if rank == 0:
            with Path(folder, "applied").open("a") as file:
                print(json.dumps((training.step - 1, time.time())), file=file)
        if training.step % CHECKPOINT_EVERY == 0:
            _report(training, rank)
    if rank == 0:
        Path(folder, "digest").write_text(training.digest())
    for communicator in communicators:
        communicator.close()


def _report(training: ShardedTraining, rank: int) -> None:
    from ray import train

    if rank:
        train.report({"step": training.step})
        return
    with scratch("rival") as folder:
        torch.save((training.step, training.state()), Path(folder, "state.pt"))
        train.report({"step": training.step}, checkpoint=train.Checkpoint.from_directory(folder))
