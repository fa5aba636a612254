"""The communicator counts what travels, can be cancelled, and tells its observer where it is."""

from __future__ import annotations

import threading
import time
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from raybsa.comm import Cancelled, Communicator, PeerLost, Phase, _Waiter
from tests.ranks import run_ranks


def test_messages_arrive_in_order_and_are_counted() -> None:
    def work(communicator: Communicator) -> tuple[list[float], dict[str, int], dict[str, int]]:
        rank, size = communicator.rank, communicator.world_size
        came = [torch.empty(4) for _ in range(3)]
        pending = [
            communicator.exchange(
                "kv", {(rank + 1) % size: torch.full((4,), 10.0 * rank + i)}, {(rank - 1) % size: buffer}
            )
            for i, buffer in enumerate(came)
        ]
        for each in pending:
            each.wait()
        ledger = communicator.ledger
        return [float(x[0]) for x in came], dict(ledger.sent), dict(ledger.received)

    for rank, (came, sent, received) in enumerate(run_ranks(3, work)):
        assert came == [10.0 * ((rank - 1) % 3) + i for i in range(3)]
        assert sent == received == {"kv": 48}


def test_collectives_give_every_rank_the_same() -> None:
    def work(communicator: Communicator) -> tuple[torch.Tensor, list[float]]:
        total = communicator.all_reduce("gradient", torch.rand(1000, generator=torch.manual_seed(communicator.rank)))
        parts = communicator.all_gather("lengths", torch.tensor([float(communicator.rank)]))
        communicator.barrier()
        return total, [float(x) for x in parts]

    results = run_ranks(4, work)
    assert all(torch.equal(total, results[0][0]) and parts == [0.0, 1.0, 2.0, 3.0] for total, parts in results)


def test_what_is_shared_belongs_to_a_group_whoever_talks_in_it() -> None:
    def work(communicator: Communicator) -> tuple[list[int], bool]:
        again = Communicator(communicator.group)
        communicator.shared(list).append(communicator.rank)
        found = again.shared(list)
        again.close()
        return found, communicator.shared(dict) == {}

    results = run_ranks(2, work)
    assert results == [([0], True), ([1], True)], "a rank's own, and another for each kind"
    assert Communicator().shared(list) is not Communicator().shared(list), "whoever is alone shares with nobody"


def test_alone_everything_is_a_no_op() -> None:
    alone = Communicator()
    assert (alone.rank, alone.world_size) == (0, 1)
    x = torch.ones(2)
    assert alone.all_reduce("g", x) is x
    assert alone.all_gather("g", x)[0] is x
    alone.exchange("kv", {}, {}).wait()
    alone.agree("anything", "x")
    alone.barrier()
    assert not alone.ledger.sent["g"]


def test_ranks_that_disagree_all_hear_what_the_other_said() -> None:
    def work(communicator: Communicator) -> str:
        try:
            communicator.agree("the plan", "long " * communicator.rank + "layout")
        except ValueError as error:
            return str(error)
        return "agreed"

    for message in run_ranks(3, work):
        assert message == "ranks disagree on the plan: rank 0 has layout, rank 1 has long layout"


@pytest.mark.parametrize("closes", [False, True])
def test_what_has_ended_is_let_go_of_by_itself_and_when_it_is_closed(closes: bool) -> None:
    def work(communicator: Communicator) -> tuple[bool, bool]:
        peer, sent = 1 - communicator.rank, torch.ones(4)
        for _ in range(3):
            communicator.exchange("kv", {peer: sent}, {peer: torch.empty(4)}).wait()
        freed = weakref.ref(sent)
        del sent
        if closes:
            communicator.close()
        deadline = time.monotonic() + 20.0
        while not communicator.is_idle and time.monotonic() < deadline:
            time.sleep(1e-3)
        return communicator.is_idle, freed() is None

    assert run_ranks(2, work) == [(True, True)] * 2


def test_a_failed_transfer_is_let_go_of_too() -> None:
    class Gone:
        def wait(self) -> None:
            raise RuntimeError("gone")

    class Late:
        def wait(self) -> None:
            assert heard.wait(20.0), "who waits for the transfer hears before all of it has ended"

    heard, waiter = threading.Event(), _Waiter()
    pending = SimpleNamespace(works=[Gone(), Late()], done=threading.Event(), error=None)
    works = [weakref.ref(work) for work in pending.works]
    waiter.wait_for(pending)
    assert pending.done.wait(20.0)
    assert str(pending.error) == "gone"
    assert not waiter.is_idle
    heard.set()
    deadline = time.monotonic() + 20.0
    while not waiter.is_idle:
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    assert [work() for work in works] == [None, None]
    waiter.close()


def test_a_rank_that_is_elsewhere_does_not_take_a_question_for_its_data() -> None:
    def work(communicator: Communicator) -> bytes:
        communicator.timeout_s, buffer = 0.3, torch.zeros(64, dtype=torch.uint8)
        asked = partial(communicator.agree, "the plan", "layout")
        elsewhere = communicator.exchange("kv", {}, {0: buffer}).wait if communicator.rank else asked
        with pytest.raises(PeerLost):
            elsewhere()
        return bytes(buffer.numpy())

    assert run_ranks(2, work)[1] == bytes(64)


def test_cancelling_frees_a_rank_whose_peer_hangs() -> None:
    hanging = threading.Event()

    def work(communicator: Communicator) -> float:
        if communicator.rank == 1:
            hanging.wait(20.0)
            return 0.0
        cancelled_at = []

        def cancel() -> None:
            cancelled_at.append(time.perf_counter())
            communicator.cancel("a test")

        threading.Timer(0.2, cancel).start()
        with pytest.raises(Cancelled, match="rank 0 was told to stop: a test"):
            communicator.exchange("kv", {}, {1: torch.empty(4)}).wait()
        freed = time.perf_counter() - cancelled_at[0]
        with pytest.raises(Cancelled):
            communicator.exchange("kv", {}, {})
        hanging.set()
        return freed

    assert run_ranks(2, work)[0] < 10.0, "a rank that was cancelled must not wait for its peer"


def test_a_wait_that_takes_too_long_says_so() -> None:
    done = threading.Event()

    def work(communicator: Communicator) -> None:
        if communicator.rank == 1:
            done.wait(20.0)
            return
        communicator.timeout_s = 0.1
        with pytest.raises(PeerLost, match=r"rank 0 waited 0\.1 s for kv, the limit is 0\.1 s"):
            communicator.exchange("kv", {}, {1: torch.empty(4)}).wait()
        done.set()

    run_ranks(2, work)


class Diary:
    def __init__(self) -> None:
        self.lines: list[tuple[str, Phase, int]] = []

    def begin(self, phase: Phase, kind: str, hop: int) -> None:
        self.lines.append(("begin", phase, hop))

    def end(self, phase: Phase, kind: str, hop: int) -> None:
        self.lines.append(("end", phase, hop))


def test_the_observer_hears_of_every_phase() -> None:
    def work(communicator: Communicator) -> list[tuple[str, Phase, int]]:
        diary = communicator.observer = Diary()
        peer = 1 - communicator.rank
        communicator.exchange("kv", {peer: torch.ones(2)}, {peer: torch.empty(2)}, hop=1).wait()
        return diary.lines

    wanted = [("begin", "transfer", 1), ("begin", "wait", 1), ("end", "wait", 1), ("end", "transfer", 1)]
    assert run_ranks(2, work) == [wanted, wanted]


def test_the_observer_hears_of_a_collective_as_of_an_exchange() -> None:
    def work(communicator: Communicator) -> list[tuple[str, Phase, int]]:
        diary = communicator.observer = Diary()
        communicator.all_reduce("gradient", torch.ones(2))
        return diary.lines

    wanted = [("begin", "transfer", 0), ("begin", "wait", 0), ("end", "wait", 0), ("end", "transfer", 0)]
    assert run_ranks(2, work) == [wanted, wanted]


def test_what_an_observer_raises_is_raised_there() -> None:
    class Fault:
        def begin(self, phase: Phase, kind: str, hop: int) -> None:
            if phase is Phase.FORWARD:
                raise RuntimeError("injected")

        def end(self, phase: Phase, kind: str, hop: int) -> None: ...

    communicator = Communicator(observer=Fault())
    with pytest.raises(RuntimeError, match="injected"), communicator.phase(Phase.FORWARD):
        pass


def test_what_was_agreed_does_not_pile_up() -> None:
    def work(communicator: Communicator) -> int:
        for step in range(20):
            communicator.agree("a call", f"seed {step}")
        return len(communicator._agreed)

    assert run_ranks(2, work) == [0, 0], "on gloo the question is asked each time, so nothing need be kept"
