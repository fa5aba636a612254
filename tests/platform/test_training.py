"""Training on a real, small Ray cluster: faults of every kind, and the weights of the run without any."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import ray
import torch.distributed as dist
from torch import Tensor

from raybsa.cluster.calls import Calls
from raybsa.cluster.faults import Fault, FaultKind, FaultPlace, FaultPlan, mark_file
from raybsa.cluster.journal import Journal, TrainingFailed, TrainingResult
from raybsa.cluster.member import Member, MemberSettings, Progress
from raybsa.cluster.membership import Membership, Seat
from raybsa.cluster.resources import Share, TooFewResources
from raybsa.cluster.training import TrainingCoordinator
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from tests.kernels.problems import relative_error

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180), pytest.mark.usefixtures("everything_is_given_back")]
STEPS = 12


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_bytes(bytes(range(32, 127)) * 60)
    return str(folder)


def spec(text: str) -> TrialSpec:
    attention = AttentionSpec("distributed", PatternSpec("bigbird"), 0.5, 16)
    params = {"text": text, "train_batch": 2, "eval_windows": 2}
    return TrialSpec(
        "byte_lm", (attention,), train_len=16 * 9, train_steps=STEPS, num_heads=2, head_dim=8, dtype="float64",
        task_params=params,
    )  # fmt: skip


Trained = tuple[TrainingResult, list[Tensor]]


def train(question: TrialSpec, plan: FaultPlan = (), **options) -> Trained:
    """The result and the weights of rank 0."""
    settings = options.pop("settings", MemberSettings())
    resume = options.pop("resume", False)
    options = {"world_size": 3, "heartbeat_s": 1.5, "wait_s": 120.0, "say": lambda text: None} | options
    with TrainingCoordinator(question, Share(1), settings=settings, plan=plan, **options) as coordinator:
        return coordinator.run(stretch=4, resume=resume), coordinator.weights()


def assert_same_up_to_rounding(weights: list[Tensor], wanted: list[Tensor]) -> None:
    assert max(relative_error(a, b) for a, b in zip(weights, wanted, strict=True)) <= 1e-6


class Undisturbed(NamedTuple):
    """What a run without faults leads to, its losses by step."""

    losses: dict[int, float]
    digest: str
    bits_per_byte: float
    weights: list[Tensor]


def in_peace(question: TrialSpec, world_size: int) -> Undisturbed:
    """Members in threads of this process: no Ray, so no coordinator that might hide what it does."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    members = [Member(question, "cpu", MemberSettings()) for _ in range(world_size)]

    def work(rank: int) -> Undisturbed:
        member = members[rank]
        member.join(Seat(1, rank, world_size, "127.0.0.1", store.port))
        losses = dict(member.train(STEPS).losses)
        return Undisturbed(losses, member.digest(), member.evaluate(), member.weights())

    with ThreadPoolExecutor(world_size) as threads:
        first, *others = threads.map(work, range(world_size))
    assert list(first.losses) == list(range(STEPS))
    assert {other.digest for other in others} <= {first.digest}
    return first


@pytest.fixture(scope="module")
def undisturbed(text: str) -> Undisturbed:
    return in_peace(spec(text), 3)


PLAN = (
    (Fault(FaultKind.SPARE, FaultPlace.EXCHANGE, 1, 1),),  # both spares are up by now: a dead one must not be taken
    (Fault(FaultKind.EXIT, FaultPlace.FORWARD_HOP, 1, 2, hop=1),),
    (Fault(FaultKind.TWO_RANKS, FaultPlace.BACKWARD_HOP, 2, 3),),
    (Fault(FaultKind.EXIT, FaultPlace.CHECKPOINT, 0, 4),),  # the others are through with the stretch by then
    (Fault(FaultKind.SIGKILL, FaultPlace.BEFORE_COMMIT, 2, 4),),
    (Fault(FaultKind.SIGSTOP, FaultPlace.EXCHANGE, 0, 5),),
    (Fault(FaultKind.OUT_OF_MEMORY, FaultPlace.BACKWARD_HOP, 1, 6, hop=0),),
    (Fault(FaultKind.RAY_KILL, FaultPlace.BEFORE_FORWARD, 2, 8),),
    (
        Fault(FaultKind.EXIT, FaultPlace.EXCHANGE, 0, 9),
        Fault(FaultKind.SIGKILL, FaultPlace.EXCHANGE, 1, 9),
    ),
    (Fault(FaultKind.EXIT, FaultPlace.RECOVERY, 1, -1),),
)


def test_after_every_kind_of_fault_the_weights_are_those_of_the_run_without(
    text: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    settings = MemberSettings(marks=str(marks), checkpoints=str(tmp_path / "checkpoints"), checkpoint_every=4)
    result, _ = train(spec(text), PLAN, settings=settings, spares=2, replace_s=60.0)
    for faults in PLAN:
        for fault in faults:
            assert mark_file(str(marks), fault).exists(), f"{fault} never struck"
    assert [len(recovery.lost) for recovery in result.recoveries] == [1, 1, 2, 1, 1, 1, 1, 1, 3]
    for faults, recovery in zip(PLAN, result.recoveries, strict=False):
        committed = faults[0].place is FaultPlace.BEFORE_COMMIT  # the others may have applied the step
        assert recovery.step in (faults[0].step, faults[0].step + committed), recovery
        assert (recovery.steps_lost, recovery.world_size) == (0, 3), recovery
    assert result.recoveries[0].filled == "spare"
    assert "no sign of life" in result.recoveries[5].lost[0][1]
    assert "injected: out of memory" in result.recoveries[6].lost[0][1]
    assert result.digest == undisturbed.digest
    assert result.losses == undisturbed.losses, "what ranks told before another died is not lost"
    assert result.bits_per_byte == undisturbed.bits_per_byte


def test_a_ring_shrinks_without_a_stand_in_and_grows_back(text: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    plan = ((Fault(FaultKind.SIGKILL, FaultPlace.EXCHANGE, 2, 2),),)

    def wait_for_the_fresh_one(step: int, loss: float) -> None:
        deadline = time.monotonic() + 60
        while step == 4 and not coordinator._crew.has_arrived() and time.monotonic() < deadline:
            time.sleep(0.05)

    with TrainingCoordinator(
        spec(text), Share(1), world_size=3, plan=plan, replace_s=0.0, tell=wait_for_the_fresh_one, say=lambda text: None
    ) as coordinator:
        result = coordinator.run(stretch=4)
        assert [recovery.filled for recovery in result.recoveries] == ["shrunk", "grown"]
        assert [recovery.world_size for recovery in result.recoveries] == [2, 3]
        assert_same_up_to_rounding(coordinator.weights(), undisturbed.weights)


def test_a_training_whose_driver_died_goes_on_from_its_checkpoint(
    text: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    settings = MemberSettings(checkpoints=str(tmp_path / "checkpoints"), checkpoint_every=5)

    with pytest.raises(SystemExit):
        train(spec(text), settings=settings, world_size=2, tell=raising(SystemExit))
    result, weights = train(spec(text), settings=settings, world_size=1, resume=True)
    assert list(result.losses) == list(range(5, STEPS)), "the checkpoint of step 5 is where it goes on"
    assert_same_up_to_rounding(weights, undisturbed.weights)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_training_that_is_interrupted_saves_what_it_has_at_once_and_loses_no_step(
    text: str, undisturbed: Undisturbed, tmp_path: Path, world_size: int
) -> None:
    settings, said = MemberSettings(checkpoints=str(tmp_path / "checkpoints"), checkpoint_every=99), []
    with pytest.raises(KeyboardInterrupt):
        train(spec(text), settings=settings, world_size=world_size, tell=raising(KeyboardInterrupt), say=said.append)
    assert [text for text in said if "checkpoint" in text] == ["the checkpoint of step 8 is written"]
    result, weights = train(spec(text), settings=settings, world_size=1, resume=True)
    assert list(result.losses) == list(range(8, STEPS))
    assert_same_up_to_rounding(weights, undisturbed.weights)


def raising(error: type[BaseException]) -> Callable[[int, float], None]:
    """Raises it from step 8."""

    def tell(step: int, loss: float) -> None:
        if step == 8:
            raise error

    return tell


def test_where_no_checkpoint_can_be_written_a_training_says_so_once_and_goes_on_or_stops_as_asked(
    text: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    settings, said = MemberSettings(checkpoints=str(tmp_path / "file" / "checkpoints"), checkpoint_every=1), []
    result, _ = train(spec(text), settings=settings, say=said.append)
    assert (result.digest, result.recoveries) == (undisturbed.digest, ()), "no healthy rank is lost for it"
    (line,) = [text for text in said if "checkpoint" in text]
    assert re.fullmatch(r"the checkpoint of step 1 could not be written to '.*': .*; the training goes on and .*", line)
    with pytest.raises(TrainingFailed, match=r"the checkpoint of step 1 could not be .*: mend that, and .* --resume"):
        train(spec(text), settings=replace(settings, on_checkpoint_error="stop"))


def test_when_all_ranks_die_at_once_it_goes_on_from_its_own_checkpoint_and_from_none_that_an_earlier_run_left(
    text: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    settings = MemberSettings(checkpoints=str(tmp_path), checkpoint_every=5)
    earlier, _ = train(spec(text), settings=settings, world_size=1)  # leaves the checkpoints of steps 5 and 10
    assert not earlier.recoveries
    plan = tuple(
        tuple(Fault(FaultKind.SIGKILL, FaultPlace.BEFORE_FORWARD, rank, step) for rank in (0, 1)) for step in (4, 9)
    )
    settings, said = replace(settings, checkpoint_every=6), list[str]()
    result, weights = train(spec(text), plan, settings=settings, world_size=2, replace_s=60.0, say=said.append)
    assert [(recovery.step, recovery.steps_lost) for recovery in result.recoveries] == [(0, 4), (6, 2)]
    found = [line for line in said if "checkpoint" in line]
    none = "no checkpoint of this question was found: the training begins at step 0"  # nothing of this run was durable
    assert found == [none, "resumed from the checkpoint of step 6"]
    assert list(result.losses) == list(range(STEPS))
    assert_same_up_to_rounding(weights, undisturbed.weights)


def test_a_spare_that_dies_is_replaced_before_it_is_needed(text: str) -> None:
    said: list[str] = []

    def kill_the_spare(step: int, loss: float) -> None:
        if step == 4:
            coordinator._crew.kill(coordinator._crew.spares[0])
            time.sleep(1.0)

    with TrainingCoordinator(
        replace(spec(text), train_steps=40), Share(1), world_size=1, spares=1, tell=kill_the_spare, say=said.append
    ) as coordinator:
        coordinator.run(stretch=4, evaluate=False)
        told = [line for line in said if not line.startswith("waiting")]
        assert told, "the loss of a spare is told"
        assert told[0].startswith("spare 1 is lost: ActorDiedError")
        assert coordinator._crew.arriving or coordinator._crew.spares == [2]


def test_a_training_that_always_fails_at_the_same_step_ends_with_its_reason(text: str) -> None:
    plan = tuple((Fault(FaultKind.OUT_OF_MEMORY, FaultPlace.BEFORE_FORWARD, 0, 6),) for _ in range(3))
    with pytest.raises(TrainingFailed, match=r"step \d failed 2 times, last with .*injected: out of memory"):
        train(spec(text), plan, world_size=1, max_failures=1, replace_s=60.0)


def test_what_no_rank_can_do_fails_at_once(text: str) -> None:
    with pytest.raises(TrainingFailed, match=r"a rank refused .*world_size must lie in 1\.\.1"):
        train(replace(spec(text), train_len=16), world_size=2)


def test_a_rank_that_is_alive_may_end_what_it_computes(text: str) -> None:
    """Its pulse says that it lives; only one that stays for too long is lost."""

    @ray.remote(num_cpus=1)
    def after(seconds: float) -> Progress:
        time.sleep(seconds)
        return Progress(3, ((2, 0.5),), {}, 0.0)

    crew = SimpleNamespace(cancel=lambda workers, *_: {w: ray.put(None) for w in workers}, silent=lambda workers: {})
    roster, journal = SimpleNamespace(members=Membership(1, (0, 1, 2))), Journal()
    ray.get([after.remote(0.0), after.remote(0.0)])
    calls = Calls(cast(Any, crew), cast(Any, roster), journal, stop_s=5.0)
    assert calls.wreck({1: "gone"}, {0: after.remote(1.0), 2: after.remote(0.0)}).lost == {1: "gone"}
    assert journal.losses == {2: 0.5}
    calls = Calls(cast(Any, crew), cast(Any, roster), journal, stop_s=0.5)
    assert calls.wreck({1: "gone"}, {0: after.remote(2.0)}).lost == {1: "gone", 0: "did not stop within 0.5 s"}


def test_too_few_ranks_left_is_an_error(text: str) -> None:
    plan = ((Fault(FaultKind.EXIT, FaultPlace.EXCHANGE, 0, 1),),)
    with pytest.raises(TrainingFailed, match="1 ranks are left, at least 2 are wanted"):
        train(spec(text), plan, world_size=2, min_ranks=2, replace_s=0.0)


def test_more_ranks_than_resources_is_a_bounded_wait_and_a_clear_error(text: str) -> None:
    with pytest.raises(TooFewResources, match="2 workers of 4 CPU and 0 GPU wanted, the cluster has 6 CPU"):
        TrainingCoordinator(spec(text), Share(4), world_size=2, wait_s=1.0, say=lambda text: None).__enter__()
    with pytest.raises(ValueError, match="needs 1 <= min_ranks <= world_size"):
        TrainingCoordinator(spec(text), Share(1), world_size=0)
