"""What the jobs' tests share: a job as a user runs it, in a process of its own or, where it ends early, in this one."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture
def run_job() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_job("train.py", "--out", folder, RAY_ADDRESS=address)`` as from a shell; without one it starts Ray."""

    def run(job: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | environment
        command = [sys.executable, str(JOBS / job), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=110, check=False)

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """``refused("train.py", "--steps", "x")``: exit code and last words of a job that must end before it starts Ray."""

    def run(job: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [job, *arguments])
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("nothing should have started"))
        with pytest.raises(SystemExit) as ended:  # any other exception is the traceback that no user should see
            runpy.run_path(str(JOBS / job), run_name="__main__")
        code, words = ended.value.code, capsys.readouterr().err
        return (code, words) if isinstance(code, int) else (1, f"{words}{code}")  # as Python ends a process

    return run
