"""The C++ kernels as a shared library, compiled for this machine at first use and cached for the next process.

Processes and threads may ask for it at one time: a process compiles once, and what it finds is whole (``cpp_cache``).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import threading
from functools import cache, partial
from pathlib import Path

from raybsa.kernels import cpp_cache

SOURCE = Path(__file__).parent / "cpp_source"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
_COMPILE_SECONDS = 120

_ONE_AT_A_TIME = threading.Lock()

logger = logging.getLogger(__name__)


def why_not() -> str | None:
    """Why there is no library and how to get one; None where there is one, which this may have to compile (seconds)."""
    found = _library()
    return found if isinstance(found, str) else None


def why_no_compiler(*, alone: bool = False) -> str | None:
    """What is missing where there is no C++ compiler (``$CXX``, by default g++); None where there is one.

    Args:
        alone: for torch's own compiler, which takes CXX for a program's name as it stands.
    """
    try:
        program, *arguments = _compiler()
    except ValueError as error:
        return f"needs a C++ compiler, and CXX is no command: {error}, got {os.environ['CXX']!r}"
    if alone and arguments:
        return f"needs a C++ compiler without arguments, got CXX={os.environ['CXX']!r}"
    if shutil.which(program) is not None:
        return None
    return f"needs a C++ compiler, and there is no {program!r} (install one or set CXX)"


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
        with _ONE_AT_A_TIME:  # a thread that waited here finds what the first one made
            return _load(compiler, f"attention-{_digest(compiler)}")
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ kernels could not be built: {error}"


def _load(compiler: list[str], name: str) -> ctypes.CDLL | str:
    """From the user's cache; where that cannot be written or run from, from a temporary folder of this user's."""
    reasons = []
    for folder in (cpp_cache.user_folder, cpp_cache.temporary_folder):
        try:
            found = folder()
            path = cpp_cache.find(found, name) or cpp_cache.save(found, name, partial(_compile, compiler))
            return ctypes.CDLL(str(path))
        except subprocess.CalledProcessError as error:  # also of a full disk
            reasons.append(f"{shlex.join(compiler)} cannot compile them: {error.stderr.strip()[:300]}")
        except OSError as error:
            reasons.append(str(error))
    return f"the C++ kernels could not be built: {'; '.join(reasons)} (XDG_CACHE_HOME says where they are cached)"


def _compiler() -> list[str]:
    """The command of ``$CXX``, as make reads it: a program, perhaps with arguments (``ccache g++``).

    Raises:
        ValueError: it has a quotation that does not end.
    """
    given = os.environ.get("CXX", "")
    return [given] if shutil.which(given) else shlex.split(given) or ["g++"]


def _compile(compiler: list[str], path: Path) -> None:
    logger.info("compiling %s with %s", path, shlex.join(compiler))
    _run([*compiler, *FLAGS, *(str(file) for file in sorted(SOURCE.glob("*.cpp"))), "-o", str(path)], _COMPILE_SECONDS)


def _run(command: list[str], seconds: float) -> str:
    """What a command prints, in whatever encoding: compilers speak the user's language."""
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds)
    return done.stdout


def _digest(compiler: list[str]) -> str:
    """Another one for other sources, flags, compilers and processors: a home folder may be shared by machines."""
    sources = (file.read_text("utf-8") for file in sorted(SOURCE.iterdir()))
    parts = [_run([*compiler, "--version"], 30), *compiler[1:], *FLAGS, _processor(), *sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What of the processor decides on its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(kept)])
