"""Quality and latency: each question's front, its specs to paste, and the learning curves of its trials."""

from __future__ import annotations

from functools import partial

from dashboards.figures.curves import curves_info, curves_plot
from dashboards.figures.pareto import MOST_BEATEN, MOST_NUMBERS, ParetoInfo, Point, pareto_info, pareto_plot
from dashboards.frames import Results, search_command
from dashboards.markup import Column, Markup, element, join, table
from dashboards.page import Page, Told
from dashboards.sections.frame import asked, listed, note, nothing_yet, section
from dashboards.wording import milliseconds, moment, paste, percent, quality, ratio, size, times
from raybsa.results.record import Record

MOST_CURVES, MOST_NAMED, MOST_DENSE = 40, 20, 3  # dominated, of the front and of the baseline in one figure
NOTHING_TIMED = "No trial of this question was timed and trained to its end"


def quality_section(page: Page, results: Results, folder: str) -> Markup:
    parts = [
        join(
            element("h3", asked(trials[0])),
            front_part(page, info := pareto_info(trials), f"panel-{index}", folder),
            curves_part(page, results, info),
        )
        for index, trials in enumerate(results.quality_groups)
    ]
    missing = nothing_yet("No trial has measured a quality yet", search_command(folder))
    return section("quality", "Quality and latency", *(parts or [missing]))


def front_part(page: Page, info: ParetoInfo, panel: str, folder: str) -> Markup:
    """The front as a figure, a panel for the trial that was clicked, and the front as a table."""
    if not info.front:
        return nothing_yet(NOTHING_TIMED, search_command(folder))
    chosen = element("aside", id=panel, class_="panel trial", data_trial=info.front[0].trial.id)
    return join(
        note(how_to_read(info)),
        element("div", front_figure(page, info, panel), chosen, class_="split"),
        front_table(page, info),
    )


def front_figure(page: Page, info: ParetoInfo, panel: str) -> Markup:
    """The front's figure; ``panel`` shows the trial that was clicked."""
    for point in info.points:
        page.trial(point.trial, partial(told, info, point))
    return page.figure(pareto_plot(info), "Pareto front of quality and latency", panel)


def how_to_read(info: ParetoInfo) -> str:
    """What the figure's points mean."""
    kind = "Numbered" if len(info.front) <= MOST_NUMBERS else "Filled"
    sizes = [p.trial.record.peak_bytes for p in info.points if p.trial.record.peak_bytes is not None]
    return " ".join(
        sentence
        for sentence, holds in (
            (f"{kind} points form the front: no other trial is both better and faster.", True),
            (
                f"The area of a point is its peak memory, {size(min(sizes or [0]))} to {size(max(sizes or [0]))}.",
                len(set(sizes)) > 1,
            ),
            (
                "Dominated trials that others would cover are not drawn.",
                len(info.points) - len(info.front) > MOST_BEATEN,
            ),
            (f"{info.unmeasured} trials have no time and are not drawn.", info.unmeasured),
            (
                "Crosses were stopped early or only previewed: their quality is of a part of the training, or of none.",
                any(p.trial.pruned for p in info.points),
            ),
            ("No dense baseline was measured here.", not any(p.trial.is_dense for p in info.points)),
            ("Point at one to see its pattern; click to keep it beside the figure.", True),
        )
        if holds
    )


def front_table(page: Page, info: ParetoInfo) -> Markup:
    """Each point of the front with the text that makes it."""
    head = [
        Column("#"),
        Column(""),
        Column("pattern, as Python text (from raybsa import create_block_sparse_attention)", "paste"),
        Column(info.quality_label, "right"),
        Column(info.latency_label, "right"),
        Column("vs dense", "right"),
        Column("memory", "right"),
        Column("kept", "right"),
    ]
    rows = [_front_row(page, info, point) for point in info.front]
    return join(element("h3", "The front, ready to paste"), table(head, rows))


def _front_row(page: Page, info: ParetoInfo, point: Point) -> list[Markup | str]:
    trial = point.trial
    return [
        str(point.rank),
        element("div", data_drawing=page.drawing(trial)),
        join(trial.label, element("pre", paste(trial.spec), class_="copied")),
        quality(point.quality),
        milliseconds(point.latency_ms),
        times(info.speed_up(point)),
        size(trial.record.peak_bytes),
        percent(trial.record.density),
    ]


def told(info: ParetoInfo, point: Point) -> Told:
    """What is shown beside the front of the trial that was clicked."""
    return Told(point.trial, _title(point), _facts(info, point))


def _title(point: Point) -> str:
    rank = "" if point.rank is None else f"{point.rank}. "
    return f"{rank}{point.trial.label}{' (baseline)' if point.trial.is_dense else ''}"


def _kept(point: Point) -> str:
    """``10 % at block 16, window of 416 tokens``."""
    record = point.trial.record
    return ", ".join([f"{percent(record.density)} at block {record.block_size}", *point.trial.sizes])


def _facts(info: ParetoInfo, point: Point) -> list[tuple[str, str]]:
    record = point.trial.record
    return [
        (info.quality_label, quality(point.quality)),
        (info.latency_label, milliseconds(point.latency_ms)),
        ("speed-up over dense", times(info.speed_up(point))),
        ("peak memory", size(record.peak_bytes)),
        ("memory over dense", times(ratio(record.peak_bytes, record.dense_peak_bytes))),
        ("blocks kept", _kept(point)),
        ("computed by", f"{record.variant}, {record.backend}"),
        ("trial", record.trial_id),
        ("made by", _made_by(record)),
        *([("stopped early", record.error or "")] if point.trial.pruned else []),
    ]


def _made_by(record: Record) -> str:
    """The job, its commit and the time; what an older row lacks is left out."""
    job = f"job {record.job}" if record.job else ""
    commit = f"commit {record.git_commit[:12]}" if record.git_commit else ""
    return listed([job, commit, moment(record.created_at or "")]) or "–"


def curves_part(page: Page, results: Results, info: ParetoInfo) -> Markup:
    """The learning curves of the front, the dense baseline and the best of the others."""
    ranks = {point.trial.id: point.rank for point in info.points if point.rank is not None}
    plain = [p.trial for p in info.points if p.rank is None and not p.trial.is_dense]
    plain.sort(key=lambda trial: (trial.record.quality or 0.0) * (1 if info.goal == "min" else -1))
    front = [p.trial for p in info.front if not p.trial.is_dense]
    dense = [p.trial for p in info.points if p.trial.is_dense]
    shown = [*dense[-MOST_DENSE:], *front[:: -(-len(front) // MOST_NAMED) or 1], *plain[:MOST_CURVES]]
    curves = curves_info(results.points(shown), shown, ranks)
    if not curves:
        return join(element("h3", "Learning curves"), note("No curves were recorded for these trials."))
    cards = (
        element(
            "div",
            element("h4", curve.name.replace("_", " ")),
            page.figure(curves_plot(curve), curve.name),
            class_="card",
        )
        for curve in curves
    )
    caption = (
        "Coloured and numbered as the front; orange: dense; grey: dominated. "
        "The axis shows the second half of the training; double-click a figure to see all of it."
    )
    if len(shown) < len(info.points):
        caption += f" {len(shown)} of {len(info.points):,} trials are drawn: some of the front, the best of the others."
    return join(element("h3", "Learning curves"), note(caption), element("div", *cards, class_="cards wide"))
