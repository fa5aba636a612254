"""Names of your own: ``module:attribute`` wherever a pattern, a codec, a task or a backend is named, and
``file.py:attribute`` for a search's own model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


def own(name: str, kind: str, known: Iterable[str]) -> Any:
    """What ``module:attribute`` stands for, imported now, from the Python path or else the current folder.

    Args:
        kind: what is named, for the error.
        known: the names that are not of your own.

    Raises:
        ValueError: no such module or attribute, a module that cannot be imported, or a name of another form.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"unknown {kind} {name!r}; there are {', '.join(known)}, or your own 'module:Name'")
    also_from(os.getcwd())
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        where = f"in {os.getcwd()} or on the Python path of this process"
        raise ValueError(f"{kind} {name!r} names a module that must lie {where}: {error}") from error
    except (ImportError, SyntaxError, AttributeError, ValueError) as error:
        raise ValueError(f"{kind} {name!r} must name something as 'module:Name': {error}") from error


def own_of_file(name: str, kind: str) -> Any:
    """What ``file.py:attribute`` stands for. The file is run where this process has not run it as it is now; what lies
    beside it can be imported, as under ``python file.py``.

    Raises:
        ValueError: no such file or attribute, a name of another form, or a file that is no Python or imports what
            is not there. What else the file itself raises goes through.
    """
    path, colon, attribute = name.rpartition(":")
    if not colon or not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"{kind} is named as 'file.py:name', a file that is there, got {name!r}")
    try:
        module = _run(path, Path(path).stat().st_mtime_ns)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"{kind} {name!r} cannot be imported: {error}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{kind} {name!r}: there is no {attribute!r} in {path}")
    return getattr(module, attribute)


def also_from(folder: str) -> None:
    """What lies in the folder can be imported, after all else."""
    if folder not in sys.path:
        sys.path.append(folder)


@lru_cache(maxsize=8)
def _run(path: str, changed_at: int) -> ModuleType:
    also_from(str(Path(path).resolve().parent))
    name = f"raybsa_own_{Path(path).stem}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
