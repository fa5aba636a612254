"""A folder of small files that several processes make and take away, each in one step."""

from __future__ import annotations

import os
import time
import uuid

from pyarrow import fs


class SharedFolder:
    """Local, where making and taking away happen once for all processes; elsewhere as well as the store can.

    Args:
        filesystem: of the results.
        path: on it; made when first written to.
        is_local: whether it is this host's own.
    """

    def __init__(self, filesystem: fs.FileSystem, path: str, is_local: bool) -> None:
        self._fs, self._path, self._is_local = filesystem, path, is_local

    def create(self, name: str, data: bytes) -> bool:
        """Makes a file; False where there is one already."""
        self._fs.create_dir(self._path, recursive=True)
        path = f"{self._path}/{name}"
        if not self._is_local:
            if self._fs.get_file_info(path).type != fs.FileType.NotFound:
                return False
            self._write(path, data)
            return True
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(file, "wb") as opened:
            opened.write(data)
        return True

    def take_away(self, name: str) -> bool:
        """Deletes a file; False where another process did."""
        path = f"{self._path}/{name}"
        try:
            if self._is_local:  # of several renames of one file one succeeds
                taken = f"{self._path}/.{uuid.uuid4().hex}"
                os.rename(path, taken)
                os.unlink(taken)
            else:
                self._fs.delete_file(path)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> bytes:
        """Raises OSError where there is none."""
        with self._fs.open_input_file(f"{self._path}/{name}") as source:
            return source.read()

    def names(self) -> list[str]:
        entries = self._fs.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        return sorted(entry.base_name for entry in entries if not entry.base_name.startswith("."))

    def touch(self, name: str) -> None:
        """Makes a file young again."""
        if self._is_local:
            os.utime(f"{self._path}/{name}")
        else:
            self._write(f"{self._path}/{name}", self.read(name))

    def age_s(self, name: str) -> float:
        """Seconds since it was written or touched; without end where it is gone."""
        written = self._fs.get_file_info(f"{self._path}/{name}").mtime_ns
        return float("inf") if written is None else time.time() - written / 1e9

    def stamp(self) -> object:
        """Differs once a file came or went."""
        return os.stat(self._path).st_mtime_ns if self._is_local else tuple(self.names())

    def _write(self, path: str, data: bytes) -> None:
        with self._fs.open_output_stream(path) as stream:
            stream.write(data)
