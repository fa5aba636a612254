"""Who holds what others wait for: a process, on which host, whose, since when."""

from __future__ import annotations

import os
import pwd
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Holder:
    """A process as others can name it.

    Args:
        started: what tells it from a later process of the same number; empty where the system does not say.
        since: when it took what it holds, seconds of ``time.time``.
    """

    pid: int
    host: str
    user: str
    started: str
    since: float

    @classmethod
    def me(cls) -> Holder:
        """This process, from now on."""
        pid = os.getpid()
        return cls(pid, socket.gethostname(), _name(os.geteuid()), started(pid), time.time())

    @classmethod
    def of(cls, pid: int) -> Holder:
        """A process of this host, since it began."""
        try:
            found = os.stat(f"/proc/{pid}")
            user, since = _name(found.st_uid), found.st_ctime
        except OSError:
            user, since = "an unknown user", time.time()
        return cls(pid, socket.gethostname(), user, started(pid), since)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Holder:
        """Raises TypeError for what is none."""
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this host."""
        return self.host == socket.gethostname()

    @property
    def is_running(self) -> bool:
        """Whether it is there; only its own host can say."""
        return is_running(self.pid) and started(self.pid) == self.started

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} of {self.user} on {self.host}, since {since}"


def is_running(pid: int) -> bool:
    """Whether this host has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def started(pid: int) -> str:
    """When a process of this host began, in ticks of its kernel; empty where that cannot be read."""
    return _stat(pid)[19] if _stat(pid) else ""


def is_stopped(pid: int) -> bool:
    """Whether a process of this host was stopped (Ctrl-Z, SIGSTOP) and will not go on by itself."""
    return _stat(pid)[:1] in (["T"], ["t"])


def _stat(pid: int) -> list[str]:
    """Linux's words on a process, from its state on; none where there are none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # a container's user may have no name
        return f"uid {uid}"
