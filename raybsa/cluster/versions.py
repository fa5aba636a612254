"""All processes of one job run the same versions of what their results hang on; said at the start, not found later."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version

PACKAGES = ("ray", "torch")


class VersionMismatch(RuntimeError):
    """A worker's machine has other versions than the driver's."""


def versions() -> dict[str, str]:
    """This process's, by name; builds for other devices (``2.13.0+cpu``) count as the same."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python} | {name: version(name).partition("+")[0] for name in PACKAGES}


def require(wanted: Mapping[str, str]) -> None:
    """Raises VersionMismatch where this process's versions are not ``wanted``."""
    own = versions()
    other = [f"{name} {own.get(name)} instead of {value}" for name, value in wanted.items() if own.get(name) != value]
    if other:
        raise VersionMismatch(
            f"machine {platform.node()} has {', '.join(other)}: install the driver's constraints.txt on every machine"
        )
