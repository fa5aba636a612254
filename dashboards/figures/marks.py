"""Marks that tell lines of one colour apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Mark(NamedTuple):
    """A line's symbol and the dash of its forecast, as Plotly names them and as text."""

    symbol: str
    point: str
    dash: str
    dashes: str

    def beside(self, name: str, *, points: bool = True) -> str:
        """The name with the mark before it, where one is needed: the point, or the dashes of a line without points."""
        mark = self.point if points else self.dashes
        return f"{mark} {name}" if mark else name


MARKS = (
    Mark("circle", "●", "dash", "– –"),
    Mark("square", "■", "dashdot", "–·–"),
    Mark("triangle-up", "▲", "longdash", "— —"),
    Mark("triangle-down", "▼", "longdashdot", "—·—"),
    Mark("star", "★", "2px,6px", "· · ·"),
    Mark("x", "✕", "16px,3px", "━ ━"),
)
ALONE = MARKS[0]._replace(point="", dashes="")


def marks(shades: Sequence[str]) -> list[Mark]:
    """A mark for each line, given the lines' colours; one that is alone in its colour has no mark before its name."""
    lines, seen = Counter(shades), Counter[str]()
    found = []
    for shade in shades:
        found.append(MARKS[seen[shade] % len(MARKS)] if lines[shade] > 1 else ALONE)
        seen[shade] += 1
    return found
