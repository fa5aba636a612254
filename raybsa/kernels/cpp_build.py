"""The C++ kernels as a shared library, compiled for this machine at first use and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parent / "cpp_source"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
_COMPILE_SECONDS = 120

logger = logging.getLogger(__name__)


def why_not() -> str | None:
    """Why there is no library and how to get one; None where there is one, which this may have to compile (seconds)."""
    found = _library()
    return found if isinstance(found, str) else None


def why_no_compiler() -> str | None:
    """What is missing where there is no C++ compiler (``$CXX``, by default g++); None where there is one."""
    if shutil.which(_compiler()) is not None:
        return None
    return f"needs a C++ compiler, and there is no {_compiler()!r} (install one or set CXX)"


def library() -> ctypes.CDLL:
    """The library. ``why_not`` must be None."""
    found = _library()
    assert isinstance(found, ctypes.CDLL), found
    return found


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none; asked once a process."""
    missing = why_no_compiler()
    if missing is not None:
        return missing
    compiler = _compiler()
    try:
        path = cache_folder() / f"attention-{_digest(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        return f"{compiler} cannot compile the C++ kernels: {error.stderr.strip()[:500]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the C++ kernels could not be built: {error} (XDG_CACHE_HOME says where they are kept)"


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/raybsa``, by default ``~/.cache/raybsa``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raybsa"


def _compile(compiler: str, path: Path) -> None:
    """Writes beside ``path`` and renames, so that processes which compile at one time do not meet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.info("compiling %s with %s", path, compiler)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        files = [str(file) for file in sorted(SOURCE.glob("*.cpp"))]
        command = [compiler, *FLAGS, *files, "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        made.replace(path)


def _digest(compiler: str) -> str:
    """Another one for other sources, flags, compilers and processors: a home folder may be shared by machines."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=30).stdout
    parts = [version, *FLAGS, _processor(), *(file.read_text() for file in sorted(SOURCE.iterdir()))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What of the processor decides on its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(kept)])
