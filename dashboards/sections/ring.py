"""Ring attention: time and efficiency against the number of ranks, what travelled, and one step's timeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from dashboards.figures.ring_scaling import (
    RingLine,
    RingPoint,
    ring_efficiency_plot,
    ring_scaling_info,
    ring_time_plot,
)
from dashboards.figures.ring_timeline import TimelineInfo, timeline_info, timeline_plot
from dashboards.frames import Results, Trial
from dashboards.markup import Column, Markup, element, join, table
from dashboards.page import Page
from dashboards.sections.frame import note, section
from dashboards.wording import cut, milliseconds, number, percent, question_label, ratio, size, tokens
from raybsa.results.record import efficiencies
from raybsa.ring.timeline import from_series

_CROWDED = (
    " Open points: the ranks had to share {devices} cores, so no more than {devices} ranks' worth can be reached."
)


def ring_section(page: Page, results: Results) -> Markup | None:
    """Nothing where no ring was measured."""
    groups = results.ring_groups
    if not groups:
        return None
    parts = (join(_scaling(page, trials), _timelines(page, results, trials), _numbers(trials)) for trials in groups)
    return section("ring", "Ring attention", *parts)


def ring_lines(trials: Sequence[Trial]) -> list[RingLine]:
    """A line for each pattern, length and partition that ran on several ranks; one rank belongs to every partition."""
    alone: dict[tuple[str, int], Trial] = {}
    several: dict[tuple[str, int, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        key = (trial.label, trial.record.seq_len)
        if trial.record.world_size == 1:
            alone[key] = trial
        else:
            several[(*key, trial.record.partition or "")].append(trial)
    lines = []
    for (label, length, partition), ranks in sorted(several.items()):
        first = [alone[label, length]] if (label, length) in alone else []
        points = sorted(map(_point, [*first, *ranks]))
        name = f"{label.replace('_', ' ')}, {tokens(length)}"
        name += "" if partition == "balanced" else f", {partition}"
        lines.append(RingLine(name, ranks[0].density, points, []))
    return lines


def _point(trial: Trial) -> RingPoint:
    record = trial.record
    ranks = record.world_size or 1
    crowded = record.devices is not None and ranks > record.devices
    return RingPoint(ranks, record.forward_backward_ms_p50 or 0.0, record.single_forward_backward_ms_p50, crowded)


def _scaling(page: Page, trials: Sequence[Trial]) -> Markup:
    record = trials[0].record
    heading = element("h3", f"{question_label(trials[0].spec)}, on {cut(record.device_name or record.device)}")
    info = ring_scaling_info(ring_lines(trials))
    if info is None:
        return join(heading, note("Measured on one rank only."))
    caption = "Forward and backward, medians. Dotted: the ideal, one process's time for the same work / ranks."
    if any(point.crowded for line in info.lines for point in line.measured):
        caption += _CROWDED.format(devices=record.devices)
    if info.shares_colours:
        caption += " Lines of one colour differ in their points, which stand before their names."
    cards = (
        element("div", element("h4", title), page.figure(figure, title), class_="card")
        for title, figure in (
            ("Time against ranks", ring_time_plot(info)),
            ("Efficiency against ranks", ring_efficiency_plot(info)),
        )
    )
    return join(heading, note(caption), element("div", *cards, class_="cards wide"))


def _timelines(page: Page, results: Results, trials: Sequence[Trial]) -> Markup | None:
    """One step for each number of ranks: the longest sequence that has spans, of equals the first."""
    shown: dict[int, tuple[Trial, TimelineInfo]] = {}
    for trial in sorted(trials, key=lambda t: (-t.record.seq_len, t.density or 1.0, t.record.created_at)):
        ranks = trial.record.world_size or 1
        if ranks == 1 or ranks in shown:
            continue
        info = timeline_info(from_series(results.series.get(trial.id, ()), trial.id))
        if info is not None:
            shown[ranks] = (trial, info)
    if not shown:
        return None
    cards = (_timeline(page, *shown[ranks]) for ranks in sorted(shown))
    caption = (
        "One forward and backward of every rank. While a rank computes a hop, the next hop's K and V are under way; "
        "a wait is what that did not hide. A transfer's bar ends where its rank has waited for it."
    )
    colours = (element("span", element("i", class_=f"swatch {lane}"), lane) for lane in ("compute", "transfer", "wait"))
    legend = element("div", *colours, class_="legend")
    return join(element("h3", "Timeline"), note(caption), legend, element("div", *cards, class_="cards full"))


def _timeline(page: Page, trial: Trial, info: TimelineInfo) -> Markup:
    record = trial.record
    title = f"{trial.label}, {record.seq_len:,} tokens on {record.world_size} ranks, {record.partition}"
    told = f"All ranks together: computed {milliseconds(info.compute_ms)}"
    if info.waited is None:
        told += ", nothing travelled."
    else:
        told += f", had transfers under way for {milliseconds(info.transfer_ms)} and "
        told += f"only waited for them in {milliseconds(info.wait_ms)} of it ({percent(info.waited)})."
    return element("div", element("h4", title), note(told), page.figure(timeline_plot(info), title), class_="card")


def _numbers(trials: Sequence[Trial]) -> Markup:
    names = (
        *("tokens", "kept", "ranks"),
        *("forward", "alone", "efficiency"),
        *("forward + backward", "alone", "efficiency"),
        *("sent in forward", "/ needed", "max / mean work", "memory"),
        *("error forward", "error gradient"),
    )
    head = [Column("pattern", "text"), Column("partition"), *(Column(name, "right") for name in names)]
    ordered = sorted(trials, key=lambda t: (t.label, t.record.seq_len, t.record.world_size or 1))
    explained = (
        "Alone: one process with the whole sequence and the same kernel, in turn with the ranks. "
        "Efficiency: alone / (ranks × time). Errors are those against it."
    )
    return join(element("h3", "The ring in numbers"), note(explained), table(head, [_cells(t) for t in ordered]))


def _cells(trial: Trial) -> list[str]:
    r = trial.record
    forward, both = efficiencies(r)
    return [
        trial.label,
        r.partition or "–",
        f"{r.seq_len:,}",
        percent(r.density),
        str(r.world_size or "–"),
        milliseconds(r.forward_ms_p50),
        milliseconds(r.single_forward_ms_p50),
        percent(forward),
        milliseconds(r.forward_backward_ms_p50),
        milliseconds(r.single_forward_backward_ms_p50),
        percent(both),
        size(r.wire_forward_bytes),
        number(ratio(r.wire_forward_bytes, r.needed_forward_bytes)),
        number(r.imbalance),
        size(r.peak_bytes),
        number(r.error_forward),
        number(r.error_gradient),
    ]
