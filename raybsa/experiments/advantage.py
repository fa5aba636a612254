"""What the search was worth: its fastest pattern beside the fastest reference, both as good as dense attention."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from raybsa.results.pareto import FORWARD_LATENCY, LATENCY, Objective
from raybsa.results.record import Record
from raybsa.spec import DENSE

TOLERANCE = 0.005  # of the dense quality: as good


def advantage(records: Sequence[Record], tolerance: float = TOLERANCE) -> Iterator[str]:
    """A line a direction (forward with backward, forward alone); none without references or a dense baseline.

    A reference is an attention that was asked as it is, without a density. Taken are trials whose quality is at most
    the share ``tolerance`` worse than the dense baseline's.
    """
    whole = [record for record in records if record.status == "ok" and record.quality is not None]
    dense = next((record for record in whole if record.variant == DENSE), None)
    references = {record.trial_id for record in whole if _is_reference(record)}
    if dense is None or not references:
        return
    good = [record for record in whole if record is not dense and _as_good(record, dense, tolerance)]
    for objective in (LATENCY, FORWARD_LATENCY):
        found = _fastest([record for record in good if record.trial_id not in references], objective)
        given = _fastest([record for record in good if record.trial_id in references], objective)
        start = f"within {tolerance:.1%} of dense, {objective.name.replace('_', ' ')}: "
        if found is None or given is None:
            yield start + ("no pattern was found" if found is None else "no reference")
            continue
        ratio = _value(given, objective) / _value(found, objective)
        yield f"{start}found {_words(found, objective)}, best reference {_words(given, objective)}: {ratio:.2f} times"


def _is_reference(record: Record) -> bool:
    layers = json.loads(record.spec)["attention"]
    return record.variant != DENSE and all(layer["density"] is None for layer in layers)


def _as_good(record: Record, dense: Record, tolerance: float) -> bool:
    assert record.quality is not None
    assert dense.quality is not None
    worse = record.quality - dense.quality if dense.quality_goal == "min" else dense.quality - record.quality
    return worse <= tolerance * abs(dense.quality)


def _fastest(records: Sequence[Record], objective: Objective) -> Record | None:
    timed = [record for record in records if objective.value(record) is not None]
    return min(timed, key=lambda record: _value(record, objective), default=None)


def _value(record: Record, objective: Objective) -> float:
    value = objective.value(record)
    assert value is not None
    return value


def _words(record: Record, objective: Objective) -> str:
    return f"{record.pattern} {record.density:.1%} ({_value(record, objective):.4g} ms, {record.quality:.4f})"
