"""The README's Python runs as written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raybsa import patterns
from raybsa.tasks.capture import load_calls

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_ten_lines_run_and_draw_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    assert "4096 x 4096 tokens" in capsys.readouterr().out


def test_the_own_pattern_keeps_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(BLOCKS[1])
    monkeypatch.syspath_prepend(tmp_path)
    layout = patterns.build("mine:EveryThird").layout(64 * 8, causal=True)
    wanted = [[1 if j <= i and (i - j) % 3 == 0 else 0 for j in range(8)] for i in range(8)]
    assert layout.to_dense()[0].int().tolist() == wanted
    del sys.modules["mine"]


def test_the_learned_pattern_learns_and_freezes_and_calls_are_captured(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    q, k, v = (torch.randn(2, 8, 320, 64, requires_grad=True) for _ in range(3))
    scope = {"q": q, "k": k, "v": v, "task_loss": lambda out: out.square().mean(), "torch": torch}
    exec(BLOCKS[2], scope)
    assert scope["attend"].source.density.count == 1
    assert all(parameter.grad is not None for parameter in scope["attend"].parameters())
    assert scope["layout"].num_groups == 8
    attend = scope["attend"]
    exec(BLOCKS[3], {"torch": torch, "model": Calls(attend), "inputs": (q, k, v)})
    assert len(load_calls("qkv.pt")) == 1


class Calls(torch.nn.Module):
    """A model that attends to what it is given."""

    def __init__(self, attend: torch.nn.Module) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.attend(*inputs)


def test_the_ring_example_runs_under_torchrun(tmp_path: Path) -> None:
    setup = "import torch\nq, k, v = (torch.randn(1, 8, 512, 16) for _ in range(3))\n"
    (tmp_path / "ring.py").write_text(setup + BLOCKS[4])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(tmp_path / "ring.py")]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("RingPlan: 2 ranks") == 2


def test_every_command_names_a_file_that_is_there() -> None:
    root = Path(__file__).parent.parent
    for path in re.findall(r"\b(?:jobs|docs)/[\w/]+\.\w+", README):
        assert (root / path).exists(), path
