"""What could have been known before the end of a training? Ranks of earlier looks beside ranks of final qualities.

    python -m raybsa.experiments.foresight results/whole results/looked

Reads the finished trials of all folders, their curves of training loss and the previews of the same questions. A line a
look: Spearman's rank correlation with the final quality, over all sparse trials, and once the trend over density is
taken away (a parabola over its logarithm), for it is the choice among equally dense patterns that is hard.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from raybsa.experiments.previews import previewed
from raybsa.printable import printable
from raybsa.results.record import Record, SeriesPoint, spec_of
from raybsa.results.store import Store
from raybsa.spec import TrialSpec

_SHARES = (1 / 27, 1 / 9, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 1.0)  # of a training
_FEWEST = 8  # trials

Ranked = Sequence[tuple[Record, float]]


def table(records: Sequence[Record], series: Sequence[SeriesPoint]) -> Iterator[str]:
    """The lines to print.

    Raises:
        ValueError: too few finished trials with a quality.
    """
    ended = [r for r in records if r.status == "ok" and r.quality is not None and r.pattern != "dense"]
    if len(ended) < _FEWEST:
        raise ValueError(f"at least {_FEWEST} finished sparse trials were wanted to rank, got {len(ended)}")
    yield f"{'look':<34}{'trials':>8}{'all':>8}{'at equal density':>18}"
    looks = {(_question(r), r.seed): r.quality for r in records if _spec(r).weights}
    seen = [(r, looks[_question(r), r.seed]) for r in ended if (_question(r), r.seed) in looks]
    if len(seen) >= _FEWEST:
        yield _line("preview, nothing trained", [(r, q) for r, q in seen if q is not None])
    curves: dict[str, list[SeriesPoint]] = defaultdict(list)
    for point in series:
        if point.name == "train_loss":
            curves[point.trial_id].append(point)
    for share in _SHARES:
        yield _line(f"training loss at {share:.0%}", [(r, _loss(curves[r.trial_id], r, share)) for r in ended])


def _line(name: str, ranked: Ranked) -> str:
    looks = np.array([look for _, look in ranked])
    ends = np.array([record.quality for record, _ in ranked], dtype=float)
    density = np.log(np.array([record.density for record, _ in ranked], dtype=float))
    level = _without(density)
    return f"{name:<34}{len(ranked):>8}{_spearman(looks, ends):>8.2f}{_spearman(level(looks), level(ends)):>18.2f}"


def _loss(curve: Sequence[SeriesPoint], record: Record, share: float) -> float:
    """The mean training loss over the last third of that share of the training."""
    end = share * (record.trained_steps or 0)
    late = [point.value for point in curve if 2 / 3 * end <= point.step < end]
    return float(np.mean(late or [min(curve, key=lambda point: abs(point.step - end)).value]))


def _without(trend: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: values - np.polyval(np.polyfit(trend, values, 2), trend)


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Equals share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _spec(record: Record) -> TrialSpec:
    return spec_of(record)


def _question(record: Record) -> str:
    return previewed(_spec(record)).digest


def main(arguments: Sequence[str] | None = None) -> int:
    printable(sys.stdout)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", metavar="RESULTS", nargs="+", help="folders or pyarrow.fs URIs of searches of one seed"
    )
    stores = [Store(folder) for folder in parser.parse_args(arguments).results]
    records = [record for store in stores for record in store.read_asked()]
    series = [point for store in stores for point in store.read_series()]
    for line in table(records, series):
        print(line)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
