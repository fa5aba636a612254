"""How would ring attention scale to 1,024 ranks? Fits the cost formula to measured rows and draws what follows.

    python jobs/benchmark.py --suite ring --out results/ring
    python jobs/scaling_forecast.py --results results/ring --hardware h200 --out forecast.html

Prints the error of every measured row's prediction and their median, then writes one page: measured points are marked
as measured, forecasts as forecasts. ``--hardware`` adds a published preset, marked "preset, not measured here".
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from os.path import expanduser

from dashboards.measured_forecast import Part, measured_part, write_forecast
from dashboards.scalings import preset_scalings
from dashboards.wording import attention_label
from raybsa.experiments.forecast import Compared, compare, fit_rows, median_error_line, ring_rows
from raybsa.experiments.options import at_least
from raybsa.experiments.place import refusing
from raybsa.results.store import Store
from raybsa.ring.hardware import PRESETS


def main() -> int:
    arguments = _arguments()
    compared: list[Compared] = []
    parts: list[Part] = []
    if arguments.results:
        store = Store(arguments.results)
        rows = ring_rows(store.read_asked())
        if not rows:
            raise ValueError(
                f"rows of `jobs/benchmark.py --suite ring --out {arguments.results}` were wanted, found none there"
            )
        hardware = fit_rows(rows, store.read_series())
        compared = compare(rows, hardware)
        _print(compared)
        parts.append(measured_part(rows, hardware, arguments.ranks))
    for name in arguments.hardware:
        parts.append((PRESETS[name], preset_scalings(PRESETS[name], arguments.ranks)))
    if not parts:
        raise ValueError("nothing to forecast from: give --results, --hardware or both")
    path = os.path.abspath(arguments.out)
    write_forecast(path, compared, parts)
    print(f"forecast: {path}")
    return 0


def _print(compared: Sequence[Compared]) -> None:
    form = "{:28} {:10} {:>7} {:>5} {:>11} {:>10} {:>6} {:>11} {:>10} {:>6}"
    names = (
        "pattern",
        "partition",
        "tokens",
        "ranks",
        "forward ms",
        "predicted",
        "error",
        "f+b ms",
        "predicted",
        "error",
    )
    print(form.format(*names))
    for c in compared:
        record, predicted = c.row.record, c.predicted
        times = []
        for ms, seconds, error in zip(
            (record.forward_ms_p50, record.forward_backward_ms_p50),
            (predicted.forward_s, predicted.forward_backward_s),
            c.errors,
            strict=True,
        ):
            times += [f"{ms:.2f}", f"{1e3 * seconds:.2f}", f"{error:+.0%}"]
        print(form.format(attention_label(c.row.attention), record.partition, record.seq_len, c.row.world_size, *times))
    print(median_error_line(compared))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", help="folder or pyarrow.fs URI with the rows of `jobs/benchmark.py --suite ring`")
    parser.add_argument("--hardware", nargs="*", default=[], choices=PRESETS, help="presets, not measured here")
    parser.add_argument(
        "--ranks", type=at_least(1), default=1024, help="forecast up to this many (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=expanduser, default="forecast.html", help="the page to write (default: %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    with refusing():  # there is nothing to run: what goes wrong lies in what was given
        sys.exit(main())
