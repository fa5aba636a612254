"""Member: one rank of a training that may lose ranks. A plain class; the TrainingCoordinator makes it a Ray actor."""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from raybsa.cluster.checkpoint import Checkpoint, CheckpointFolder, CheckpointNotWritten
from raybsa.cluster.faults import Fault, FaultInjector
from raybsa.cluster.membership import Seat
from raybsa.cluster.metrics import StepMetrics
from raybsa.cluster.trace import Trace
from raybsa.comm import Broken, Cancelled, Communicator, Phase, process_group
from raybsa.events import Events, show
from raybsa.gradients.overlap import Overlap
from raybsa.spec import TrialSpec, require_positive, stable_hash
from raybsa.tasks.sharded import BUCKET_BYTES, ShardedTraining, send_state
from raybsa.variants.distributed import DistributedConfig

ARRIVAL_SLEEP_S = 0.002
ON_CHECKPOINT_ERROR = ("continue", "stop")


@dataclass(frozen=True)
class MemberSettings:
    """What every member of a training is made with.

    Args:
        config: how ranks share the sequence.
        codec: how gradients travel, the spec of a codec of ``raybsa.gradients``.
        warmup_steps: steps at the start whose gradients travel uncompressed.
        bucket_bytes: gradients that travel in one message.
        overlap: send gradients while backward runs, on a second group (gloo); else after it.
        num_threads: CPU threads of PyTorch.
        checkpoints: a folder or URI; None writes none.
        checkpoint_every: steps between two checkpoints.
        on_checkpoint_error: ``"continue"`` to train on where one cannot be written, and try again when the next is due;
            ``"stop"`` to end the training.
        timeout_s: the longest that one wait for a peer may take; only the last resort, cancelling comes first.
        marks: a folder for the marks of injected faults.
        run: names the run that writes checkpoints; the TrainingCoordinator sets it.
        labels: ``run`` and ``trial``, as the rows name them, for logs and metrics.
        verbose: ranks print their events, one line each.
        trace: the step to trace; None traces none.

    Raises:
        ValueError: a count below 1, steps at the start below 0, no time to wait, or another word on checkpoints.
    """

    config: DistributedConfig = field(default_factory=DistributedConfig)
    codec: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    warmup_steps: int = 0
    bucket_bytes: int = BUCKET_BYTES
    overlap: bool = True
    num_threads: int = 1
    checkpoints: str | None = None
    checkpoint_every: int = 100
    on_checkpoint_error: str = "continue"
    timeout_s: float = 60.0
    marks: str | None = None
    run: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    verbose: bool = False
    trace: Trace | None = None

    def __post_init__(self) -> None:
        for name in ("bucket_bytes", "num_threads", "checkpoint_every"):
            require_positive(name, getattr(self, name))
        if self.on_checkpoint_error not in ON_CHECKPOINT_ERROR:
            raise ValueError(
                f"on_checkpoint_error must be one of {', '.join(ON_CHECKPOINT_ERROR)}, got {self.on_checkpoint_error!r}"
            )
        if self.warmup_steps < 0 or not self.timeout_s > 0:
            raise ValueError(
                f"warmup_steps must be at least 0 and timeout_s positive, got {self.warmup_steps} and {self.timeout_s}"
            )


@dataclass(frozen=True)
class Status:
    """Where a member is: its machine and process, the generation it has joined, the steps it has applied, and a fault
    that waits to be done from outside."""

    host: str
    pid: int
    generation: int
    step: int
    asks: Fault | None


@dataclass(frozen=True)
class Progress:
    """What a stretch of training led to: the step reached, the loss of each step (nats a token, of all ranks), and
    what this rank sent in its generation, by kind, in bytes, the norm of the gradients that it has not sent yet, when
    it applied each step (of ``time.time``), and how much of its gradients' travel lay within backward since it last
    told. ``troubles``: what could not be written since, and that it can be again."""

    step: int
    losses: tuple[tuple[int, float], ...]
    sent: dict[str, int]
    residual_norm: float
    applied_at: tuple[tuple[int, float], ...] = ()
    overlap: Overlap = field(default_factory=Overlap)
    troubles: tuple[str, ...] = ()


def checkpoint_question(spec: TrialSpec, settings: MemberSettings) -> str:
    """What must agree for the same weights, up to rounding: not the number of ranks."""
    return stable_hash([spec.to_dict(), dict(settings.codec), settings.warmup_steps])


class Member:
    """One rank. ``status`` and ``cancel`` may be called from another thread while the others run.

    Args:
        spec: what is trained.
        device: ``"cpu"`` or ``"cuda"``.
        settings: as every member's.
    """

    def __init__(self, spec: TrialSpec, device: str, settings: MemberSettings) -> None:
        torch.set_num_threads(settings.num_threads)
        if settings.verbose:
            show()
        self._events = Events(__name__, **settings.labels)
        self._settings = settings
        self._device = torch.device(device)
        self._training = ShardedTraining(
            spec,
            self._device,
            settings.config,
            codec=settings.codec,
            warmup_steps=settings.warmup_steps,
            bucket_bytes=settings.bucket_bytes,
        )
        self._folder = None if settings.checkpoints is None else CheckpointFolder(settings.checkpoints)
        self._generation = 0
        self._cancelled: dict[int, str] = {}
        self._communicator = Communicator(device=self._device)
        self._gradients: Communicator | None = None
        self._left: list[Communicator] = []
        self._metrics = self._step_metrics()
        self._asks: Fault | None = None
        self._applied_at: list[tuple[int, float]] = []
        self._troubles: list[str] = []
        self._saves = True  # whether the last checkpoint could be written

    # ---- from any thread -------------------------------------------------------------------------------------------

    def status(self) -> Status:
        return Status(socket.gethostname(), os.getpid(), self._generation, self._training.step, self._asks)

    def cancel(self, generation: int, reason: str) -> None:
        """Frees this rank from whatever it waits for in ``generation``."""
        self._cancelled[generation] = reason
        self._events.tell("cancelled", of=generation, reason=reason)
        if self._generation == generation:
            for communicator in self._communicators:
                communicator.cancel(reason)

    # ---- one after the other ---------------------------------------------------------------------------------------

    def join(self, seat: Seat, faults: Sequence[Fault] = ()) -> Progress:
        """Takes a place in a new generation; returns where this rank stands, and the losses that it has not told yet.

        Raises:
            Broken: the generation was cancelled, or a peer was lost on the way.
        """
        self._leave()
        self._generation = seat.generation
        injector = FaultInjector(faults, seat.rank, lambda: self._training.step, self._settings.marks, self._ask)
        injector.begin(Phase.RECOVERY, "", 0)
        group, second = self._meet(seat) if seat.world_size > 1 else (None, None)
        options: dict[str, Any] = {"device": self._device, "timeout_s": self._settings.timeout_s}
        self._communicator = Communicator(group, observer=injector if faults else None, **options)
        self._gradients = None if second is None else Communicator(second, **options)
        if seat.generation in self._cancelled:
            for communicator in self._communicators:
                communicator.cancel(self._cancelled[seat.generation])
        self._training.bind(self._communicator, self._gradients)
        self._metrics = self._step_metrics()
        self._events = self._events.bind(generation=seat.generation, rank=seat.rank)
        self._events.tell("joined", world_size=seat.world_size, step=self._training.step)
        return self._progress()

    def level(self, source: int, needy: Sequence[int]) -> int:
        """Copies the state of rank ``source`` to the ``needy``; returns the steps applied. All ranks call it."""
        send_state(self._training, source, needy)
        return self._training.step

    def restore(self, any_run: bool) -> int:
        """Takes the newest whole checkpoint of this question, if there is one; returns the steps applied.

        Args:
            any_run: also one that an earlier run left.
        """
        run = None if any_run else self._settings.run
        found = None if self._folder is None else self._folder.latest(self._question, run=run)
        if found is not None:
            for tensor, saved in zip(self._training.state(), found.state, strict=True):
                tensor.copy_(saved)
            self._training.step = found.step
        return self._training.step

    def train(self, until: int) -> Progress:
        """Makes steps until ``until`` of them are applied.

        Raises:
            Broken: the ring broke; what was applied stays, the running step is forgotten.
            CheckpointNotWritten: a checkpoint could not be written, and the training is to stop then.
        """
        training = self._training
        while training.step < until:
            self._check_cancelled(self._generation)
            self._step()
            if self._is_due(training.step):
                with self._communicator.phase(Phase.CHECKPOINT):
                    self._save_if_it_can()
        return self._progress()

    def checkpoint(self) -> int:
        """Saves what was reached, which may be nothing; returns its step. Raises CheckpointNotWritten."""
        if self._folder is not None and self._training.step:
            self._save()
        return self._training.step

    def evaluate(self) -> float:
        """Bits per held-out byte, over all ranks."""
        return self._training.evaluate()

    def digest(self) -> str:
        """A hash of every tensor that lasts: equal where training led to the same bits."""
        return self._training.digest()

    def weights(self) -> list[torch.Tensor]:
        """The model's parameters, on the CPU; small models only: they go through Ray's object store."""
        return [p.detach().cpu() for p in self._training.model.parameters()]

    # ---- for ourselves ---------------------------------------------------------------------------------------------

    def _step(self) -> None:
        training, trace, begin = self._training, self._settings.trace, time.perf_counter()
        traced = trace.of(training.step, self._communicator.rank, self._troubles.append) if trace else nullcontext()
        with traced:
            training.prepare()
            training.apply()
        seconds = time.perf_counter() - begin
        step, loss = training.losses[-1]
        self._applied_at.append((step, time.time()))
        self._metrics.step(seconds, self._sent())
        self._events.tell("step", step=step, loss=loss, seconds=seconds)

    def _step_metrics(self) -> StepMetrics:
        nbytes = sum(p.nbytes for p in self._training.model.parameters() if p.requires_grad)
        place = self._communicator
        return StepMetrics(self._settings.labels.get("run", ""), place.rank, place.world_size, nbytes)

    def _sent(self) -> Counter[str]:
        return sum((communicator.ledger.sent for communicator in self._communicators), Counter[str]())

    def _ask(self, fault: Fault) -> None:
        self._asks = fault

    def _is_due(self, step: int) -> bool:
        return self._folder is not None and self._communicator.rank == 0 and step % self._settings.checkpoint_every == 0

    def _save(self) -> None:
        assert self._folder is not None
        training = self._training
        self._folder.save(Checkpoint(training.step, self._question, training.state(), self._settings.run))

    def _save_if_it_can(self) -> None:
        try:
            self._save()
        except CheckpointNotWritten as error:
            if self._settings.on_checkpoint_error == "stop":
                raise
            if self._saves:
                self._troubles.append(f"{error}; the training goes on and tries again when the next one is due")
            self._saves = False
            self._events.tell("checkpoint", step=self._training.step, error=str(error))
            return
        if not self._saves:
            self._troubles.append(f"checkpoints are written again, that of step {self._training.step} is")
        self._saves = True
        self._events.tell("checkpoint", step=self._training.step)

    @property
    def _question(self) -> str:
        """What must agree for the same weights, up to rounding: not the number of ranks."""
        return checkpoint_question(self._training.spec, self._settings)

    def _progress(self) -> Progress:
        training = self._training
        losses, training.losses = tuple(training.losses), []
        applied_at, self._applied_at = tuple(self._applied_at), []
        overlap, training.overlap = training.overlap, Overlap()
        troubles, self._troubles = tuple(self._troubles), []
        sent, residual_norm = dict(self._sent()), training.residual_norm()
        return Progress(training.step, losses, sent, residual_norm, applied_at, overlap, troubles)

    @property
    def _communicators(self) -> list[Communicator]:
        """The ring's, and the gradients' where they have one of their own."""
        return [each for each in (self._communicator, self._gradients) if each is not None]

    def _leave(self) -> None:
        """Lets go of the old groups; one with transfers under way is kept till they fail: destroying it waits."""
        for communicator in self._communicators:
            communicator.close()
        self._left = [old for old in (*self._left, *self._communicators) if not old.is_idle]

    def _meet(self, seat: Seat) -> tuple[Any, Any]:
        """The groups of this generation, the ring's and the gradients'. Ranks announce themselves first, so that one
        that is lost on the way leaves the others in a wait that can be cancelled."""
        timeout = datetime.timedelta(seconds=self._settings.timeout_s)
        store = dist.PrefixStore(
            f"generation-{seat.generation}/", dist.TCPStore(seat.store_host, seat.store_port, None, False, timeout)
        )
        store.set(f"here-{seat.rank}", "1")
        names = [f"here-{rank}" for rank in range(seat.world_size)]
        begin = time.monotonic()
        while not store.check(names):
            self._check_cancelled(seat.generation)
            if time.monotonic() - begin > self._settings.timeout_s:
                raise Broken(f"generation {seat.generation} did not meet within {self._settings.timeout_s:g} s")
            time.sleep(ARRIVAL_SLEEP_S)
        return self._connect(seat, store)

    def _connect(self, seat: Seat, store: Any) -> tuple[Any, Any]:
        """Gloo waits up to its timeout for a peer that was lost after it had announced itself; a thread waits with it,
        and is left to itself where the generation is cancelled."""
        place = (seat.rank, seat.world_size, self._settings.timeout_s)
        if self._device.type != "cpu":
            return process_group(self._device, store, *place), None
        connecting: Future[tuple[Any, Any]] = Future()

        def connect() -> None:
            try:
                ring = process_group(self._device, store, *place)
                apart = dist.PrefixStore("gradients/", store)
                second = process_group(self._device, apart, *place) if self._settings.overlap else None
                connecting.set_result((ring, second))
            except Exception as error:
                connecting.set_exception(Broken(f"generation {seat.generation} could not connect: {error}"))

        threading.Thread(target=connect, name="raybsa-connect", daemon=True).start()
        while True:
            try:
                return connecting.result(ARRIVAL_SLEEP_S)
            except TimeoutError:
                self._check_cancelled(seat.generation)

    def _check_cancelled(self, generation: int) -> None:
        if generation in self._cancelled:
            raise Cancelled(f"generation {generation}: {self._cancelled[generation]}")
