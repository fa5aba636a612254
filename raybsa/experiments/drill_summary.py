"""What a drill found, a line a kind of fault: seconds until it was noticed and until all trained, median and worst."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from raybsa.cluster.faults import Fault, FaultKind, FaultPlace
from raybsa.experiments.drill import Survived

STRUCK_AGAIN = "struck again while recovering"
HEAD = f"{'kind, seconds: median (worst)':36s}{'faults':>8s}{'noticed':>18s}{'again, a spare':>18s}{'again, else':>18s}"


class KindSummary(NamedTuple):
    """Faults of one kind that struck.

    Args:
        what: the kind; recoveries in which a second fault struck are one of their own.
        faults: how many.
        noticed: seconds from the blow to the coordinator's knowing.
        with_spare, otherwise: seconds from then until all ranks could train again, by how the ring was filled.
    """

    what: str
    faults: int
    noticed: Sequence[float]
    with_spare: Sequence[float]
    otherwise: Sequence[float]


def summaries(rows: Iterable[Survived]) -> list[KindSummary]:
    """One of each kind in the order in which they come; the recoveries that were struck again last."""
    groups: dict[str, list[Survived]] = defaultdict(list)
    for row in rows:
        if row.resumed_in_s is not None and not row.struck_again:
            groups[STRUCK_AGAIN if _struck_a_recovery(row.fault) else str(row.fault.kind)].append(row)
    return sorted((_of(*group) for group in groups.items()), key=lambda summary: summary.what == STRUCK_AGAIN)


def line_of(summary: KindSummary) -> str:
    noticed, spare, otherwise = map(_words, (summary.noticed, summary.with_spare, summary.otherwise))
    return f"{summary.what:36s}{summary.faults:>8d}{noticed:>18s}{spare:>18s}{otherwise:>18s}"


def verdict(rows: Sequence[Survived]) -> str:
    """How many faults ended as wanted; those that only begin a recovery for the next to strike in are told apart."""
    asked, others = ([row.good for row in rows if row.struck_again is again] for again in (False, True))
    began = f" ({sum(others)} of {len(others)} beside them, which began a recovery to strike in)" if others else ""
    return f"{sum(asked)} of {len(asked)} faults as wanted{began}"


def _struck_a_recovery(fault: Fault) -> bool:
    """The driver's death is another matter: there is no recovery then that goes on."""
    return fault.place is FaultPlace.RECOVERY and fault.kind is not FaultKind.DRIVER


def _of(what: str, rows: Sequence[Survived]) -> KindSummary:
    again = {True: list[float](), False: list[float]()}
    for row in rows:
        again[row.filled == "spare"].append(row.resumed_in_s or 0.0)
    noticed = [row.noticed_in_s for row in rows if row.noticed_in_s is not None]
    return KindSummary(what, len(rows), noticed, again[True], again[False])


def _words(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({max(seconds):.3f})" if seconds else "-"
