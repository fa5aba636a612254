"""A page as a file that bears our mark: its last line has the digest of all before it, so that no other is replaced."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from raybsa.results.marked import is_marked, marked
from raybsa.results.whole import write_whole


def write_page(page: str, out: str) -> str:
    """Writes a page, whole or not at all; missing folders are made. Returns its absolute path.

    Raises:
        FileExistsError: there is a file that is no page of ours, or one that was changed since.
        OSError: it cannot be written.
    """
    path = os.path.abspath(out)
    if not is_free(path):
        raise FileExistsError(f"{path} is no page that raybsa wrote, so it stays: name another file with --out")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_whole(path, marked(page.encode()))
    except OSError as error:
        raise OSError(f"the page could not be written to {path!r}: {error.strerror or error}") from error
    return path


def free_path(path: str) -> str:
    """``path``, or the first of ``path-2``, ``path-3``, … (before its ending) where nothing of somebody else's lies."""
    stem, ending = os.path.splitext(path)
    others = (f"{stem}-{number}{ending}" for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if is_free(name))


def is_free(path: str) -> bool:
    """Whether a page may be written there: nothing is there, or a page of ours, unchanged."""
    if not os.path.lexists(path):
        return True
    return os.path.isfile(path) and is_marked(Path(path).read_bytes())
