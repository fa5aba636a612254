"""The parameters that only one task knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raybsa.spec import TrialSpec


def known_params(spec: TrialSpec, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``task_params`` over their defaults; raises ValueError for one that the task does not know."""
    unknown = set(spec.task_params) - set(defaults)
    if unknown:
        raise ValueError(f"task {spec.task!r} knows the parameters {sorted(defaults)}, got also {sorted(unknown)}")
    return {**defaults, **spec.task_params}


def require_same(spec: TrialSpec, kind: str, now: str, what: str) -> None:
    """Raises ValueError where the question was asked about another content than is there ``now``."""
    then = spec.content.get(kind, now)
    if then != now:
        raise ValueError(
            f"{what} has changed since the question was asked (digest {then} then, {now} now): it is another question"
        )
