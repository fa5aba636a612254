"""Checks of a rule's parameters: each returns the value as the rule keeps it, or says what was wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def integer(name: str, value: Any, least: int = 1) -> int:
    """``value`` if it is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return value


def integers(name: str, value: Any, least: int = 1) -> tuple[int, ...]:
    """``value``, a non-empty list of integers of at least ``least``, as a tuple."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a non-empty list of integers, got {value!r}")
    return tuple(integer(f"{name}[{i}]", item, least) for i, item in enumerate(value))
