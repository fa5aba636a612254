"""keep: what is done with a trial's outcome on Ray, whoever asked: its row is written and a metric counts it."""

from __future__ import annotations

from raybsa.cluster.metrics import count_trial
from raybsa.experiments.recording import Run, record_of, write
from raybsa.results.record import Outcome, Record
from raybsa.results.store import Store


def keep(store: Store, outcome: Outcome, run: Run, trial_id: str) -> Record:
    """Writes the outcome's row and curves; returns the row."""
    record = record_of(outcome, run, trial_id)
    write(store, record, outcome)
    count_trial(record)
    return record
