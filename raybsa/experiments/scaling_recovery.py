"""One rank of a training is killed, and the others go on: the ``scaling`` suite's last measurement, where Ray is."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

from raybsa.cluster.faults import FaultKind, FaultPlace
from raybsa.experiments.drill_plan import Pair, question, steps_for
from raybsa.experiments.recording import Run, record_of, write
from raybsa.results.record import Measurement, Outcome
from raybsa.results.store import Store

PAIRS: tuple[Pair, ...] = ((FaultKind.SIGKILL, FaultPlace.BACKWARD_HOP),)
MOST_RANKS = 4


def kill_and_recover(store: Store, run: Run, gpus: int) -> str:
    """A training whose rank is killed in a backward hop, beside the same one in peace; what came of it, in a line.

    The trainings become rows of ``run``; where Ray is missing, a row says that nothing was run.

    Args:
        gpus: of this host; with two or more each rank has one, and another waits for a spare where there are three.
    """
    if find_spec("ray") is None:
        _write_refusal(store, run, "Ray is not installed")
        return "kill and recovery: not run, Ray is not installed"
    from raybsa.cluster.resources import Share
    from raybsa.experiments.drill import Drill
    from raybsa.experiments.drill_ring import Ring
    from raybsa.experiments.launch import cluster

    ranks = min(MOST_RANKS, gpus - 1 if gpus > 2 else 2)
    on_gpus = gpus >= 2
    ring = Ring(ranks, 0 if gpus == 2 else 1, share=Share(1, 1 if on_gpus else 0))
    with cluster(None, num_cpus=ranks + ring.spares + 2, deaths=False):
        (row,) = Drill(ring, store, run, seed=0).survive(PAIRS)
    if row.resumed_in_s is None or row.noticed_in_s is None:
        return f"kill and recovery: {row.fault} NEVER STRUCK"
    return (
        f"kill and recovery, {ranks} {'GPUs' if on_gpus else 'CPU ranks'}: noticed in {row.noticed_in_s:.3f} s, all "
        f"train again {row.resumed_in_s:.3f} s later ({row.filled}), {row.steps_lost} steps made again, final weights "
        f"{'equal' if row.equal else 'DIFFERENT'}"
    )


def _write_refusal(store: Store, run: Run, why: str) -> None:
    outcome = Outcome(question(steps_for(PAIRS), None), Measurement(), why, 0)
    write(store, replace(record_of(outcome, run, run.trial_id(0)), status="refused"), outcome)
