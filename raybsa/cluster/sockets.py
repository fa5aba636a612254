"""Room for Ray's sockets: a socket's path holds 107 bytes, and temporary folders may be long (Slurm's are)."""

from __future__ import annotations

import os

_MOST = 107
_SESSION = "session_2026-12-01_23-59-59_999999_{}/sockets/plasma_store"
_LARGEST_PID = 4_194_304


def require_room(folder: str, pid: int = _LARGEST_PID) -> None:
    """Checks that a Ray head can have its sockets under ``folder``.

    Args:
        pid: of the process that starts the head.

    Raises:
        ValueError: their paths would be too long; the message says what helps.
    """
    path = os.path.join(os.path.abspath(folder), _SESSION.format(pid))
    if (length := len(os.fsencode(path))) > _MOST:
        raise ValueError(
            f"Ray keeps its sockets under {folder}, where the path of one has {length} bytes and may have {_MOST}: "
            "export RAY_TMPDIR=/tmp, or another short folder of this machine"
        )
