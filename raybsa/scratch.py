"""Temporary folders that do not outlive their run for long: what a killed process left goes when the next begins."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

_PREFIX, _HELD = "raybsa-", ".held"


@contextmanager
def scratch(what: str = "") -> Iterator[str]:
    """A temporary folder of this process, ``raybsa-<what>-…``, gone in the end.

    The process holds a lock in it; the system lets go of that however the process ends, and whoever makes the next
    scratch on this host deletes what nobody holds.
    """
    _sweep(tempfile.gettempdir())
    folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{what}-" if what else _PREFIX)
    lock = os.open(os.path.join(folder, ".new"), os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(os.path.join(folder, ".new"), os.path.join(folder, _HELD))  # from here on a sweep may look at it
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@lru_cache(maxsize=1)
def _sweep(place: str) -> None:
    """Once in a process: deletes the scratch folders of this user that no process holds."""
    for held in Path(place).glob(f"{_PREFIX}*/{_HELD}"):
        folder = held.parent
        if not folder.is_symlink() and folder.lstat().st_uid == os.geteuid() and _is_free(held):
            shutil.rmtree(folder, ignore_errors=True)


def _is_free(held: Path) -> bool:
    try:
        lock = os.open(held, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # another sweep was faster
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
