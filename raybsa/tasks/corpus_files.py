"""Which files of a folder are text to train on, and which are left out, and why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from raybsa.results.marked import is_marked, own_files

_NOT_TEXT = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3")
_LOOKED_AT = 8192  # bytes; a zero among them tells of what is no text, as git has it


@dataclass
class CorpusFiles:
    """The text files under a folder, in the order of their names; links are followed, each folder once.

    Hidden and binary files, what jobs wrote, and folders of installed packages, caches and tests are left out; names
    without the ``ending`` too, of which nothing is told.
    """

    root: Path
    ending: str = ""
    skipped: Counter[str] = field(default_factory=Counter)
    followed: int = 0

    def read(self) -> Iterator[tuple[Path, bytes]]:
        """(path relative to the root, content) of each."""
        yield from self._folder(self.root, set(), set())

    def __str__(self) -> str:
        """What was left out and which links were followed; empty where there is nothing to tell."""
        told = [f"{count} {what}" for what, count in self.skipped.most_common()]
        links = [f"{self.followed} links followed"] if self.followed else []
        return "; ".join([*links, *([f"left out: {', '.join(told)}"] if told else [])])

    def _folder(self, folder: Path, seen: set[tuple[int, int]], ours: set[Path]) -> Iterator[tuple[Path, bytes]]:
        identity = folder.stat()
        if (identity.st_dev, identity.st_ino) in seen:
            self.skipped["links to folders that were read"] += 1
            return
        seen.add((identity.st_dev, identity.st_ino))
        ours.update(own_files(folder))
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        kept = [entry for entry in entries if not self._is_left_out(entry, ours)]
        for entry in kept:
            if entry.is_file() and (content := self._content(entry.path)) is not None:
                self.followed += entry.is_symlink()
                yield Path(entry.path).relative_to(self.root), content
        for entry in kept:
            if entry.is_dir():
                self.followed += entry.is_symlink()
                yield from self._folder(Path(entry.path), seen, ours)

    def _is_left_out(self, entry: os.DirEntry[str], ours: set[Path]) -> bool:
        """Counted by its reason, where there is one to tell."""
        if entry.is_file() and not entry.name.endswith(self.ending):
            return True
        reason = self._why_not(entry, ours)
        self.skipped.update([reason] if reason else [])
        return reason is not None

    def _why_not(self, entry: os.DirEntry[str], ours: set[Path]) -> str | None:
        if entry.name.startswith("."):
            return "hidden"
        if ours and Path(entry.path) in ours:
            return "of results"
        if entry.is_dir():
            if entry.name in _NOT_TEXT:
                return f"folders {entry.name}"
            return None if os.access(entry.path, os.R_OK | os.X_OK) else "that may not be read"
        if not entry.is_file():
            return "links to nothing" if entry.is_symlink() else "devices and pipes"
        return None

    def _content(self, path: str) -> bytes | None:
        """The text of a file; None where it is left out, counted by its reason."""
        try:
            with open(path, "rb") as file:
                content = file.read()
        except (PermissionError, FileNotFoundError):
            self.skipped["that may not be read"] += 1
            return None
        reason = "binary" if b"\0" in content[:_LOOKED_AT] else "of results" if is_marked(content) else None
        self.skipped.update([reason] if reason else [])
        return None if reason else content
