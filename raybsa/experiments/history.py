"""What earlier runs of a search have answered already, read from its results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from raybsa.content import asked_now
from raybsa.experiments.previews import PREVIEW, previewed
from raybsa.experiments.space import Config, SearchSpace
from raybsa.results.pareto import Objective
from raybsa.results.record import MACHINE, QUESTION, Measured, Record, spec_of
from raybsa.spec import AttentionSpec, TrialSpec


class Answered(NamedTuple):
    """A finished trial of this search: its configuration, its question and its record."""

    config: Config
    spec: TrialSpec
    record: Record


def history(
    space: SearchSpace,
    records: Iterable[Record],
    previews: bool = False,
    pass_over: Callable[[str, str], None] = lambda trial_id, reason: None,
) -> list[Answered]:
    """The records that answer a question of ``space``, each question once (the last answer), in order. A trial that
    failed for the machine's reasons is no answer, nor one that failed for unknown ones, before it has done so twice.

    Args:
        previews: their previews too, whose configurations name the weights.
        pass_over: told the trial and the reason where a row's question cannot be read.
    """
    found: dict[str, Answered] = {}
    unknown: set[str] = set()
    for record in records:
        if record.task != space.base.task or record.seq_len != space.base.seq_len:
            continue
        try:
            spec = spec_of(record)
        except ValueError as error:
            pass_over(record.trial_id, str(error))
            continue
        if spec.weights is not None and not previews:
            continue
        config = space.config(previewed(spec))
        if config is not None and _is_answer(record, unknown):
            of = {} if spec.weights is None else {PREVIEW: spec.weights}
            found[record.spec_hash] = Answered(config | of, previewed(spec), record)
    return list(found.values())


def _is_answer(record: Record, unknown: set[str]) -> bool:
    """``unknown``: questions that failed once for reasons that nobody knows; rows of older versions tell none."""
    if record.status != "failed" or record.error_cause == QUESTION:
        return True
    again = record.spec_hash in unknown
    if record.error_cause != MACHINE:
        unknown.add(record.spec_hash)
    return again and record.error_cause != MACHINE


def asked_otherwise(space: SearchSpace, records: Iterable[Record]) -> int:
    """How many records answer a question of this search but for its content: they were asked with another text, data or
    own code, or before a question carried their digests."""
    return sum(_is_other_content(space, record) for record in records)


def _is_other_content(space: SearchSpace, record: Record) -> bool:
    if record.task != space.base.task or record.seq_len != space.base.seq_len:
        return False
    try:
        spec = previewed(spec_of(record))
    except ValueError:
        return False
    now = replace(spec, content=space.base.content, attention=tuple(map(_now, spec.attention)))
    return now != spec and space.config(now) is not None


def _now(attention: AttentionSpec) -> AttentionSpec:
    return asked_now(replace(attention, content=""))


def values_of(measured: Measured | None, objectives: Sequence[Objective]) -> list[float]:
    """The objectives as measured; NaN where one was not."""
    found = [None if measured is None else objective.value(measured) for objective in objectives]
    return [math.nan if value is None else float(value) for value in found]
