"""Speed and memory against length: a row of figures for each pattern, and the numbers behind them."""

from __future__ import annotations

from collections.abc import Sequence

from dashboards.figures.scaling import MEMORY, QUANTITIES, Quantity, scaling_info, scaling_plot, split_by_pattern
from dashboards.frames import Results, Trial, benchmark_command, line_label
from dashboards.markup import Column, Markup, element, join, table
from dashboards.page import Page
from dashboards.sections.frame import note, nothing_yet, section
from dashboards.wording import cut, milliseconds, number, percent, question_label, ratio, size, times


def speed_section(page: Page, results: Results, folder: str) -> Markup:
    parts = [_comparison(page, trials) for trials in results.speed_groups]
    missing = nothing_yet("No speed benchmark has run yet", benchmark_command(folder))
    return section("speed", "Speed and memory against length", *(parts or [missing]))


def _comparison(page: Page, trials: Sequence[Trial]) -> Markup:
    record = trials[0].record
    rows = (_row(page, name, own, trials) for name, own in split_by_pattern(trials).items())
    caption = "Solid: median, with bars from the 20th to the 80th percentile. Dotted: the ideal, dense × density. "
    caption += (
        "Each line is named by the density that was asked for; own: the pattern's own, which may change with length. "
        "Lines of one colour differ in their points."
    )
    return join(
        element("h3", f"{question_label(trials[0].spec)}, on {cut(record.device_name or record.device)}"),
        note(caption),
        *rows,
        element("h3", "The same in numbers"),
        note("Of ideal: the share of the ideal speed-up, 1 / density, that was reached."),
        _numbers([trial for trial in trials if not trial.is_dense]),
    )


def speed_memory(page: Page, results: Results) -> Markup | None:
    """Memory over length, a figure a pattern; nothing where no speed benchmark ran."""
    parts: list[Markup] = []
    for trials in results.speed_groups:
        cards = (_card(page, name, own, trials, MEMORY) for name, own in split_by_pattern(trials).items())
        record = trials[0].record
        heading = element("h3", f"{question_label(trials[0].spec)}, on {cut(record.device_name or record.device)}")
        parts += [heading, element("div", *cards, class_="cards")]
    return join(*parts) if parts else None


def _row(page: Page, name: str, own: Sequence[Trial], everything: Sequence[Trial]) -> Markup:
    cards = (_card(page, name, own, everything, quantity) for quantity in QUANTITIES)
    return join(element("h3", name), element("div", *cards, class_="cards"))


def _card(
    page: Page, name: str, own: Sequence[Trial], everything: Sequence[Trial], quantity: Quantity
) -> Markup | None:
    info = scaling_info(own, everything, quantity)
    if info is None:
        return None
    title = quantity.title if quantity is not MEMORY else f"{quantity.title}, {name}"
    picture = page.figure(scaling_plot(info), f"{quantity.title} against length: {name}")
    return element("div", element("h4", title), picture, class_="card")


def _numbers(trials: Sequence[Trial]) -> Markup:
    names = (
        *("tokens", "kept"),
        *("forward", "vs dense", "of ideal"),
        *("forward + backward", "vs dense", "of ideal"),
        *("memory", "vs dense"),
        *("error forward", "error gradient"),
    )
    head = [Column("pattern", "text"), Column("computed by"), *(Column(name, "right") for name in names)]
    ordered = sorted(trials, key=lambda t: (line_label(t), t.record.backend, t.record.seq_len, t.density or 0))
    return table(head, [_cells(trial) for trial in ordered])


def _cells(trial: Trial) -> list[str]:
    r = trial.record
    forward = ratio(r.dense_forward_ms_p50, r.forward_ms_p50)
    both = ratio(r.dense_forward_backward_ms_p50, r.forward_backward_ms_p50)
    return [
        trial.label,
        f"{r.variant}, {r.backend}",
        f"{r.seq_len:,}",
        percent(r.density),
        milliseconds(r.forward_ms_p50),
        times(forward),
        _of_ideal(forward, r.density),
        milliseconds(r.forward_backward_ms_p50),
        times(both),
        _of_ideal(both, r.density),
        size(r.peak_bytes),
        times(ratio(r.peak_bytes, r.dense_peak_bytes)),
        number(r.error_forward),
        number(r.error_gradient),
    ]


def _of_ideal(speed_up: float | None, density: float | None) -> str:
    return percent(None if speed_up is None or density is None else speed_up * density)
