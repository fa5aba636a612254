"""Where a job writes, which code it runs and how it ends. Needs no Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raybsa import signals
from raybsa.printable import printable
from raybsa.results.roots import is_uri, local_path

BAD_INPUT, FAILED = 2, 1  # exit codes; 2 is argparse's own


def absolute(option: str, path: str) -> str:
    """The path from the root, with ``~`` as a home folder; a URI as it is.

    Raises:
        ValueError: a URI with too few slashes, or a relative path in a submitted job, which runs in a temporary copy
            where the results would be lost.
    """
    if is_uri(path):
        return path
    from_here = local_path(path)
    if not os.path.isabs(os.path.expanduser(path)) and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ValueError(f"{option} must be absolute in a submitted job (it runs in a temporary copy), got {path!r}")
    return from_here


def git_commit(folder: Path) -> str:
    """The commit that ``folder`` is checked out at; empty without git or in an uploaded copy."""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout.strip().decode("ascii")
    except (OSError, subprocess.CalledProcessError):
        return ""


@contextmanager
def ending(code: int, *errors: type[Exception]) -> Iterator[None]:
    """One of ``errors`` inside ends the job with ``code`` and its words on stderr, without a traceback. Words that the
    output's encoding does not have are no error."""
    printable(sys.stdout)
    try:
        yield
    except errors as error:
        print(f"jobs/{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(code)


@contextmanager
def refusing(*more: type[Exception]) -> Iterator[None]:
    """What was asked for is made and checked inside, before anything starts: what is wrong with it ends the job with
    ``BAD_INPUT`` and one line on stderr.

    Args:
        more: errors beside ValueError, TypeError and OSError that tell of bad input.
    """
    bad: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, *more)
    with ending(BAD_INPUT, ValueError):
        try:
            yield
        except bad as error:
            raise ValueError(" ".join(str(error).split())) from error


@contextmanager
def interruptible(again: str) -> Iterator[None]:
    """Ctrl-C, SIGTERM or SIGHUP inside ends the job in order: one line on stderr that ends with ``again`` (how to go
    on), and the signal's exit code."""
    signals.listen()
    try:
        yield
    except KeyboardInterrupt:
        print(f"jobs/{Path(sys.argv[0]).name}: ended by {signals.heard().name}: {again}", file=sys.stderr)
        sys.exit(signals.exit_code())
