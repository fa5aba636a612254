"""A results folder with rows of every kind."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from raybsa.results.record import SeriesPoint
from raybsa.results.store import Store
from tests.dashboards.made import a_benchmark, a_search, lm_record, sparse
from tests.dashboards.made_peers import a_gpu_suite
from tests.dashboards.made_ring import a_ring_benchmark, link_points, step_points
from tests.dashboards.made_training import LOSSES, RECOVERED, SERIES, TRAININGS


def a_folder(path: Path) -> Store:
    """Two searches, a benchmark, part of the gpu suite, rings, compressed trainings and one with recoveries."""
    store = Store.create(path)
    records, curves = a_search()
    second = [
        lm_record(f"again-{d}", sparse("bigbird", d), 2.25 - d / 3, 5 + 50 * d, run_id="run-2") for d in (0.05, 0.1)
    ]
    kernels = [r for r in a_gpu_suite() if (r.block_size, r.pattern, r.causal) == (64, "random", False)]
    rings = a_ring_benchmark()
    by_trial: dict[str, list[SeriesPoint]] = defaultdict(list)
    ring_curves = [*link_points(rings[0].trial_id), *step_points(rings[1].trial_id)]
    for point in (*curves, *ring_curves, *LOSSES, *SERIES):
        by_trial[point.trial_id].append(point)
    for points in by_trial.values():
        store.write_series(points)
    for record in (*records, *second, *a_benchmark(), *kernels, *rings, *TRAININGS, RECOVERED):
        store.write_record(record)
    return store
