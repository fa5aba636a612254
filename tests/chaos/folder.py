"""The results folder of a scenario: what the user put there, what must stay, and the disk that it is on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from raybsa.results.record import Record
from raybsa.results.store import Store

USERS = {
    "notes.txt": b"mine",
    "front/index.html": b"<p>a web front end",
    "report.html": b"<p>my report",
    "records.txt": b"",
}


class Results:
    """A folder with files of the user's, and the trials that were ever seen in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: dict[str, Record] = {}
        self.plant()

    def plant(self) -> None:
        for name, content in USERS.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(content)

    def look(self) -> list[Record]:
        """The records by now. None that was seen before is lost or changed, and nothing of the user's is."""
        records = {record.trial_id: record for record in Store(str(self.root)).read_records()}
        lost = {trial for trial, record in self.seen.items() if records.get(trial) != record}
        assert not lost, f"trials that were there are lost or changed: {sorted(lost)}"
        self.seen |= records
        changed = [name for name, content in USERS.items() if (self.root / name).read_bytes() != content]
        assert not changed, f"files of the user's were touched: {changed}"
        return list(records.values())

    def must_be_complete(self, count: int) -> None:
        """So many questions are answered, none twice, and nothing half-written stays."""
        records = self.look()
        answered = [record.spec_hash for record in records if record.status == "ok"]
        assert len(answered) == len(set(answered)), "a question was asked twice"
        assert len(answered) == count, f"{count} answers were wanted, got {[(r.trial_id, r.error) for r in records]}"
        half = [path for path in self.root.rglob("*.tmp*") if path.is_file()]
        assert not half, f"half-written files stay: {half}"

    def digest(self) -> str:
        """Of all that lies in it."""
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()


@contextlib.contextmanager
def small_disk(folder: Path, kib: int = 8192) -> Iterator[Path]:
    """A disk of its own, where this process may mount one. Raises PermissionError where it may not."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        raise PermissionError(f"a small disk needs root: {mounted.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def fill(disk: Path) -> None:
    """Takes all the room that is left."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), (disk / "filler-2").open("wb", buffering=0) as file:
        while True:
            file.write(b"\0")


def make_room(disk: Path) -> None:
    for name in ("filler", "filler-2"):
        (disk / name).unlink(missing_ok=True)


def remount(disk: Path, how: str) -> None:
    """``ro`` or ``rw``."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def damage(file: Path, how: str) -> None:
    """Cuts a file short, empties it or flips a byte in its middle."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    if how == "flipped":
        content[4 + middle % 64] ^= 0xFF
    kept = {"cut": content[:middle], "empty": b"", "flipped": content}[how]
    temporary = file.with_suffix(".damaged")
    temporary.write_bytes(bytes(kept))
    os.replace(temporary, file)
