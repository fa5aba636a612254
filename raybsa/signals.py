"""Signals that ask a job to end. It ends in order, as after Ctrl-C, and its exit code says which signal it was.

Ray passes on a KeyboardInterrupt from within its calls and replaces whatever else a handler raises, a SystemExit and
its code too. So SIGTERM (``ray job stop``, a preemption) and SIGHUP (a closed terminal) raise KeyboardInterrupt here,
and the end of the job asks which signal was heard.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _State:
    """Of this process, which has one set of handlers: the first signal that was heard, and whether it has to wait."""

    heard: signal.Signals | None = None
    deferred = False


def listen() -> None:
    """From now on the first of these signals raises KeyboardInterrupt, and those that follow are its echo, but for a
    second Ctrl-C. A signal that whoever started the process ignores (``nohup``) stays ignored."""
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _hear)


@contextmanager
def not_for_children() -> Iterator[None]:
    """Processes that are started inside outlive a closed terminal: the job needs them to end in order."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, the first signal only shows in ``raise_if_heard``: what must not be cut in half is ended before that."""
    before, _State.deferred = _State.deferred, True
    try:
        yield
    finally:
        _State.deferred = before


def raise_if_heard() -> None:
    """Raises KeyboardInterrupt where a signal has been heard."""
    if _State.heard is not None:
        raise KeyboardInterrupt


def heard() -> signal.Signals:
    """The signal that ends the job."""
    return _State.heard or signal.SIGINT


def exit_code() -> int:
    """What a shell makes of a process that a signal ended."""
    return 128 + heard()


def _hear(number: int, frame: FrameType | None) -> None:
    first = _State.heard is None
    if first:
        _State.heard = signal.Signals(number)
    if (first and not _State.deferred) or (not first and number == signal.SIGINT):
        raise KeyboardInterrupt
