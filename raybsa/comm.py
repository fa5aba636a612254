"""Communicator: the one place that sends or receives tensors between ranks. It counts, it waits so that it can be
cancelled, and it tells an observer where it is.

On gloo a thread of the communicator waits for the transfers (``is_completed`` never turns true for gloo's sends and
receives, and a wait with a timeout closes the connection), so a cancelled rank leaves a broken exchange within a
millisecond even when its peer hangs. On NCCL waiting orders the current stream behind the transfer and does not block
the host; ``settle`` polls once, where a step ends.
"""

from __future__ import annotations

import datetime
import hashlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

SETTLE_SLEEP_S = 200e-6
LET_GO_S = 1e-3  # see _Waiter
AGREEMENT = 1  # the tag of what ranks ask each other: one that is elsewhere must not take it for its data
AGREED_KEPT = 1024  # questions that are not asked again on NCCL; a seed or a layout of its own in each step asks anew


class Phase(StrEnum):
    """What a rank is doing; an observer hears of each begin and end. The last ones belong to training."""

    FORWARD = "forward"
    BACKWARD = "backward"
    TRANSFER = "transfer"
    WAIT = "wait"
    STEP = "step"
    EXCHANGE = "exchange"
    COMMIT = "commit"
    CHECKPOINT = "checkpoint"
    RECOVERY = "recovery"


class Observer(Protocol):
    """Hears of every phase. What it raises in ``begin`` is raised at that place (tests and drills inject faults so)."""

    def begin(self, phase: Phase, kind: str, hop: int) -> None: ...

    def end(self, phase: Phase, kind: str, hop: int) -> None: ...


class Broken(RuntimeError):
    """This rank is well, but the group it talks to is not."""


class Cancelled(Broken):
    """A wait was given up because ``cancel`` was called."""


class PeerLost(Broken):
    """A transfer failed, or took longer than the limit: a peer is gone or hangs."""


@dataclass
class Ledger:
    """What went over the wire, by kind: bytes sent and received by this rank, and seconds its host spent waiting."""

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    waited_s: dict[str, float] = field(default_factory=dict)

    def clear(self) -> None:
        self.sent.clear()
        self.received.clear()
        self.waited_s.clear()


Shared = TypeVar("Shared")
_SHARED: WeakKeyDictionary[dist.ProcessGroup, dict[type, Any]] = WeakKeyDictionary()  # see Communicator.shared


class Communicator:
    """Talks to the other ranks of one group, on one device. One thread uses it at a time; any may ``cancel``.

    Args:
        group: a process group of ``torch.distributed``; None means alone (world size 1).
        device: where the tensors live that are sent.
        timeout_s: a wait of the host that takes longer raises PeerLost.
        observer: hears of each phase.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str = "cpu",
        timeout_s: float = 60.0,
        observer: Observer | None = None,
    ) -> None:
        self.group = group
        self.rank = 0 if group is None else group.rank()
        self.world_size = 1 if group is None else group.size()
        self.device = torch.device(device)
        self.timeout_s = timeout_s
        self.observer = observer
        self.ledger = Ledger()
        self._agreed: dict[str, None] = {}  # in the order in which it was agreed
        self._shared: dict[type, Any] = {} if group is None else _SHARED.setdefault(group, {})
        self._cancelled = threading.Event()
        self._reason = ""
        self._open: set[Pending] = set()
        self._waiter = _Waiter() if group is not None and self.blocks_host else None

    @property
    def blocks_host(self) -> bool:
        """Whether waiting blocks the host (gloo); else it orders streams (NCCL)."""
        return self.device.type != "cuda"

    def shared(self, kind: type[Shared]) -> Shared:
        """The one ``kind()`` of this group, made when it is first asked for: what holds for all that talk in it, by
        whatever communicator. A new group begins without; whoever is alone shares with nobody."""
        found: Shared | None = self._shared.get(kind)
        return self._shared.setdefault(kind, kind()) if found is None else found

    def cancel(self, reason: str) -> None:
        """Makes every wait of this communicator, now and later, raise ``Cancelled``. Any thread may call it."""
        self._reason = reason
        self._cancelled.set()
        for pending in tuple(self._open):
            pending.done.set()

    def check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled(f"rank {self.rank} was told to stop: {self._reason}")

    @contextmanager
    def phase(self, phase: Phase, kind: str = "", hop: int = 0) -> Iterator[None]:
        """Tells the observer where this rank is."""
        if self.observer is None:
            yield
            return
        self.observer.begin(phase, kind, hop)
        yield
        self.observer.end(phase, kind, hop)

    # ---- between two ranks ---------------------------------------------------------------------------------------

    def exchange(
        self, kind: str, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], *, hop: int = 0, tag: int = 0
    ) -> Pending:
        """Starts sending and receiving; ``wait`` on what it returns. Ranks start the exchanges of a pair in one order.

        Args:
            kind: the ledger's word for these bytes.
            sends: peer -> contiguous tensor, not to be written to before ``wait`` returns.
            receives: peer -> contiguous tensor to fill.
            tag: on gloo, what is never taken for a message of another tag.
        """
        self.check_cancelled()
        if not self.blocks_host:
            self._open = {p for p in self._open if not all(work.is_completed() for work in p.works)}
        for tensor in (*sends.values(), *receives.values()):
            assert tensor.is_contiguous(), "only contiguous tensors travel"
            assert tensor.device.type == self.device.type, "tensors travel from the communicator's device"
        if self.observer is not None:
            self.observer.begin(Phase.TRANSFER, kind, hop)
        self.ledger.sent[kind] += sum(x.nbytes for x in sends.values())
        self.ledger.received[kind] += sum(x.nbytes for x in receives.values())
        return Pending(self, kind, hop, self._post(sends, receives, tag), (*sends.values(), *receives.values()))

    def _post(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int) -> list[Any]:
        if not sends and not receives:
            return []
        group = self.group
        assert group is not None
        if not self.blocks_host:
            operations = [dist.P2POp(dist.irecv, x, group=group, group_peer=peer) for peer, x in receives.items()]
            operations += [dist.P2POp(dist.isend, x, group=group, group_peer=peer) for peer, x in sends.items()]
            return dist.batch_isend_irecv(operations)
        try:
            works = [group.recv([x], peer, tag) for peer, x in receives.items()]
            return works + [group.send([x], peer, tag) for peer, x in sends.items()]
        except RuntimeError as error:  # gloo refuses to post to a connection that has failed
            raise PeerLost(f"rank {self.rank} lost a peer: {error}") from error

    # ---- between all ranks ---------------------------------------------------------------------------------------

    def all_gather(self, kind: str, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order. All have one shape and dtype."""
        if self.group is None:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        others = (self.world_size - 1) * tensor.nbytes
        wire, group = tensor.contiguous(), self.group
        self._collective(kind, lambda: group.allgather([parts], [wire]), others, (wire, *parts))
        return parts

    def agree(self, kind: str, what: str) -> None:
        """Returns where every rank says the same; never hangs on those that say something else.

        On NCCL, where asking costs a stop of the host, the same question is asked once.

        Raises:
            ValueError: on every rank, naming what the first ranks that differ said.
        """
        if self.group is None or (not self.blocks_host and what in self._agreed):
            return
        digest = torch.frombuffer(bytearray(hashlib.sha256(what.encode()).digest()), dtype=torch.uint8)
        answers = [bytes(x.cpu().numpy()) for x in self._answers(kind, digest.to(self.device))]
        if len(set(answers)) > 1:
            other = next(rank for rank, answer in enumerate(answers) if answer != answers[0])
            texts = self._gather_texts(kind, what)
            raise ValueError(f"ranks disagree on {kind}: rank 0 has {texts[0]}, rank {other} has {texts[other]}")
        if not self.blocks_host:
            self._agreed[what] = None
            if len(self._agreed) > AGREED_KEPT:
                del self._agreed[next(iter(self._agreed))]

    def _answers(self, kind: str, digest: Tensor) -> list[Tensor]:
        """Every rank's digest. Small messages between pairs take gloo half the time of a collective."""
        if not self.blocks_host:
            return self.all_gather(kind, digest)
        answers = digest.repeat(self.world_size, 1)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        sends, receives = dict.fromkeys(others, digest), {rank: answers[rank] for rank in others}
        self.exchange(kind, sends, receives, tag=AGREEMENT).wait()
        return list(answers)

    def _gather_texts(self, kind: str, text: str) -> list[str]:
        message = text.encode()
        lengths = [int(x) for x in self.all_gather(kind, torch.tensor([len(message)], device=self.device))]
        padded = torch.frombuffer(bytearray(message.ljust(max(lengths))), dtype=torch.uint8).to(self.device)
        parts = self.all_gather(kind, padded)
        return [bytes(x.cpu().numpy())[:n].decode() for x, n in zip(parts, lengths, strict=True)]

    def all_reduce(self, kind: str, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place; the same bits on every rank. Counted as a ring all-reduce sends it."""
        if (group := self.group) is not None:
            nbytes = all_reduce_nbytes(tensor.nbytes, self.world_size)
            self._collective(kind, lambda: group.allreduce([tensor]), nbytes, (tensor,))
        return tensor

    def barrier(self, kind: str = "barrier") -> None:
        """Returns when every rank has come here."""
        self.all_reduce(kind, torch.zeros(1, device=self.device))

    def _collective(self, kind: str, start: Callable[[], Any], nbytes: int, tensors: tuple[Tensor, ...]) -> None:
        self.check_cancelled()
        if self.observer is not None:
            self.observer.begin(Phase.TRANSFER, kind, 0)
        self.ledger.sent[kind] += nbytes
        self.ledger.received[kind] += nbytes
        try:
            work = start()
        except RuntimeError as error:
            raise PeerLost(f"rank {self.rank} lost a peer: {error}") from error
        Pending(self, kind, 0, [work], tensors).wait()

    # ---- waiting -------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Polls until everything that was started is done: where a step ends on NCCL. Gloo's waits have done it."""
        begin = time.perf_counter()
        while any(not work.is_completed() for pending in self._open for work in pending.works):
            self.check_cancelled()
            self._check_time(time.perf_counter() - begin, "a step's end")
            time.sleep(SETTLE_SLEEP_S)
        self._open.clear()

    def close(self) -> None:
        """Cancels every wait and lets go of the buffers. The group belongs to who made it."""
        self.cancel("the communicator was closed")
        self._open.clear()
        if self._waiter is not None:
            self._waiter.close()

    @property
    def is_idle(self) -> bool:
        """Whether no transfer is under way; until then the group must live."""
        return self._waiter is None or self._waiter.is_idle

    def _check_time(self, waited: float, kind: str) -> None:
        if waited > self.timeout_s:
            raise PeerLost(f"rank {self.rank} waited {waited:.1f} s for {kind}, the limit is {self.timeout_s:g} s")


def all_reduce_nbytes(nbytes: int, world_size: int) -> int:
    """What each rank of a ring sends to all-reduce ``nbytes``."""
    return 2 * (world_size - 1) * nbytes // world_size


def process_group(device: torch.device, store: Any, rank: int, world_size: int, timeout_s: float) -> Any:
    """A group for a Communicator, once all ranks have met in ``store``: gloo on the CPU; on CUDA NCCL, where the group
    is the process's only one and takes the place of one before. None for one rank."""
    timeout = datetime.timedelta(seconds=timeout_s)
    if world_size == 1:
        return None
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, world_size, timeout)
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world_size, timeout=timeout)
    return dist.group.WORLD


class Pending:
    """A transfer under way. It keeps its tensors alive until it is done."""

    def __init__(
        self, communicator: Communicator, kind: str, hop: int, works: list[Any], tensors: tuple[Tensor, ...]
    ) -> None:
        self.works, self.done = works, threading.Event()
        self.error: BaseException | None = None
        self._communicator, self._kind, self._hop, self._tensors = communicator, kind, hop, tensors
        communicator._open.add(self)
        if communicator._waiter is not None:
            communicator._waiter.wait_for(self)

    def wait(self) -> None:
        """Returns when what was received may be used: on gloo by the host, on NCCL by the current stream.

        Raises:
            Cancelled: the communicator was cancelled.
            PeerLost: a peer is gone, or the wait took longer than ``timeout_s``.
        """
        communicator = self._communicator
        communicator.check_cancelled()
        if communicator._waiter is None:
            for work in self.works:
                work.wait()
        else:
            with communicator.phase(Phase.WAIT, self._kind, self._hop):
                self._wait_on_host()
        if communicator.observer is not None:
            communicator.observer.end(Phase.TRANSFER, self._kind, self._hop)

    def _wait_on_host(self) -> None:
        communicator, begin = self._communicator, time.perf_counter()
        self.done.wait(communicator.timeout_s)
        communicator.check_cancelled()
        waited = time.perf_counter() - begin
        if not self.done.is_set():
            communicator._check_time(waited, self._kind)
        communicator._open.discard(self)
        by_kind = communicator.ledger.waited_s
        by_kind[self._kind] = by_kind.get(self._kind, 0.0) + waited
        if self.error is not None:
            raise PeerLost(f"rank {communicator.rank} lost a peer in {self._kind}: {self.error}") from self.error


class _Waiter:
    """A thread that waits for transfers in the order in which they were started, and sets ``done`` of each.

    What gloo has ended is let go of a little later: to let go at once would spin, for a whole turn of the scheduler (3
    to 4 ms) where gloo's own thread shares the core, until that thread has let go too.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._started = 0  # the callers', under the lock
        self._done = self._ended = 0  # the thread's
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="raybsa-communicator", daemon=True)
        self._thread.start()

    def wait_for(self, pending: Pending) -> None:
        if pending.works:
            with self._lock:
                self._started += 1
            self._queue.put(pending)
        else:
            pending.done.set()

    @property
    def is_idle(self) -> bool:
        return self._started == self._ended

    def close(self) -> None:
        """The thread ends when the transfer it waits for does; an idle one has ended on return.

        A thread that still holds a group's work when the process ends would abort the process.
        """
        self._queue.put(None)
        if self._started == self._done and threading.current_thread() is not self._thread:
            self._thread.join(1.0)

    def _run(self) -> None:
        before: list[Any] = []  # works that have ended
        closed = False
        while True:
            try:
                pending = self._queue.get(timeout=LET_GO_S if closed or self._ended < self._done else None)
            except queue.Empty:
                pending = None  # nor is the last one held
                before.clear()
                self._ended = self._done
                if closed:
                    return
            else:
                if pending is None:
                    closed = True
                else:
                    before = self._wait(pending)

    def _wait(self, pending: Pending) -> list[Any]:
        """The works of a transfer, when all have ended; who waits for them hears at once where one has failed."""
        ended: list[Any] = []
        while pending.works:
            try:
                pending.works[0].wait()
            except Exception as error:
                if pending.error is None:
                    pending.error = error.with_traceback(None)  # whose frames would hold what they are about
                pending.done.set()
            ended.append(pending.works.pop(0))
        self._done += 1
        pending.done.set()
        return ended
