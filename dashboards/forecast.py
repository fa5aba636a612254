"""The forecast's page: how well the cost formula predicts measured rows, and strong and weak scaling beyond them."""

from __future__ import annotations

from collections.abc import Sequence

from dashboards.figures.ring_error import ErrorPoint, ring_error_plot
from dashboards.figures.ring_scaling import ring_efficiency_plot, ring_scaling_info, ring_time_plot
from dashboards.markup import Column, Markup, element, join, table
from dashboards.page import Page, render
from dashboards.scalings import Scaling
from dashboards.sections.frame import note, section
from dashboards.wording import attention_label, milliseconds, number, size
from raybsa.experiments.forecast import Compared, median_error_line
from raybsa.ring.hardware import Hardware, Link


def forecast_page(compared: Sequence[Compared], parts: Sequence[tuple[Hardware, Sequence[Scaling]]]) -> str:
    """The whole document.

    Args:
        compared: measured rows beside their predictions; may be empty.
        parts: each hardware with its scalings; its label says whether it was fitted or is a preset.
    """
    page = Page()
    head = element(
        "header",
        element("h1", "raybsa: ring attention, forecast"),
        element("p", "Solid lines and points were measured. Dashed lines are forecasts of the cost formula."),
    )
    return render(page, "raybsa forecast", join(head, element("main", forecast_parts(page, compared, parts))))


def forecast_parts(
    page: Page, compared: Sequence[Compared], parts: Sequence[tuple[Hardware, Sequence[Scaling]]]
) -> Markup:
    """The sections of ``forecast_page``."""
    return join(_errors(page, compared), *(_scalings(page, index, *part) for index, part in enumerate(parts)))


def _errors(page: Page, compared: Sequence[Compared]) -> Markup | None:
    if not compared:
        return None
    points = [
        ErrorPoint(
            f"{_name(c)}, {c.row.world_size} ranks, {c.row.record.partition}",
            c.row.spec.layer(0).density,
            c.row.record.forward_backward_ms_p50 or 0.0,
            1e3 * c.predicted.forward_backward_s,
            c.row.is_crowded,
        )
        for c in compared
    ]
    caption = (
        f"{len(compared)} rows. Kernel and link were fitted to what one rank did alone and to single messages; "
        f"rows of several ranks took no part. {median_error_line(compared)}"
    )
    figure = page.figure(ring_error_plot(points), "Predicted against measured time")
    head = [Column("pattern", "text"), Column("partition")]
    names = ("tokens", "ranks", "forward", "predicted", "error", "f + b", "predicted", "error", "memory", "predicted")
    head += [Column(name, "right") for name in names]
    return section(
        "errors",
        "Prediction against measurement",
        note(caption),
        element("div", element("div", figure, class_="card"), class_="cards wide"),
        table(head, [_cells(c) for c in compared]),
    )


def _cells(compared: Compared) -> list[str]:
    record, predicted, (forward, both) = compared.row.record, compared.predicted, compared.errors
    return [
        _name(compared),
        record.partition or "–",
        f"{record.seq_len:,}",
        str(compared.row.world_size),
        milliseconds(record.forward_ms_p50),
        milliseconds(1e3 * predicted.forward_s),
        f"{forward:+.0%}",
        milliseconds(record.forward_backward_ms_p50),
        milliseconds(1e3 * predicted.forward_backward_s),
        f"{both:+.0%}",
        size(record.peak_bytes),
        size(predicted.memory_bytes),
    ]


def _name(compared: Compared) -> str:
    return attention_label(compared.row.spec.layer(0))


def _scalings(page: Page, index: int, hardware: Hardware, scalings: Sequence[Scaling]) -> Markup:
    parts = []
    for scaling in scalings:
        info = ring_scaling_info(scaling.lines)
        if info is None:
            continue
        told = scaling.told
        if info.shares_colours:
            told += " Lines of one colour differ in their points and dashes, which stand before their names."
        cards = (
            element("div", element("h4", title), page.figure(figure, f"{scaling.title}: {title}"), class_="card")
            for title, figure in (
                ("Time", ring_time_plot(info)),
                ("Efficiency", ring_efficiency_plot(info)),
            )
        )
        parts += [element("h3", scaling.title), note(told), element("div", *cards, class_="cards wide")]
    facts = element("dl", *(p for pair in _facts(hardware) for p in pair), class_="facts")
    return section(f"hardware-{index}", f"Scaling on {hardware.label}", facts, note(_assumed(hardware)), *parts)


def _assumed(hardware: Hardware) -> str:
    if not hardware.fitted_on:
        return "A forecast from figures of single GPUs and links: no ring was measured on this hardware."
    return (
        "Points were measured. In the forecast every rank has a core or GPU of its own, and the link between any two "
        "ranks is the one measured on this host: beyond it that is an assumption."
    )


def _facts(hardware: Hardware) -> list[tuple[Markup, Markup]]:
    facts = [
        (
            f"{kernel.direction} kernel, block {kernel.block_size}",
            f"{number(kernel.rate / 1e12)} TFLOP/s over active blocks, a row costs {number(kernel.row_blocks)} blocks "
            f"besides, a call {number(1e6 * kernel.call_s)} µs",
        )
        for kernel in hardware.kernels
    ]
    facts.append(("link", _link(hardware.link)))
    if hardware.node_size and hardware.far_link:
        facts.append((f"between nodes of {hardware.node_size}", _link(hardware.far_link)))
    return [(element("dt", name), element("dd", text)) for name, text in facts]


def _link(link: Link) -> str:
    return f"{number(link.bytes_per_s / 1e9)} GB/s each way, {number(1e6 * link.latency_s)} µs a message"
