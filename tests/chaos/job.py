"""A job as a user starts it: its lines as they come, signals to it, and what its end must look like."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0  # a machine that others use too
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Job:
    """A running job.

    Args:
        arguments: of Python, from the root of the repository.
    """

    def __init__(self, *arguments: str) -> None:
        self.name = arguments[0]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._process = subprocess.Popen(
            [sys.executable, "-u", *arguments],
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._fresh: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, words: str, count: int = 1) -> bool:
        """Waits until so many fresh lines hold ``words``; False where the job ended before."""
        deadline = time.monotonic() + LIMIT_S
        while count:
            line = self._fresh.get(timeout=max(0.1, deadline - time.monotonic()))
            if line is None:
                self._fresh.put(None)
                return False
            count -= words in line
        return True

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """Waits for the end; returns the exit code, negative for a signal that killed it."""
        try:
            return self._process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(f"{self.name} did not end within {LIMIT_S:g} s:\n{self.text}") from None
        finally:
            self.wait_for("\0")

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def must_have_ended_well(self, *wanted: int) -> None:
        """With one of these codes; one line of its own says why, where that is not 0; no traceback."""
        code = self.end()
        if code == -signal.SIGKILL:
            print(f"    {code}: {self.name}", flush=True)
        assert code in wanted, f"{self.name} ended with {code}, wanted {wanted}:\n{self.text}"
        if code == -signal.SIGKILL:
            return
        assert "Traceback" not in self.text, self.text
        own = [line for line in self.lines if line.startswith(f"{self.name}: ")]
        print(f"    {code}: {'; '.join(own) or self.name}", flush=True)
        assert len(own) == (code != 0), f"one line was wanted, that says what happened, got {own}:\n{self.text}"

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._fresh.put(line)
        self._fresh.put(None)


def codes_of(number: signal.Signals) -> tuple[int, ...]:
    """How a job may end that was sent a signal: by it, or well, where it had just ended."""
    return (-signal.SIGKILL, 0) if number == signal.SIGKILL else (128 + number, 0)
