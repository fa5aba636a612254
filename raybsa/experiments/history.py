"""What earlier runs of a search have answered already, read from its results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from raybsa.experiments.previews import PREVIEW, previewed
from raybsa.experiments.space import Config, SearchSpace
from raybsa.results.pareto import Objective
from raybsa.results.record import Measured, Record
from raybsa.spec import TrialSpec


class Answered(NamedTuple):
    """A finished trial of this search: its configuration, its question and its record."""

    config: Config
    spec: TrialSpec
    record: Record


def history(space: SearchSpace, records: Iterable[Record], previews: bool = False) -> list[Answered]:
    """The records that answer a question of ``space``, each question once (the last answer), in order.

    Args:
        previews: their previews too, whose configurations name the weights.
    """
    found: dict[str, Answered] = {}
    for record in records:
        if record.task != space.base.task or record.seq_len != space.base.seq_len:
            continue
        spec = TrialSpec.from_dict(json.loads(record.spec))
        if spec.weights is not None and not previews:
            continue
        config = space.config(previewed(spec))
        if config is not None:
            of = {} if spec.weights is None else {PREVIEW: spec.weights}
            found[record.spec_hash] = Answered(config | of, previewed(spec), record)
    return list(found.values())


def values_of(measured: Measured | None, objectives: Sequence[Objective]) -> list[float]:
    """The objectives as measured; NaN where one was not."""
    found = [None if measured is None else objective.value(measured) for objective in objectives]
    return [math.nan if value is None else float(value) for value in found]
