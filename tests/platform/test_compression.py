"""Trainings whose gradients travel by a codec: what they send, and that ranks do not matter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from raybsa.experiments.suites import CODECS, compression
from raybsa.spec import AttentionSpec, TrialSpec
from raybsa.tasks.compression import compression_params, train_compressed
from raybsa.tasks.compression_ranks import measure_compression
from tests.ranks import run_ranks


@pytest.fixture
def spec(tmp_path: Path) -> TrialSpec:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 60)
    return TrialSpec(
        "compression", (AttentionSpec("dense"),), train_len=32, train_steps=4, num_layers=1, num_heads=2, head_dim=16,
        dtype="float64", task_params={"text": str(tmp_path), "train_batch": 4, "eval_windows": 2},
    )  # fmt: skip


def with_params(spec: TrialSpec, **params: object) -> TrialSpec:
    return replace(spec, task_params={**spec.task_params, **params})


def test_uncompressed_ranks_train_as_one_and_send_every_gradient(spec: TrialSpec) -> None:
    alone = run_ranks(1, lambda communicator: train_compressed(spec, communicator.group))[0]
    both = run_ranks(2, lambda communicator: train_compressed(spec, communicator.group))
    assert both[0].bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-6)
    assert both[0].sent_bytes == both[0].uncompressed_bytes > 0
    assert len(both[0].losses) == 4


def test_a_codec_sends_as_many_fewer_bytes_as_its_rank_says(spec: TrialSpec) -> None:
    asked = with_params(spec, codec={"name": "powersgd", "params": {"rank": 1}})
    found = run_ranks(2, lambda communicator: train_compressed(asked, communicator.group))[0]
    width, steps = 32, 4
    factors = sum(n + m for n, m in ((256, width), (3 * width, width), (width, width), *[(width, 4 * width)] * 2))
    assert found.sent_bytes == 8 * steps * (factors + 3 * width)


def test_pytorchs_hook_is_trained_and_counted_beside_ours(spec: TrialSpec) -> None:
    asked = with_params(spec, codec={"name": "torch_powersgd", "params": {"rank": 1}}, warmup_steps=2)
    found = measure_compression(asked)
    assert found.quality is not None
    assert found.world_size == 2
    curves = {name: value for name, _, value in found.curves if name == "uncompressed_bytes"}
    assert curves["uncompressed_bytes"] / 2 < found.wire_bytes < curves["uncompressed_bytes"], "half of it was warm-up"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"codec": "zip"}, "unknown codec 'zip'"),
        ({"codec": "torch_powersgd"}, "needs 2 or more warm-up steps, got {}, 0"),
        ({"codec": {"name": "torch_powersgd", "params": {"seed": 1}}, "warmup_steps": 2}, "takes a rank"),
        ({"world_size": 3}, "3 ranks must share train_batch evenly, got 4 windows"),
    ],
)
def test_bad_parameters_are_named(spec: TrialSpec, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compression_params(with_params(spec, **params))


def test_the_suite_asks_every_codec_with_every_seed() -> None:
    specs = compression(seeds=2)
    assert len({spec.digest for spec in specs}) == 2 * len(CODECS)
    for spec in specs:
        compression_params(spec)
