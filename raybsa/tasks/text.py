"""Real text as bytes, split into files to train on and files held out."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_HELD_OUT_ONE_IN = 10
_NOT_LIBRARY = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3")


@dataclass(frozen=True)
class Corpus:
    """Bytes (n,) uint8 each, on the CPU."""

    train: Tensor
    held_out: Tensor


@lru_cache(maxsize=2)
def load_corpus(path: str | None = None) -> Corpus:
    """The text under ``path``: every file of a folder that is not hidden, or one file.

    None takes the Python standard library's own sources (without its tests). A file is held out by a stable hash of its
    path relative to the folder, one in ten; where that leaves one side empty (a single file, a few files), the last
    tenth of all bytes is held out instead.

    Raises:
        ValueError: no such path, or a folder or file without text.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if path is None else Path(path)
    if not root.exists():
        raise ValueError(f"text must be a file or a folder, got {str(root)!r}, which does not exist")
    files = [root] if root.is_file() else _library(root) if path is None else _folder(root)
    texts = [(is_held_out(file.relative_to(root).as_posix()), file.read_bytes()) for file in files]
    train = b"".join(text for held_out, text in texts if not held_out)
    held_out = b"".join(text for held_out, text in texts if held_out)
    if not train and not held_out:
        raise ValueError(
            f"text must hold some bytes, got {str(root)!r} with {len(files)} files that are empty or hidden"
        )
    if not train or not held_out:
        whole = train + held_out
        cut = len(whole) - len(whole) // _HELD_OUT_ONE_IN
        train, held_out = whole[:cut], whole[cut:]
    return Corpus(_bytes(train), _bytes(held_out))


def is_held_out(relative_path: str) -> bool:
    """Whether a file is for evaluation: the same on every machine."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def _library(root: Path) -> list[Path]:
    return [file for file in _folder(root) if file.suffix == ".py"]


def _folder(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _NOT_LIBRARY and not name.startswith("."))
        found += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return [file for file in found if file.is_file()]


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
