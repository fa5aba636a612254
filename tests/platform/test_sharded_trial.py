"""One rank's part of a search's trial: two ranks find the quality of one worker, and send what their plans say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raybsa.cluster.worker import Worker
from raybsa.comm import Communicator
from raybsa.gradients import build
from raybsa.results.record import Measurement
from raybsa.spec import AttentionSpec, PatternSpec, Ranks, TrialSpec
from raybsa.tasks import byte_lm, ring
from raybsa.tasks.catalog import prepare_training
from raybsa.tasks.preview import save_weights
from raybsa.tasks.ring_rank import joined
from raybsa.tasks.sharded_trial import RankQuality, ShardedTrial, plans_of
from raybsa.timing import DeviceLock
from tests.ranks import run_ranks


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrialSpec:
    """Of one worker. Ranks are threads here, and the profiler that counts memory knows one."""
    monkeypatch.setattr(ring, "peak_bytes", lambda call, device: 7)
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 60)
    attention = AttentionSpec("base", PatternSpec("bigbird"), 0.4, 16)
    params = {"text": str(tmp_path / "text.txt"), "train_batch": 2, "eval_windows": 4}
    return TrialSpec(
        "byte_lm", (attention,), seq_len=256, train_len=112, train_steps=4, num_heads=2, head_dim=8, task_params=params
    )


def over(spec: TrialSpec, ranks: Ranks) -> TrialSpec:
    layers = (replace(layer, variant="distributed", pattern=layer.rule) for layer in spec.attention)
    return replace(spec, attention=tuple(layers)).over(ranks)


def measured(spec: TrialSpec) -> tuple[Measurement, list[RankQuality]]:
    def work(communicator: Communicator) -> tuple:
        trial = ShardedTrial(spec, communicator)
        report = trial.measure(3, 0.01)
        if spec.task == "speed":
            return report, None
        trial.train(1)
        trial.train(4)
        return report, trial.judge()

    reports, qualities = zip(*run_ranks(spec.ranks.world_size, work), strict=True)
    return joined(spec, reports, "cpu", 2, []), list(qualities)


def test_two_ranks_come_to_the_quality_of_one_worker_and_send_what_their_plans_say(spec: TrialSpec) -> None:
    asked = over(spec, Ranks(2, "zigzag"))
    found, qualities = measured(asked)
    alone = Worker(repeats=1, budget_s=0.0, num_threads=1).run(spec)
    for each in qualities:
        assert (each.quality.name, each.quality.goal, each.quality.steps) == ("bits_per_byte", "min", 4)
        assert each.quality.value == pytest.approx(alone.quality, rel=1e-5)
        assert [point[:2] for point in each.quality.curves] == [point[:2] for point in alone.curves]
    weights = sum(p.numel() for p in byte_lm.Transformer(spec, 256).parameters())
    assert [each.step_bytes for each in qualities] == [4 * weights] * 2, "an all-reduce of two sends them once"
    plans = plans_of(asked)
    assert len(plans) == spec.num_layers
    assert found.wire_forward_bytes == sum(plan.bytes_sent(2, 8, 4) for plan in plans) == found.needed_forward_bytes
    assert found.wire_bytes == 3 * found.wire_forward_bytes, "K and V twice, their gradients once"
    assert (found.world_size, found.partition, found.density) == (2, "zigzag", alone.density)
    assert found.imbalance == pytest.approx(plans[0].imbalance)
    assert found.forward_backward_ms_p50 > 0


def test_ranks_share_layers_that_differ_by_one_partition(spec: TrialSpec) -> None:
    differ = replace(spec, attention=(AttentionSpec("dense", block_size=16), spec.attention[0]))
    asked = over(differ, Ranks(2))
    found, qualities = measured(asked)
    alone = Worker(repeats=1, budget_s=0.0, num_threads=1).run(differ)
    assert [each.quality.value for each in qualities] == pytest.approx([alone.quality] * 2, rel=1e-5)
    assert found.density == pytest.approx(alone.density)
    plans = plans_of(asked)
    assert plans[0].partition is plans[1].partition
    assert found.wire_forward_bytes == sum(plan.bytes_sent(2, 8, 4) for plan in plans) == found.needed_forward_bytes
    assert plans[0].bytes_sent(2, 8, 4) > plans[1].bytes_sent(2, 8, 4) > 0


def test_a_codec_is_that_of_the_weights_gradients_and_of_those_of_k_and_v(spec: TrialSpec) -> None:
    plain, whole = measured(over(spec, Ranks(2)))
    int8 = build("int8").spec
    small, fewer = measured(over(spec, Ranks(2, gradient_codec=int8, codec=int8)))
    assert small.wire_forward_bytes == plain.wire_forward_bytes
    assert small.wire_bytes < 0.85 * plain.wire_bytes
    assert fewer[0].step_bytes < 0.3 * whole[0].step_bytes
    assert fewer[0].quality.value == pytest.approx(whole[0].quality.value, rel=1e-2)


def test_a_learned_pattern_is_shared_too(spec: TrialSpec) -> None:
    learned = replace(spec, attention=(AttentionSpec("base", PatternSpec("adaptive"), 0.4, 16),))
    found, qualities = measured(over(learned, Ranks(2)))
    assert qualities[0].quality.value == qualities[1].quality.value
    assert found.needed_forward_bytes is None, "its blocks are known when it runs"
    assert found.wire_forward_bytes > 0


def test_where_nothing_is_trained_a_ring_is_timed_alone(spec: TrialSpec) -> None:
    found, qualities = measured(over(replace(spec, task="speed", task_params={}), Ranks(3)))
    assert qualities == [None] * 3
    assert (found.world_size, found.quality) == (3, None)


def test_a_question_of_other_ranks_is_refused(spec: TrialSpec) -> None:
    with pytest.raises(ValueError, match="the question is one of 3 ranks, got 1"):
        ShardedTrial(over(spec, Ranks(3)), Communicator())


def test_one_worker_can_look_at_a_question_of_ranks(spec: TrialSpec, tmp_path: Path) -> None:
    """A preview: the baseline's weights under an attention that ranks would share."""
    lock, cpu = DeviceLock("cpu", str(tmp_path)), torch.device("cpu")
    weights = str(tmp_path / "weights.pt")
    save_weights(byte_lm.prepare_training(spec, cpu, lock), weights)
    looks = []
    for asked in (spec, over(spec, Ranks(2, codec=build("int8").spec))):
        preview = replace(asked, task_params={**asked.task_params, "weights": weights})
        judgement = prepare_training(preview, cpu, lock)
        assert judgement is not None
        looks.append(judgement.advance().value)
    assert looks[0] == pytest.approx(looks[1], rel=1e-6)
