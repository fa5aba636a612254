"""Training over ranks gives the weights that training on one device gives, and a broken step can be made again."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from raybsa.comm import Broken, Communicator, Phase
from raybsa.gradients.overlap import Overlap, OverlapMeter
from raybsa.ring.timeline import Span, Timeline
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.sharded import ShardedTraining, send_state
from tests.kernels.problems import relative_error
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.fixture
def spec(tmp_path) -> TrialSpec:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 60)
    attention = AttentionSpec("distributed", PatternSpec("bigbird"), 0.4, 16)
    params = {"text": str(tmp_path), "train_batch": 2, "eval_windows": 4}
    return TrialSpec(
        "byte_lm", (attention,), train_len=16 * 7, train_steps=4, num_heads=2, head_dim=8, dtype="float64",
        task_params=params,
    )  # fmt: skip


def train(training: ShardedTraining, steps: int) -> None:
    for _ in range(steps):
        training.prepare()
        training.apply()


def on_ranks(spec: TrialSpec, world_size: int, steps: int = 4) -> list[tuple[list[Tensor], float, float]]:
    def work(communicator: Communicator) -> tuple[list[Tensor], float, float]:
        training = ShardedTraining(spec, CPU)
        training.bind(communicator)
        train(training, steps)
        return training.state(), sum(loss for _, loss in training.losses), training.evaluate()

    return run_ranks(world_size, work)


def test_three_ranks_train_the_weights_of_one(spec: TrialSpec) -> None:
    ((alone, loss, bits),) = on_ranks(spec, 1)
    ranks = on_ranks(spec, 3)
    for state, _, some_bits in ranks:
        assert all(torch.equal(a, b) for a, b in zip(state, ranks[0][0], strict=True)), "ranks must hold the same bits"
        assert some_bits == pytest.approx(bits, rel=1e-9)
        assert max(relative_error(a, b) for a, b in zip(state, alone, strict=True)) <= 1e-8
    assert [some_loss for _, some_loss, _ in ranks] == pytest.approx([loss] * 3, rel=1e-9)


def test_a_learned_pattern_trains_alike_on_any_number_of_ranks(spec: TrialSpec) -> None:
    pattern = PatternSpec("adaptive", {"warmup": 1, "anneal": 2})
    spec = replace(spec, attention=(replace(spec.attention[0], pattern=pattern),))
    ((alone, _, bits),) = on_ranks(spec, 1)
    for state, _, some_bits in on_ranks(spec, 2):
        assert some_bits == pytest.approx(bits, rel=1e-9)
        assert max(relative_error(a, b) for a, b in zip(state, alone, strict=True)) <= 1e-7


def test_a_step_that_broke_is_made_again_with_the_same_bits(spec: TrialSpec) -> None:
    wanted = on_ranks(spec, 2)[0][0]

    class Break:
        def begin(self, phase: Phase, kind: str, hop: int) -> None:
            if phase is Phase.EXCHANGE:
                raise Broken("injected")

        def end(self, phase: Phase, kind: str, hop: int) -> None: ...

    def work(communicator: Communicator) -> list[Tensor]:
        training = ShardedTraining(spec, CPU)
        training.bind(communicator)
        train(training, 1)
        communicator.observer = Break()
        with pytest.raises(Broken):
            training.prepare()
        communicator.observer = None
        training.bind(communicator)
        train(training, 3)
        return training.state()

    for state in run_ranks(2, work):
        assert all(torch.equal(a, b) for a, b in zip(state, wanted, strict=True))


def test_a_newcomer_gets_the_state_of_a_survivor(spec: TrialSpec) -> None:
    wanted = on_ranks(spec, 3)[0][0]

    def work(communicator: Communicator) -> list[Tensor]:
        training = ShardedTraining(spec, CPU)
        training.bind(communicator)
        train(training, 2)
        if communicator.rank == 1:
            training = ShardedTraining(spec, CPU)
        training.bind(communicator)  # as all ranks do in a new generation
        send_state(training, 2, [1])
        assert training.step == 2
        train(training, 2)
        return training.state()

    for state in run_ranks(3, work):
        assert all(torch.equal(a, b) for a, b in zip(state, wanted, strict=True))


@pytest.mark.parametrize("codec", [{"name": "int8"}, {"name": "powersgd", "params": {"rank": 1}}], ids=str)
def test_a_lossy_codec_remembers_across_generations(spec: TrialSpec, codec: dict) -> None:
    def work(communicator: Communicator) -> tuple[list[Tensor], float, int]:
        training = ShardedTraining(replace(spec, dtype="float32"), CPU, codec=codec)
        training.bind(communicator)
        train(training, 2)
        before = training.residual_norm()
        training.prepare()  # a step that is not applied is forgotten
        training.bind(communicator)
        if communicator.rank == 1:
            training = ShardedTraining(replace(spec, dtype="float32"), CPU, codec=codec)
            training.bind(communicator)
        send_state(training, 0, [1])
        train(training, 2)
        return training.state(), before, communicator.ledger.sent["gradient"]

    ranks = run_ranks(2, work)
    assert all(torch.equal(a, b) for a, b in zip(ranks[0][0], ranks[1][0], strict=True))
    assert all(norm > 0 for _, norm, _ in ranks)
    plain = sum(x.nbytes for x in ranks[0][0]) / 3 * 5  # weights are a third of the state; five steps went out
    assert all(sent < plain / 2 for _, _, sent in ranks)


# ---- gradients on a group of their own -----------------------------------------------------------------------------


def second_group(store: dist.Store, communicator: Communicator) -> Communicator:
    """Another group of the same ranks."""
    place = (communicator.rank, communicator.world_size, datetime.timedelta(seconds=30))
    return Communicator(dist.ProcessGroupGloo(store, *place), timeout_s=30.0)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_gradients_sent_in_backward_lead_to_the_same_bits_also_after_a_backward_that_broke(
    spec: TrialSpec, codec: str
) -> None:
    spec, store = replace(spec, dtype="float32"), dist.HashStore()

    def work(communicator: Communicator) -> list[list[Tensor]]:
        gradients, ended = second_group(store, communicator), []
        for second in (gradients, None):
            training = ShardedTraining(spec, CPU, codec=codec, bucket_bytes=1000)
            training.bind(communicator, second)
            train(training, 1)
            first = next(iter(training.model.parameters()))  # the last that backward reaches
            handle = first.register_hook(lambda gradient: (_ for _ in ()).throw(Broken("injected")))
            with pytest.raises(Broken):
                training.prepare()
            handle.remove()
            training.bind(communicator, second)
            train(training, 2)
            ended.append(training.state())
        gradients.close()
        return ended

    ranks = run_ranks(2, work)
    wanted = ranks[0][0]
    assert all(torch.equal(a, b) for ended in ranks for state in ended for a, b in zip(state, wanted, strict=True))


def transfers_in(spans: list[Span]) -> list[Span]:
    return [span for span in spans if (span.phase, span.kind) == ("transfer", "gradient")]


def test_gradients_are_under_way_before_backward_ends(spec: TrialSpec) -> None:
    store = dist.HashStore()

    def work(communicator: Communicator) -> tuple[list[Span], list[Span], float, dict[str, int]]:
        gradients = second_group(store, communicator)
        training = ShardedTraining(spec, CPU, bucket_bytes=1000)
        training.bind(communicator, gradients)
        ring, sent = Timeline(communicator.rank), Timeline(communicator.rank)
        communicator.observer, gradients.observer = ring, Both(sent, gradients.observer)
        first = next(iter(training.model.parameters()))
        first.register_hook(lambda gradient: None if until(lambda: bool(transfers_in(sent.spans()))) else gradient / 0)
        training.prepare()
        gradients.close()
        return ring.spans(0.0), sent.spans(0.0), training.overlap.share, dict(communicator.ledger.sent)

    for ring, sent, share, by_kind in run_ranks(2, work):
        (backward,) = [span for span in ring if (span.phase, span.kind) == ("step", "backward")]
        transfers = transfers_in(sent)
        assert len(transfers) > 2, "several buckets"
        assert backward.begin_s < transfers[0].begin_s < transfers[0].end_s < backward.end_s
        assert share > 0.0
        assert "gradient" not in by_kind, "the ring's own group carries none"


class Both:
    """Two observers as one."""

    def __init__(self, *observers: Any) -> None:
        self._observers = observers

    def begin(self, phase: Phase, kind: str, hop: int) -> None:
        for observer in self._observers:
            observer.begin(phase, kind, hop)

    def end(self, phase: Phase, kind: str, hop: int) -> None:
        for observer in self._observers:
            observer.end(phase, kind, hop)


def test_overlap_is_what_lay_within_backward_of_the_time_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, meter = iter([1.0, 3.0, 4.0, 8.0, 9.0, 10.0]), OverlapMeter()
    monkeypatch.setattr("raybsa.gradients.overlap.time.perf_counter", lambda: next(clock))
    for _ in range(3):
        meter.begin(Phase.TRANSFER, "gradient", 0)
        meter.begin(Phase.WAIT, "gradient", 0)
        meter.end(Phase.WAIT, "gradient", 0)
        meter.end(Phase.TRANSFER, "gradient", 0)
    found = meter.take(backward_end_s=5.0)
    assert found == Overlap(2.0 + 1.0 + 0.0, 2.0 + 4.0 + 1.0)
    assert meter.take(5.0).share == 0.0
    assert (found + found).share == pytest.approx(3 / 7)


def test_other_tasks_and_variants_are_refused(spec: TrialSpec) -> None:
    with pytest.raises(ValueError, match="takes task 'byte_lm' with variant 'distributed'"):
        ShardedTraining(replace(spec, attention=(replace(spec.attention[0], variant="base"),)), CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_state_on_a_gpu_can_be_sent_though_the_optimizer_counts_on_the_cpu(spec: TrialSpec) -> None:
    training = ShardedTraining(replace(spec, dtype="float32"), torch.device("cuda"))
    train(training, 1)
    assert {x.device.type for x in training.state()} == {"cpu", "cuda"}
    send_state(training, 0, [])
    assert training.step == 1
