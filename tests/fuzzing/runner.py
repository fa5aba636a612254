"""Runner: cases in a process of their own, which a crash or a hang ends; then comes a new one. Here: in this one."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import signal
import warnings
from multiprocessing.connection import Connection
from typing import Any

from tests.fuzzing.case import Case

MOST = 400  # cases a process: compilers keep what they made


class Runner:
    """``run(case)`` gives the kind, the words and the trace of its outcome, whatever becomes of the process.

    Args:
        timeout_s: seconds that a case may take.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.count = 0
        self.process: Any = None
        self.pipe: Any = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, case: Case) -> tuple[str, str, str]:
        if self.process is None or self.count >= MOST:
            self.stop()
            self._start()
        self.count += 1
        self.pipe.send(case.to_dict())
        if not self.pipe.poll(self.timeout_s):
            self.stop()
            return "wrong", f"it took longer than {self.timeout_s:g} s", ""
        try:
            kind, words, trace = self.pipe.recv()
        except EOFError:
            return "wrong", self._how_it_died(), ""
        return kind, words, trace

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.count = 0

    def _how_it_died(self) -> str:
        self.process.join()
        code = self.process.exitcode
        self.process = None
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the process died: {name}"

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


class Here:
    """Runs cases in this process."""

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, case: Case) -> tuple[str, str, str]:
        from tests.fuzzing import check

        return tuple(check.run(case))


def _work(pipe: Connection) -> None:
    from tests.fuzzing import check

    faulthandler.enable()
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            pipe.send(tuple(check.run(Case.of(pipe.recv()))))
