"""A signal ends a job in order, with its own exit code and one line that says how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raybsa import signals

ROOT = Path(__file__).parent.parent
PROGRAM = """
import os, signal, sys
from raybsa import signals
from raybsa.experiments.place import ending, interruptible, FAILED

def kill(name):
    os.kill(os.getpid(), getattr(signal, name))

with interruptible("do it again"), ending(FAILED, OSError):
    try:
        with signals.deferred():
            kill(sys.argv[1])
            print("whole", flush=True)
            signals.raise_if_heard()
    finally:
        kill("SIGTERM")  # an echo
        print("in order", flush=True)
print("went on", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_a_job_in_order_with_its_own_code_and_a_line_that_says_how_to_go_on(name: str) -> None:
    ended = _run(name)
    assert ended.returncode == 128 + getattr(signal, name)
    assert ended.stdout.splitlines() == ["whole", "in order"], "what had begun is ended first, and an echo is not heard"
    assert ended.stderr == f"jobs/-c: ended by {name}: do it again\n"


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As by ``nohup``."""
    ended = _run("SIGHUP", before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert ended.stdout.splitlines()[0] == "whole"
    assert ended.stderr == "jobs/-c: ended by SIGTERM: do it again\n", "the second one was no echo"


@pytest.mark.parametrize("job", sorted(path.name for path in (ROOT / "jobs").glob("[a-z]*.py")))
def test_every_job_that_takes_long_ends_so(job: str) -> None:
    assert ("interruptible(" in (ROOT / "jobs" / job).read_text()) is (job != "scaling_forecast.py")


def test_nothing_is_raised_where_nothing_was_heard() -> None:
    assert signals.raise_if_heard() is None


def _run(name: str, **options) -> subprocess.CompletedProcess[str]:
    before = options.get("before")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, env=environment, timeout=60, check=False,
        preexec_fn=before,
    )  # fmt: skip
