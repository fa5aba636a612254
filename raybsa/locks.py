"""Locks between the processes of a host, whoever their users are; who waits for long hears who holds one.

They are ``flock``s of files that everybody may open: the kernel drops a lock when its holder dies, and Linux lists who
holds which (``/proc/locks``), so that taking one costs no more than the lock.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from raybsa.holder import Holder, is_stopped

PATIENCE_S = 5.0  # of a wait without a word
_ATTEMPTS, _PAUSE_S = 20, 0.01
_LOCKS = Path("/proc/locks")
_STOPPED = " (stopped: kill -CONT {} lets it go on)"
_told: set[str] = set()


@contextmanager
def locked(path: str, kind: int, *, gate: str, keep_gate: bool) -> Iterator[None]:
    """Holds the lock of ``path``, entered through that of ``gate``, which is kept meanwhile or not."""
    gate_file, lock_file = _open(gate), _open(path)
    try:
        _take(gate_file, fcntl.LOCK_EX, (gate, path))
        _take(lock_file, kind, (gate, path))
        if not keep_gate:
            fcntl.flock(gate_file, fcntl.LOCK_UN)
        yield
    finally:
        os.close(lock_file)
        os.close(gate_file)


def holders(path: str) -> list[Holder]:
    """The processes that hold the lock of a file, as far as the system says."""
    return [Holder.of(pid) for pid in _pids(path, waiting=False)]


def waiters(path: str) -> list[int]:
    """The numbers of the processes that wait for it."""
    return _pids(path, waiting=True)


def described(found: Sequence[Holder]) -> str:
    """Who holds something, and what helps where one of them was stopped."""
    words = [f"{who}{_STOPPED.format(who.pid) if is_stopped(who.pid) else ''}" for who in found]
    return "; ".join(words) or "a process that this system does not name"


def _take(file: int, kind: int, paths: Sequence[str]) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        pass
    timer = threading.Timer(PATIENCE_S, _tell, (paths,))
    timer.daemon = True
    timer.start()
    try:
        fcntl.flock(file, kind)
    finally:
        timer.cancel()


def _tell(paths: Sequence[str]) -> None:
    """Once in a process for the same holders."""
    found = {who.pid: who for path in paths for who in holders(path) if who.pid != os.getpid()}
    text = f"waiting for {paths[-1]}, held by {described(list(found.values()))}"
    if text not in _told:
        _told.add(text)
        print(text, file=sys.stderr, flush=True)


def _pids(path: str, *, waiting: bool) -> list[int]:
    try:
        inode, lines = os.stat(path).st_ino, _LOCKS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for fields in map(str.split, lines):
        is_waiting = "->" in fields
        if "FLOCK" in fields and is_waiting == waiting:
            _, _, _, pid, place = fields[fields.index("FLOCK") :][:5]
            if place.rpartition(":")[2] == str(inode):
                found.append(int(pid))
    return list(dict.fromkeys(found))


def _open(path: str) -> int:
    """A descriptor to lock. ``flock`` needs no right to write, so others need the right to read alone; where one made
    the file for itself (an older version, under umask 077), this user's processes have a lock of their own."""
    own = f"{path}-{os.geteuid()}"
    flags, path = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, own if own in _told else path
    for _ in range(_ATTEMPTS):
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            if (made := _make(path, flags)) is not None:
                return made
        except PermissionError:  # perhaps its maker is about to open it to others
            time.sleep(_PAUSE_S)
    if path == own:
        raise PermissionError(f"a lock that may be read was wanted, got {path!r}")
    _told.add(own)
    print(f"{path} may only be read by its owner: neighbours' work may disturb timings", file=sys.stderr, flush=True)
    return _open(path)


def _make(path: str, flags: int) -> int | None:
    """A new file that everybody may read, whatever the umask; None where another process was faster."""
    try:
        made = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    os.fchmod(made, 0o644)
    return made
