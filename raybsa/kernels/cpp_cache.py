"""Where compiled code is cached between processes: written whole, and checked before anything loads it.

The name of a file ends in the hash of its content. So one rename publishes both, processes that compile at one time do
not meet, and what was cut short or altered is not what its name says.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

SUFFIX = ".so"


def user_folder() -> Path:
    """``$XDG_CACHE_HOME/raybsa``, by default ``~/.cache/raybsa``; it need not exist.

    Raises:
        FileNotFoundError: the user has no home folder, and XDG_CACHE_HOME names no absolute one.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # then it does not count, says the XDG specification
        try:
            cache = Path.home() / ".cache"
        except RuntimeError as error:
            raise FileNotFoundError(f"uid {os.geteuid()} has no home folder") from error
    if not cache.is_absolute():
        raise FileNotFoundError(f"HOME must be an absolute path, got {os.environ.get('HOME')!r}")
    return cache / "raybsa"


def temporary_folder() -> Path:
    """A folder of this user's alone under the system's temporary one, for whom ``user_folder`` does not serve.

    Raises:
        OSError: it cannot be made, or the one that is there belongs to another user or lets others in: code from it is
            not to be trusted.
    """
    folder = Path(tempfile.gettempdir()) / f"raybsa-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(
            f"{folder} must be a folder of uid {os.geteuid()} that no other may enter (mode 700), got "
            f"{stat.filemode(found.st_mode)} of uid {found.st_uid}"
        )
    return folder


def find(folder: Path, name: str) -> Path | None:
    """A whole file that ``save`` wrote under this name, by this user or by root; None where there is none."""
    return next((path for path in sorted(folder.glob(f"{name}-*{SUFFIX}")) if _is_whole(path, name)), None)


def save(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Has ``make(path)`` write a file, and saves it under the name, on the disk before it can be found.

    Raises:
        OSError: the folder cannot be written to, or its disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        made = Path(inside) / f"made{SUFFIX}"
        make(made)
        _sync(made)
        path = made.replace(folder / f"{name}-{_hash(made)}{SUFFIX}")
    _sync(folder)
    return path


def _is_whole(path: Path, name: str) -> bool:
    try:
        return path.stat().st_uid in (0, os.geteuid()) and path.name == f"{name}-{_hash(path)}{SUFFIX}"
    except OSError:  # it went away, or may not be read
        return False


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
