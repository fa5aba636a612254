"""Real text as bytes, split into files to train on and files held out."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from raybsa.spec import stable_hash
from raybsa.tasks.corpus_files import CorpusFiles

_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Corpus:
    """Bytes (n,) uint8 each, on the CPU; ``told``: a line on which files they are of, and which were left out."""

    train: Tensor
    held_out: Tensor
    told: str = ""

    @cached_property
    def digest(self) -> str:
        """16 hex digits, equal for equal bytes on each side."""
        parts = [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in (self.train, self.held_out)]
        return stable_hash(parts)


@lru_cache(maxsize=2)
def load_corpus(path: str | None = None) -> Corpus:
    """The text under ``path``: the files of a folder that ``CorpusFiles`` takes, or one file, whatever it holds.

    None takes the Python standard library's own sources (without its tests). A file is held out by a stable hash of its
    path relative to the folder, one in ten; where that leaves one side empty (a single file, a few files), the last
    tenth of all bytes is held out instead.

    Raises:
        ValueError: no such path, or a folder or file without text.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if path is None else Path(path)
    if not root.exists():
        raise ValueError(f"text must be a file or a folder, got {str(root)!r}, which does not exist")
    files = CorpusFiles(root, ".py" if path is None else "")
    read = [(Path(), root.read_bytes())] if root.is_file() else list(files.read())
    texts = [(is_held_out(file.as_posix()), text) for file, text in read]
    train = b"".join(text for held_out, text in texts if not held_out)
    held_out = b"".join(text for held_out, text in texts if held_out)
    told = f"text: {len(read):,} files, {len(train) + len(held_out):,} bytes under {_printable(root)}; {files}"
    if not train and not held_out:
        raise ValueError(f"text must hold some bytes, got {_printable(root)!r} with {len(read)} empty files; {files}")
    if not train or not held_out:
        whole = train + held_out
        cut = len(whole) - len(whole) // _HELD_OUT_ONE_IN
        train, held_out = whole[:cut], whole[cut:]
    return Corpus(_bytes(train), _bytes(held_out), told.removesuffix("; "))


def is_held_out(relative_path: str) -> bool:
    """Whether a file is for evaluation: the same on every machine."""
    digest = hashlib.sha256(os.fsencode(relative_path)).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def _printable(path: Path) -> str:
    """A name whose bytes are no UTF-8 in escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
