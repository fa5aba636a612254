"""From a trial's outcome to its row: what every job adds to what was measured. Needs no Ray."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from raybsa.events import Events
from raybsa.results.record import Outcome, Record, SeriesPoint
from raybsa.results.store import Store
from raybsa.spec import UNTRAINED, canonical_json


@dataclass(frozen=True)
class Run:
    """One execution of a job: what all of its records share.

    Args:
        run_id: names the run in every record; ``Run.start`` makes one.
        job: the job's name.
        git_commit: of the code that runs; passed in, because an uploaded copy has no ``.git``.
    """

    run_id: str
    job: str
    git_commit: str = ""

    @classmethod
    def start(cls, job: str, git_commit: str = "") -> Run:
        return cls(f"{job}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}", job, git_commit)

    def trial_id(self, number: int) -> str:
        """The name of this run's trial of that number."""
        return f"{self.run_id}-{number:03d}"

    def labels(self, number: int) -> dict[str, str]:
        """What the events and metrics of that trial say of where they come from."""
        return {"run": self.run_id, "trial": self.trial_id(number)}


def write(store: Store, record: Record, outcome: Outcome) -> None:
    """The curves first: a record that can be read has them."""
    measured = outcome.measurement
    curves = [(name, step, 0, value) for name, step, value in measured.curves] if measured else []
    curves += measured.rank_curves if measured else ()
    store.write_series(SeriesPoint(record.trial_id, *point) for point in curves)
    store.write_record(record)
    announce(record)


def announce(record: Record) -> None:
    """Tells that a trial has ended."""
    Events(__name__, run=record.run_id, trial=record.trial_id).tell(
        "trial",
        job=record.job,
        status=record.status,
        pattern=record.pattern,
        density=record.density,
        quality=record.quality,
        milliseconds=record.forward_backward_ms_p50,
        seconds=record.worker_seconds,
        error=record.error,
    )


def record_of(outcome: Outcome, run: Run, trial_id: str) -> Record:
    """The row of a trial: what was asked, who asked, and what came."""
    spec, measured = outcome.spec, {}
    if outcome.measurement is not None:
        measured = asdict(outcome.measurement)
        del measured["curves"], measured["rank_curves"]
    first = spec.layer(0)
    return Record(
        trial_id=trial_id,
        run_id=run.run_id,
        job=run.job,
        created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        status="failed" if outcome.error else "pruned" if outcome.pruned else "ok",
        error=outcome.error or outcome.pruned,
        spec=canonical_json(spec.to_dict()),
        spec_hash=spec.digest,
        seed=spec.seed,
        task=spec.task,
        variant="/".join(dict.fromkeys(layer.variant for layer in spec.attention)),
        pattern="/".join(layer.pattern.name if layer.pattern else layer.variant for layer in spec.attention),
        block_size=first.block_size,
        seq_len=spec.seq_len,
        train_len=None if spec.task in UNTRAINED else spec.train_len,
        batch=spec.batch,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        causal=spec.causal,
        dtype=spec.dtype,
        backend=first.backend,
        failures_survived=outcome.failures,
        ray_version=_version("ray"),
        raybsa_version=_version("raybsa"),
        git_commit=run.git_commit,
        error_cause=outcome.cause,
        **measured,
    )


def _version(package: str) -> str:
    """Empty where it is not installed: raybsa run from an uploaded copy, a machine without Ray."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
