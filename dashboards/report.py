"""The report: ``python -m dashboards.report RESULTS --out report.html`` writes one page that opens with no network."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from os.path import expanduser

from dashboards.frames import load
from dashboards.markup import element, join
from dashboards.page import Page, render
from dashboards.sections.compression import compression_section
from dashboards.sections.failures import failures_section
from dashboards.sections.header import header
from dashboards.sections.patterns import patterns_section
from dashboards.sections.peers import peers_section
from dashboards.sections.quality import quality_section
from dashboards.sections.recovery import recovery_section
from dashboards.sections.ring import ring_section
from dashboards.sections.speed import speed_section
from dashboards.written import free_path, write_page
from raybsa.printable import printable


def write_report(results: str, out: str, *, own_patterns: bool = False) -> str:
    """Draws a results folder as one HTML file and returns the file's absolute path. A crash leaves no torn file, and no
    file is replaced that is not such a page.

    Args:
        results: a path or ``pyarrow.fs`` URI, as ``raybsa.results.store`` reads it.
        out: a local path; missing folders are made.
        own_patterns: also import and draw patterns that the records name as ``module:Class``. Leave it out for results
            that somebody sent you.

    Raises:
        ValueError: nothing that can be read was measured there.
        OSError: the results cannot be read, or the page cannot be written: there is somebody else's file.
    """
    return write_page(_page(results, own_patterns), out)


def write_own_report(folder: str) -> str:
    """Draws a job's results into their local folder and returns the file's path: ``report.html``, or ``report-2.html``
    (and so on) where somebody else's file lies there."""
    return write_report(folder, free_path(os.path.join(folder, "report.html")), own_patterns=True)


def _page(folder: str, own_patterns: bool) -> str:
    results, page = load(folder), Page(own_patterns)
    kernels = peers_section(page, results)
    if results.only_kernels:
        body = element("main", kernels, failures_section(results))
    else:
        body = element(
            "main",
            quality_section(page, results, folder),
            speed_section(page, results, folder),
            kernels,
            ring_section(page, results),
            compression_section(page, results),
            recovery_section(page, results),
            patterns_section(page, results, folder),
            failures_section(results),
        )
    return render(page, "raybsa report", join(header(results, folder), body))


def main(arguments: Sequence[str] | None = None) -> int:
    printable(sys.stdout)
    parser = argparse.ArgumentParser(
        prog="python -m dashboards.report", description="Draw measured results as one page."
    )
    parser.add_argument("results", metavar="RESULTS", help="folder or pyarrow.fs URI that a job wrote")
    parser.add_argument(
        "--out", type=expanduser, default="report.html", help="the page to write (default: %(default)s)"
    )
    parser.add_argument("--own-patterns", action="store_true", help="import and draw patterns named as module:Class")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.results, options.out, own_patterns=options.own_patterns))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
