"""docs/extending.md: each addition runs as written, by its ``module:Name``, in fewer than 30 lines."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from raybsa import BlockLayout, block_sparse_attention
from raybsa.comm import Communicator
from raybsa.experiments.spaces import space_of
from raybsa.gradients import GradientExchange, build
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.catalog import prepare_training
from raybsa.timing import DeviceLock

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
CODEC, BACKEND, TASK = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module in the current folder, as where a job is started."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not Path(folder, "mine.py").exists()])
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "mine.py"
    sys.modules.pop("mine", None)


def question(task: str) -> TrialSpec:
    attention = AttentionSpec("base", PatternSpec("dense"), None, 16)
    return TrialSpec(task, (attention,), train_len=32, train_steps=3, num_heads=2, head_dim=8)


def test_none_is_longer_than_thirty_lines() -> None:
    for code in (CODEC, BACKEND, TASK):
        assert len(code.strip().splitlines()) < 30


def test_the_space_of_an_own_pattern_is_one_that_a_search_takes(mine: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    mine.write_text(re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[1])
    (space,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    found = space_of(yaml.safe_load(space), question("speed"))
    assert "mine:EveryThird" in found.families


def test_the_codec_s_error_feedback_brings_what_was_not_sent(mine: Path) -> None:
    mine.write_text(CODEC)
    codec = build("mine:Sign")
    assert build(codec.spec) == codec
    weight = torch.nn.Parameter(torch.zeros(64))
    exchange = GradientExchange([("weight", weight)], codec, Communicator(None))
    wanted, sent = torch.linspace(-1, 2, 64), torch.zeros(64)
    for _ in range(200):
        weight.grad = None
        (weight * wanted).sum().backward()
        exchange.finish()
        sent += weight.grad
    exchange.close()
    assert (sent / 200 - wanted).abs().max() < 0.2, "of one step's signs it would be more than 1"


def test_the_backend_equals_the_reference_and_says_what_it_cannot(mine: Path) -> None:
    mine.write_text(BACKEND)
    layout = BlockLayout.from_rows([[[0], [0, 1], [2], [1, 3]]] * 4, q_len=60, kv_len=60, q_block_size=16)
    q, k, v = torch.randn(1, 4, 60, 8), torch.randn(1, 2, 60, 8), torch.randn(1, 2, 60, 8)
    wanted = block_sparse_attention(q, k, v, layout, backend="reference")
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout, backend="mine:MaskedSDPA"), wanted)
    with pytest.raises(NotImplementedError, match="returns out alone"):
        block_sparse_attention(q, k, v, layout, backend="mine:MaskedSDPA", return_lse=True)


def test_the_task_is_learned(mine: Path) -> None:
    mine.write_text(TASK)
    quality = prepare_training(question("mine:copying"), torch.device("cpu"), DeviceLock(torch.device("cpu"))).advance()
    assert (quality.name, quality.goal, quality.steps) == ("copied", "max", 3)
    assert 0 <= quality.value <= 1


def test_a_module_that_is_no_python_is_told_in_a_line(mine: Path) -> None:
    mine.write_text("def f(:\n")
    with pytest.raises(ValueError, match=r"task 'mine:f' must name something as 'module:Name': .*\(mine.py, line 1\)"):
        prepare_training(question("mine:f"), torch.device("cpu"), DeviceLock(torch.device("cpu")))


@pytest.mark.parametrize("name", ["mine_not_there:copying", "mine:nothing", "copy"])
def test_a_name_that_stands_for_nothing_is_an_error_with_the_names_there_are(name: str, mine: Path) -> None:
    mine.write_text("")
    with pytest.raises(ValueError, match=f"task '{name}'"):
        prepare_training(question(name), torch.device("cpu"), DeviceLock(torch.device("cpu")))
