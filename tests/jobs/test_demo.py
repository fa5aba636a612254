"""The demo stops the head that it started, however it is ended."""

from __future__ import annotations

import signal
import subprocess
import sys
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
sys.argv = ["demo.py", "--out", "results of a demo"]
sys.exit(demo.main())
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_an_ended_demo_stops_its_head(how: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        submitted = next(line for line in lines if " job submit " in line)
        process.send_signal(how)
        assert list(lines)[-1] == "stopped\n"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert commit.strip() in submitted, "the uploaded copy could not know its commit"
