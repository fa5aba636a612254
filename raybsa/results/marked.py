"""Our marks on files: the last line of a page, and what in a folder of results is ours."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

MARK, MADE = ".raybsa/results", ".raybsa/made"  # in a results folder
_PAGE = re.compile(rb"<!-- raybsa page ([0-9a-f]{64}) -->\n?\Z")
_ROWS = ("records", "series", "checkpoints", "weights", "profile")
_BEFORE_MARKS = ("front", "report.html", "validation.json", "forecast.html")


def marked(page: bytes) -> bytes:
    """A page with the digest of itself in its last line."""
    return page + f"<!-- raybsa page {hashlib.sha256(page).hexdigest()} -->\n".encode()


def is_marked(content: bytes) -> bool:
    """Whether a file's content is a page as it was written."""
    mark = _PAGE.search(content, max(0, len(content) - 128))
    return mark is not None and mark[1].decode() == hashlib.sha256(content[: mark.start()]).hexdigest()


def own_files(folder: Path) -> list[Path]:
    """The files and folders in a local folder of results that jobs wrote, pages aside; none in any other folder."""
    if (folder / MARK).is_file():
        made = folder / MADE
        return [folder / name for name in _ROWS] + [
            folder / mark.relative_to(made) for mark in made.rglob("*") if mark.is_file()
        ]
    if (folder / "series").is_dir() and any((folder / "records").glob("*.parquet")):
        return [folder / name for name in (*_ROWS, *_BEFORE_MARKS)]
    return []
