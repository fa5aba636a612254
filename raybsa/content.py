"""Digests of what a question only names: files, a user's own code. Each is computed once in a process."""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from raybsa.own import also_from
from raybsa.spec import AttentionSpec, PatternSpec, stable_hash

_OURS = "raybsa"
_BLOCKS = "blocks"  # the pattern that names a file


@lru_cache
def file_digest(path: str) -> str:
    """16 hex digits of a file's bytes. Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@lru_cache
def code_digest(name: str) -> str:
    """16 hex digits of a user's own code, named as ``module:Name`` or ``file.py:name``: its file and what that imports
    from beside it, and so on. Empty where there is no such file: whoever runs it says so."""
    module = name.rpartition(":")[0]
    path = Path(module) if module.endswith(".py") else _file_of(module)
    if path is None or not path.is_file():
        return ""
    files = sorted(_with_imports(path.resolve(), path.resolve().parent, set()))
    return stable_hash([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def asked_now(attention: AttentionSpec) -> AttentionSpec:
    """The attention with the digest of what its pattern names: own code, a file of blocks. Others as they are."""
    digests = [] if attention.pattern is None else list(_named(attention.pattern))
    if not digests:
        return attention
    return AttentionSpec(**{**vars(attention), "content": stable_hash(digests)})


def _named(pattern: PatternSpec) -> Iterator[str]:
    if ":" in pattern.name:
        yield code_digest(pattern.name)
    path = pattern.params.get("path")
    if pattern.name == _BLOCKS and isinstance(path, str) and os.path.isfile(path):
        yield file_digest(path)
    for part in pattern.params.get("parts") or ():
        if isinstance(part, dict) and "name" in part:
            yield from _named(PatternSpec.from_dict(part))


def _file_of(module: str) -> Path | None:
    also_from(os.getcwd())
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin else None


def _with_imports(path: Path, root: Path, seen: set[Path]) -> set[Path]:
    """A file and those under ``root`` that it imports, as the text says, and that these import."""
    if path in seen:
        return seen
    seen.add(path)
    if path.suffix == ".py":
        for name in _imports(path):
            for found in _files_of(name, path.parent, root):
                _with_imports(found, root, seen)
    return seen


def _imports(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # running it will say so
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield from (f"{base}.{alias.name}".strip(".") for alias in node.names)


def _files_of(name: str, folder: Path, root: Path) -> Iterator[Path]:
    """The files that importing a dotted name runs, of those beside the importing file or under the root."""
    parts = name.split(".")
    if parts[0] == _OURS:
        return
    for place in dict.fromkeys((folder, root)):
        for count in range(1, len(parts) + 1):
            stem = place.joinpath(*parts[:count])
            yield from (file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file())
