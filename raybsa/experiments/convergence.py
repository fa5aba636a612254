"""How fast do searches come to their fronts? Several results folders of one question, side by side.

    python -m raybsa.experiments.convergence results/tpe results/random --objectives quality,latency
    python -m raybsa.experiments.convergence results/recall-* --objectives 'quality>=0.95,density'

A line a folder: its trials (and how many of them were stopped early), the first trial that keeps all bounds, seconds
of workers, what a trial costs beside its own work, and the hypervolume of the front, on one scale for all folders. Then
the worker-seconds and the training steps that the first folder and each other one needed to the hypervolume that both
come to: seconds count waits for neighbours too, steps are the same on any machine but leave out all else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, pairwise
from statistics import median

from raybsa.printable import printable
from raybsa.results.hypervolume import Scale
from raybsa.results.pareto import Objective, named_objectives, pareto_front
from raybsa.results.record import Record
from raybsa.results.store import Store

_REACHED = 0.99  # of a hypervolume: times are measured, so the last percent is noise


@dataclass(frozen=True)
class Course:
    """One search in the order in which its trials ended: worker-seconds, training steps and hypervolume after each."""

    name: str
    records: Sequence[Record]
    seconds: list[float]
    steps: list[int]
    volumes: list[float]

    def spent_to(self, volume: float) -> tuple[float, int] | None:
        """Worker-seconds and training steps until the front had this hypervolume; None where it never had."""
        courses = zip(self.seconds, self.steps, self.volumes, strict=True)
        return next(((seconds, steps) for seconds, steps, reached in courses if reached >= volume), None)

    def trials_to(self, objectives: Sequence[Objective]) -> int | None:
        """Trials until one kept all bounds, this one included; None where none did."""
        kept = (n for n, record in enumerate(self.records, 1) if pareto_front([record], objectives))
        return next(kept, None)


def course(name: str, records: Sequence[Record], scale: Scale) -> Course:
    """The course of a search's ``records``, in the order in which they ended."""
    seconds = list(accumulate((record.worker_seconds or 0.0) * (record.world_size or 1) for record in records))
    steps = list(accumulate(record.trained_steps or 0 for record in records))
    volumes = [scale.volume(records[:count]) for count in range(1, len(records) + 1)]
    return Course(name, records, seconds, steps, volumes)


def fixed_seconds(records: Sequence[Record]) -> float | None:
    """Median seconds between the ends of two trials beyond the later one's own work, of a search with one worker; None
    where trials overlapped or are too few."""
    gaps = [
        _ended(later) - _ended(earlier) - (later.worker_seconds or 0.0)
        for earlier, later in pairwise(records)
        if earlier.run_id == later.run_id
    ]
    return median(gaps) if gaps and min(gaps) >= 0 else None


def _ended(record: Record) -> float:
    return datetime.fromisoformat(record.created_at).timestamp()


def table(courses: Sequence[Course], objectives: Sequence[Objective]) -> list[str]:
    """The lines to print."""
    lines = [_row("search", "trials", "stopped", "first in bounds", "worker s", "fixed s a trial", "hypervolume")]
    for one in courses:
        stopped = sum(record.status == "pruned" for record in one.records)
        bounded = any(objective.is_bounded for objective in objectives)
        lines.append(
            _row(
                one.name,
                len(one.records),
                stopped,
                _text(one.trials_to(objectives), "d") if bounded else "-",
                f"{one.seconds[-1]:.0f}",
                _text(fixed_seconds(one.records), ".2f"),
                f"{one.volumes[-1]:.4f}",
            )
        )
    return lines + [_saving(courses[0], other) for other in courses[1:]]


def _saving(first: Course, other: Course) -> str:
    goal = _REACHED * min(first.volumes[-1], other.volumes[-1])
    long, short = first.spent_to(goal), other.spent_to(goal)
    assert long is not None
    assert short is not None
    ratios = [f"{a:.0f} and {b:.0f}, ratio {a / max(b, 1e-9):.2f}" for a, b in zip(long, short, strict=True)]
    return (
        f"to a hypervolume of {goal:.4f}, {first.name} and {other.name}: "
        f"worker-seconds {ratios[0]}; training steps {ratios[1]}"
    )


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _row(name: str, *cells: object) -> str:
    return f"{name[-32:]:<32}" + "".join(f"{cell!s:>17}" for cell in cells)


def main(arguments: Sequence[str] | None = None) -> int:
    printable(sys.stdout)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", metavar="RESULTS", nargs="+", help="folders or pyarrow.fs URIs of searches")
    parser.add_argument("--objectives", default="quality,latency", help="as jobs/search.py takes them")
    options = parser.parse_args(arguments)
    found = [Store(folder).read_asked() for folder in options.results]
    if missing := [folder for folder, records in zip(options.results, found, strict=True) if not records]:
        raise ValueError(f"results of a search were wanted, found none under {', '.join(missing)}")
    asked = {(record.task, record.seq_len, record.train_len) for records in found for record in records}
    if len(asked) > 1:
        raise ValueError(
            f"searches of one question were wanted, got (task, seq_len, train_len) {sorted(asked, key=str)}"
        )
    goal = next((r.quality_goal for records in found for r in records if r.quality_goal), None)
    objectives = named_objectives(options.objectives.split(","), "max" if goal == "max" else "min" if goal else None)
    scale = Scale(found, objectives)
    courses = [course(name, records, scale) for name, records in zip(options.results, found, strict=True)]
    print("\n".join(table(courses, objectives)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
