"""The demo stops the head that it started, however it is ended."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import subprocess, sys, time
from contextlib import contextmanager
from jobs import demo
from raybsa.cluster.head import LocalHead

@contextmanager
def head(num_cpus):
    try:
        yield LocalHead("http://127.0.0.1:1", {})
    finally:
        print("stopped", flush=True)

def submit(command, **_):
    print(*command, flush=True)
    time.sleep(60)

demo.local_head, demo.subprocess = head, type("", (), {"run": submit})
sys.argv = ["demo.py", "--out", sys.argv[1]]
with demo.interruptible("again"):
    sys.exit(demo.main())
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_an_ended_demo_stops_its_head(how: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "results of a demo")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        submitted = next(line for line in lines if " job submit " in line)
        process.send_signal(how)
        assert list(lines)[-1] == "stopped\n"
    assert process.returncode == 128 + how
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert commit.strip() in submitted, "the uploaded copy could not know its commit"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "FILE"], "results must go to a folder that can be written"),
        (["--out", "x", "--num-cpus", "0"], "from 1"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_head_starts(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., tuple[int, str]],
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("raybsa.cluster.head.local_head", lambda *_: pytest.fail("nothing should have started"))
    code, words = refused("demo.py", *(str(tmp_path / "file") if word == "FILE" else word for word in arguments))
    assert code == 2
    assert message in words
