"""Temporary folders: gone in the end, and where their process was killed, when the next begins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raybsa import scratch as module
from raybsa.scratch import scratch

HOLDS = """
import time
from raybsa.scratch import scratch
with scratch("tune") as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    module._sweep.cache_clear()
    return tmp_path


def test_a_scratch_folder_is_there_and_then_gone(place: Path) -> None:
    with scratch("tune") as folder:
        assert Path(folder).parent == place
        Path(folder, "file").touch()
    assert list(place.iterdir()) == []


def test_the_next_run_takes_away_what_a_killed_one_left_and_nothing_that_is_held_or_not_ours(place: Path) -> None:
    (place / "raybsa-mine").mkdir()
    command, environment = [sys.executable, "-c", HOLDS], os.environ | {"TMPDIR": str(place)}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    killed, living = (Path(process.stdout.readline().strip()) for process in processes if process.stdout)
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    try:
        assert killed.exists()
        with scratch("tune"):
            assert [folder.exists() for folder in (killed, living, place / "raybsa-mine")] == [False, True, True]
    finally:
        processes[1].kill()
        for process in processes:
            process.communicate()
