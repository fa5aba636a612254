"""Names of your own: ``module:attribute`` wherever a pattern, a codec, a task or a backend is named."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any


def own(name: str, kind: str, known: Iterable[str]) -> Any:
    """What ``module:attribute`` stands for, imported now.

    Args:
        kind: what is named, for the error.
        known: the names that are not of your own.

    Raises:
        ValueError: no such module or attribute, or a name of another form.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"unknown {kind} {name!r}; there are {', '.join(known)}, or your own 'module:Name'")
    try:
        return getattr(import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise ValueError(f"{kind} {name!r} must name something as 'module:Name': {error}") from error
