"""Crew: the actors of a training. It makes them, feels their pulse, keeps spares and ends them; it decides nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import ray
from ray.exceptions import RayError

from raybsa.cluster.faults import Fault
from raybsa.cluster.member import Member, MemberSettings, Status
from raybsa.cluster.resources import Say, Share, await_workers
from raybsa.cluster.versions import require, versions
from raybsa.spec import TrialSpec

TICK_S = 0.02


class MemberActor:
    """The actor: a member, its control methods in a thread group of their own."""

    def __init__(self, wanted: dict[str, str], spec: TrialSpec, device: str, settings: MemberSettings) -> None:
        require(wanted)
        self._member = Member(spec, device, settings)

    @ray.method(concurrency_group="control")
    def status(self) -> Status:
        return self._member.status()

    @ray.method(concurrency_group="control")
    def cancel(self, generation: int, reason: str) -> None:
        self._member.cancel(generation, reason)

    @ray.method(concurrency_group="control")
    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def call(self, method: str, *arguments: Any) -> Any:
        """Any other method of the member, one after the other."""
        return getattr(self._member, method)(*arguments)


@dataclass
class _Worker:
    """An actor, the sign that it is up, and what was last heard of it."""

    actor: Any
    made: Any
    pid: int | None = None  # None also where it runs on another machine
    ping: Any = None
    heard_at: float = field(default_factory=time.monotonic)
    asked_at: float = 0.0
    struck: bool = False


class Crew:
    """Workers by number.

    Args:
        spec, settings: what members are made with.
        share: what each owns.
        heartbeat_s: who does not answer for this long hangs.
        say: where messages go.
        strike: does to a worker what a fault asks for from outside.

    Attributes:
        spares: workers that are up and have no rank.
        arriving: workers that were asked for and are not up yet.
    """

    def __init__(
        self,
        spec: TrialSpec,
        settings: MemberSettings,
        share: Share,
        heartbeat_s: float,
        say: Say,
        strike: Callable[[int, Fault], None],
    ) -> None:
        self._made_with = (versions(), spec, share.device, settings)
        self._share, self._say, self._strike = share, say, strike
        self._heartbeat_s = heartbeat_s
        self._numbers = count()
        self._workers: dict[int, _Worker] = {}
        self.spares: list[int] = []
        self.arriving: list[int] = []

    # ---- coming and going ------------------------------------------------------------------------------------------

    def recruit(self, number: int, wait_s: float) -> list[int]:
        """That many workers, all up. Raises TooFewResources, or RayError where one cannot be made."""
        fresh = [self._make() for _ in range(number)]
        made = [self._workers[worker].made for worker in fresh]
        await_workers(made, self._share, wait_s, self._say)
        for worker in fresh:
            self._greet(worker)
        return fresh

    def stand_ins(self, number: int, wait_s: float) -> list[int]:
        """Up to that many workers: living spares first, then those that come up within ``wait_s`` seconds."""
        found: list[int] = []
        while self.spares and len(found) < number:
            spare = self.spares.pop(0)
            if self._answers(spare):
                found.append(spare)
            else:
                self.lose(spare)
        self.order(number - len(found))
        deadline = time.monotonic() + wait_s
        while len(found) < number and self.arriving and time.monotonic() < deadline:
            ray.wait([self._workers[worker].made for worker in self.arriving], num_returns=1, timeout=TICK_S)
            found += self.take_arrived(number - len(found))
        return found

    def order(self, number: int) -> None:
        """Asks for workers until ``number`` are on their way."""
        while len(self.arriving) < number:
            self.arriving.append(self._make())

    def take_arrived(self, most: int) -> list[int]:
        """Up to ``most`` of the workers that are up by now; they are on their way no more."""
        arrived = [worker for worker in tuple(self.arriving) if self._has_arrived(worker)][:most]
        self.arriving = [worker for worker in self.arriving if worker not in arrived]
        return arrived

    def has_arrived(self) -> bool:
        """Whether any worker that was asked for is up by now."""
        return any(self._has_arrived(worker) for worker in tuple(self.arriving))

    def lose(self, number: int) -> None:
        """Ends a worker that is dead, hangs or failed. Ray alone would take seconds to end a stopped process."""
        pid = self._end(number)
        if pid is not None and _is_member(pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends every worker."""
        for number in tuple(self._workers):
            self._end(number)
        self.spares, self.arriving = [], []

    def _end(self, number: int) -> int | None:
        """Lets Ray end the worker; returns its process."""
        worker = self._workers.pop(number, None)
        if worker is None or not ray.is_initialized():
            return None
        ray.kill(worker.actor)
        return worker.pid

    def kill(self, number: int) -> None:
        """Ends a worker behind everybody's back, as a drill does."""
        ray.kill(self._workers[number].actor)

    def node(self, number: int) -> str:
        """The id of the node on which a worker runs."""
        return ray.get(self._workers[number].actor.node.remote(), timeout=self._heartbeat_s)

    # ---- talking ---------------------------------------------------------------------------------------------------

    def call(self, number: int, method: str, *arguments: Any) -> Any:
        """A reference to what the member's method will return."""
        self._workers[number].heard_at = time.monotonic()
        return self._workers[number].actor.call.remote(method, *arguments)

    def cancel(self, numbers: Sequence[int], generation: int, reason: str) -> dict[int, Any]:
        """Tells workers to leave what they wait for; a reference for each."""
        return {number: self._workers[number].actor.cancel.remote(generation, reason) for number in numbers}

    def silent(self, numbers: Collection[int]) -> dict[int, str]:
        """Pings workers in turn; those that died or have been silent for too long, and why."""
        lost = {}
        for number in numbers:
            reason = self._feel_pulse(number, self._workers[number])
            if reason is not None:
                lost[number] = reason
        return lost

    def _feel_pulse(self, number: int, worker: _Worker) -> str | None:
        now = time.monotonic()
        if worker.ping is not None and ray.wait([worker.ping], timeout=0)[0]:
            try:
                status: Status = ray.get(worker.ping)
            except RayError as error:
                return cause_of(error)
            worker.ping, worker.heard_at = None, now
            if status.asks is not None and not worker.struck:
                worker.struck = True
                self._strike(number, status.asks)
        if worker.ping is None and now - worker.heard_at > self._heartbeat_s / 8:
            worker.ping, worker.asked_at = worker.actor.status.remote(), now  # who was not asked is not silent
        if worker.ping is None or now - worker.asked_at <= self._heartbeat_s * 7 / 8:
            return None
        return f"no sign of life for {self._heartbeat_s:g} s"

    def steps(self, numbers: Sequence[int], wait_s: float) -> dict[int, int]:
        """The steps that workers have applied, of those that answer within ``wait_s`` seconds."""
        asked = {self._workers[n].actor.status.remote(): n for n in numbers if n in self._workers}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=wait_s) if asked else ([], [])
        found = {}
        for reference in ready:
            with contextlib.suppress(RayError):
                found[asked[reference]] = ray.get(reference).step
        return found

    # ---- for ourselves ---------------------------------------------------------------------------------------------

    def _make(self) -> int:
        number = next(self._numbers)
        remote: Any = ray.remote(concurrency_groups={"control": 2})  # type: ignore[call-overload]
        options = {"num_cpus": self._share.num_cpus, "num_gpus": self._share.num_gpus}
        actor = remote(MemberActor).options(**options).remote(*self._made_with)
        self._workers[number] = _Worker(actor, actor.status.remote())
        return number

    def _greet(self, number: int) -> None:
        worker = self._workers[number]
        status: Status = ray.get(worker.made)
        worker.pid = status.pid if status.host == socket.gethostname() else None

    def _has_arrived(self, number: int) -> bool:
        """Whether a worker is up; one that could not be made is expected no more."""
        if not ray.wait([self._workers[number].made], timeout=0)[0]:
            return False
        try:
            self._greet(number)
        except RayError as error:
            self._say(f"a fresh worker could not be made: {cause_of(error)}")
            self.arriving.remove(number)
            self.lose(number)
            return False
        return True

    def _answers(self, number: int) -> bool:
        try:
            ray.get(self._workers[number].actor.status.remote(), timeout=self._heartbeat_s)
        except RayError:
            return False
        return True


def cause_of(error: RayError) -> str:
    """One line that says what happened to a worker."""
    cause = getattr(error, "cause", None)
    named = cause if isinstance(cause, BaseException) else error
    return f"{type(named).__name__}: {next(iter(str(named).strip().splitlines()), '')}"


def _is_member(pid: int) -> bool:
    """Whether the process of this machine is a member's still."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().startswith(b"ray::MemberActor")
    except OSError:
        return False
