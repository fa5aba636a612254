"""The coordinator's overhead: the plain loop makes the same training, and rounds take turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from raybsa.experiments import overhead
from raybsa.experiments.overhead import Round, Run, rounds, run_plain, step_ms
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks import plain
from raybsa.tasks.sharded import ShardedTraining


@pytest.fixture
def spec(tmp_path: Path) -> TrialSpec:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 60)
    attention = AttentionSpec("distributed", PatternSpec("bigbird"), 0.4, 16)
    params = {"text": str(tmp_path), "train_batch": 2, "eval_windows": 2}
    return TrialSpec("byte_lm", (attention,), train_len=64, train_steps=3, num_heads=2, head_dim=8, task_params=params)


def test_the_plain_loop_trains_what_the_coordinator_trains(
    spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    question, answer = tmp_path / "question.json", tmp_path / "answer.json"
    question.write_text(json.dumps(spec.to_dict()))
    plain.main(question, answer)
    found = json.loads(answer.read_text())
    training = ShardedTraining(spec, torch.device("cpu"))
    for _ in range(3):
        training.prepare()
        training.apply()
    assert found["digest"] == training.digest()
    assert len(found["applied_at"]) == 3
    assert found["applied_at"] == sorted(found["applied_at"])


def test_rounds_take_turns_and_tell_the_overhead(spec: TrialSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(overhead, "run_coordinated", lambda *_: order.append("ray") or Run(102.0, "same"))
    monkeypatch.setattr(overhead, "run_plain", lambda *_: order.append("plain") or Run(100.0, "same"))
    found = list(rounds(spec, 2, 3))
    assert order == ["ray", "plain", "plain", "ray", "ray", "plain"]
    assert [each.overhead for each in found] == pytest.approx([0.02] * 3)
    assert all(each.equal for each in found)
    assert not Round(Run(1.0, "one"), Run(1.0, "another")).equal


def test_a_step_is_timed_without_the_first_few() -> None:
    assert step_ms([0.0, 5.0, 9.0, 10.0, 10.1, 10.3, 10.4]) == pytest.approx(100.0)
    with pytest.raises(ValueError, match="at least 5 steps are wanted to time one, got 4"):
        step_ms([1.0, 2.0, 3.0, 4.0])


def test_a_torchrun_that_fails_says_why(spec: TrialSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="torchrun ended with status 1"):
        run_plain(spec, 2)
