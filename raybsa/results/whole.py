"""Files that appear whole or not at all, and what a killed writer left half-written."""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from pathlib import Path

from raybsa.holder import is_running

_TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")
_ABANDONED_S = 3600.0  # no write takes so long: of a writer on another host that is all we can know


def write_whole(path: str, data: bytes) -> None:
    """Writes a local file under a temporary name beside it and renames that."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def tidy(folder: str) -> None:
    """Deletes the temporary files of writers that are no more."""
    for file in Path(folder).glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(file.name)
        if match and _is_abandoned(file, int(match["pid"])):
            file.unlink(missing_ok=True)


def _is_abandoned(file: Path, pid: int) -> bool:
    if f".{socket.gethostname()}.{pid}." in file.name:
        return not is_running(pid)
    try:
        return time.time() - file.stat().st_mtime > _ABANDONED_S
    except FileNotFoundError:
        return False
