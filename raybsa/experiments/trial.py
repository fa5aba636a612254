"""run_trial: a question goes in, a Record comes out. The one verb of the platform."""

from __future__ import annotations

from raybsa.cluster.coordinator import Coordinator
from raybsa.cluster.ring_coordinator import RingCoordinator
from raybsa.experiments.keeping import keep
from raybsa.experiments.recording import Run, record_of
from raybsa.results.record import Record
from raybsa.results.store import Store
from raybsa.spec import TrialSpec


def run_trial(
    spec: TrialSpec,
    coordinator: Coordinator | RingCoordinator,
    run: Run,
    *,
    trial_id: str | None = None,
    store: Store | None = None,
) -> Record:
    """Asks ``coordinator`` the question and returns the answer, failed or not.

    Args:
        trial_id: the record's name; by default the run's id and the question's digest.
        store: where to write the record and its curves at once.
    """
    trial_id = trial_id or f"{run.run_id}-{spec.digest}"
    outcome = coordinator.run(spec)
    return record_of(outcome, run, trial_id) if store is None else keep(store, outcome, run, trial_id)
