"""Compressed gradients: loss against bytes, and each codec beside the uncompressed training of the same seed."""

from __future__ import annotations

from dashboards.figures.compression import loss_lines, loss_plot
from dashboards.frames import Results
from dashboards.markup import Column, Markup, element, join, table
from dashboards.page import Page
from dashboards.sections.frame import note, section
from dashboards.wording import number, times
from raybsa.experiments.compared import Compared, compare


def compression_section(page: Page, results: Results) -> Markup | None:
    """Nothing where no training was compressed."""
    trials = results.compressed
    if not trials:
        return None
    rows = compare(trial.record for trial in trials)
    head = [Column("codec"), *(Column(name, "right") for name in _NUMBERS)]
    explained = (
        "The gap is that of bits per held-out byte to the uncompressed training of the same seed, steps and data: "
        "its mean and its largest over seeds. Fewer bytes: uncompressed / sent, as counted on the wire."
    )
    lines = loss_lines(trials, results.points(trials))
    figure = loss_plot(lines) if lines else None
    drawn = note("No curves were recorded.") if figure is None else page.figure(figure, "Loss against bytes sent")
    caption = "Means over seeds, and over ten points each. "
    caption += "A colour a family of codecs, orange: uncompressed; the dashes tell codecs of one family apart."
    return section(
        "compression",
        "Compressed gradients",
        join(note(caption), element("div", drawn, class_="card"), note(explained), table(head, map(_cells, rows))),
    )


_NUMBERS = ("seeds", "fewer bytes", "bits a byte", "gap", "worst gap", "s a step")


def _cells(row: Compared) -> list[str]:
    return [
        row.codec,
        str(row.seeds),
        times(row.fewer),
        f"{row.bits:.4f}",
        f"{row.gap:+.2%}",
        f"{row.worst:+.2%}",
        number(row.step_seconds),
    ]
