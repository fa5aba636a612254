"""A page as a file that bears our mark: its last line has the digest of all before it, so that no other is replaced."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from pathlib import Path

from raybsa.results.whole import write_whole

_MARK = re.compile(rb"<!-- raybsa page ([0-9a-f]{64}) -->\n?\Z")


def write_page(page: str, out: str) -> str:
    """Writes a page, whole or not at all; missing folders are made. Returns its absolute path.

    Raises:
        FileExistsError: there is a file that is no page of ours, or one that was changed since.
        OSError: it cannot be written.
    """
    path = os.path.abspath(out)
    if not is_free(path):
        raise FileExistsError(f"{path} is no page that raybsa wrote, so it stays: name another file with --out")
    content = page.encode()
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_whole(path, content + f"<!-- raybsa page {hashlib.sha256(content).hexdigest()} -->\n".encode())
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
    return os.path.isfile(path) and is_page(Path(path).read_bytes())


def is_page(content: bytes) -> bool:
    """Whether a file's content is a page as it was written."""
    mark = _MARK.search(content)
    return mark is not None and mark[1].decode() == hashlib.sha256(content[: mark.start()]).hexdigest()
