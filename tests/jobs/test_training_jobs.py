"""The train and recovery jobs as a user runs them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from raybsa.results.store import Store


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 60)
    return str(tmp_path / "text.txt")


@pytest.mark.cluster
def test_a_training_leaves_a_record_curves_and_a_checkpoint_from_which_it_goes_on(
    tmp_path: Path, text: str, ray_cluster: str, run_job: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    out = tmp_path / "out"
    shape = ["--tokens", "128", "--heads", "2", "--head-dim", "8", "--layers", "1", "--batch", "2", "--text", text]
    rest = ["--out", str(out), "--steps", "8", "--tell-every", "4", "--checkpoint-every", "4", "--codec", "int8"]
    first = run_job("train.py", *shape, *rest, "--address", ray_cluster)
    assert first.returncode == 0, first.stderr
    assert "step 8/8:" in first.stdout
    (record,) = Store(str(out)).read_records()
    assert (record.task, record.variant, record.pattern) == ("byte_lm", "distributed", "bigbird")
    assert record.quality_name == "bits_per_byte"
    assert record.quality is not None
    assert record.wire_bytes > 0
    losses = [point for point in Store(str(out)).read_series() if point.name == "train_loss"]
    assert [point.step for point in losses] == list(range(8))
    again = run_job("train.py", *shape, *rest, "--resume", "--world-size", "1", RAY_ADDRESS=ray_cluster)
    assert "resumed from the checkpoint of step 8" in again.stdout, again.stdout + again.stderr


@pytest.mark.cluster
def test_a_drill_says_when_a_fault_was_noticed_and_that_the_weights_are_equal(
    tmp_path: Path, text: str, ray_cluster: str, run_job: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_job(
        "recovery_drill.py", "--out", str(tmp_path / "out"), "--text", text, "--world-size", "2", "--spares", "0",
        "--fault", "sigkill:backward_hop", "driver:exchange", "--address", ray_cluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("sigkill at backward_hop 0")]
    assert "fresh" in line
    assert line.endswith("equal")
    (driver,) = [line for line in done.stdout.splitlines() if line.startswith("driver at exchange")]
    assert driver.split()[-2:] == ["resumed", "equal"]
    assert "2 of 2 faults as wanted" in done.stdout
    assert "(raylet)" not in done.stdout
    assert len(Store(str(tmp_path / "out")).read_records()) == 3, "the run in peace, the one with a fault, the resumed"


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("train.py", ["--pattern", "nonesuch"], "nonesuch"),
        ("train.py", ["--codec", "zip"], "unknown codec 'zip'; there are none, fp16"),
        ("train.py", ["--partition", "round"], "partition must be one of"),
        ("train.py", ["--text", "/nonesuch"], "text must be a file or a folder, got '/nonesuch'"),
        ("recovery_drill.py", ["--fault", "flood:exchange"], "a fault is KIND:PLACE, a kind of exit"),
    ],
)
def test_bad_input_is_named_before_anything_starts(
    tmp_path: Path, job: str, arguments: list[str], message: str, refused: Callable[..., tuple[int, str]]
) -> None:
    code, words = refused(job, "--out", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert message in words
