"""The gpu suite: our kernels beside other libraries' and the ideal, over density and length, and in numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from statistics import median

from dashboards.figures.peer_memory import memory_info, memory_plot
from dashboards.figures.peers import NAMES, peers_info, peers_plot
from dashboards.frames import Results
from dashboards.markup import Column, Markup, element, join, table
from dashboards.page import Page
from dashboards.sections.frame import listed, note, section
from dashboards.wording import milliseconds, number, percent, ratio, size, tokens
from raybsa.experiments.peer_cells import cells
from raybsa.experiments.peer_rows import PASSES, Pass, Row, extra_bytes, held_bytes, pass_of, rows_of
from raybsa.kernels.auto_table import PEERS
from raybsa.spec import PatternSpec

_TITLES = dict(zip(PASSES, ("Forward", "Forward + backward"), strict=True))
_READ = (
    "Medians of calls in turn in one process, on layouts that are known. Dotted: the ideal, dense cuDNN × density. "
    "Point at a mark to see how near the ideal it is and what auto takes. What was measured at one density only is "
    "in the table."
)
_SHORT = "Our time over theirs in all cells that both ran: below 1 is ours ahead."
_TABLE = (
    "Of ideal: the ideal's time / ours. / Flex, / best: our time over theirs, below 1 is ours ahead. "
    'Auto: what backend="auto" takes, its time over the best library\'s; timed: auto was timed itself.'
)
_COST = (
    "Memory: ours, beyond inputs, output and gradients, and as a share of q + k + v + out. "
    "Errors: ours, in those of plain torch operations of the same dtype."
)
_MEMORY = (
    "Peak of forward and backward beyond inputs, output and gradients, with what stays with the layout, at the "
    "sparsest random layout of each length. Dashed: what the project before this one claimed of its block-sparse "
    "attention, without saying for which heads."
)


def peers_section(page: Page, results: Results, *, memory: bool = True) -> Markup | None:
    """Nothing where the gpu suite did not run. ``memory``: with the figures of memory."""
    parts: list[Markup | None] = []
    for device, rows in peer_rows(results).items():
        libraries = listed(r.library for row in rows for r in row.by_backend.values() if r.backend != "auto")
        parts += [element("h3", f"On {device}"), note(libraries), note(_SHORT), standing_table(rows)]
        parts += [_legend(), note(_READ), _times(page, rows)]
        if memory and (figures := peers_memory(page, rows)) is not None:
            parts += [element("h3", "Memory against length"), figures]
        parts += [element("h3", "The kernels in numbers"), note(_TABLE), _times_table(rows)]
        parts += [element("h3", "Their memory and errors"), note(_COST), _cost_table(rows)]
    return section("peers", "GPU kernels beside other libraries", *parts) if parts else None


def peer_rows(results: Results) -> dict[str, list[Row]]:
    """The gpu suite's cells by the GPU's name; GPUs without any are left out."""
    by_device = {d: rows_of((trial.record for trial in trials), cells()) for d, trials in results.peer_groups.items()}
    return {device: rows for device, rows in by_device.items() if rows}


def kind(pattern: PatternSpec | None) -> str:
    """A pattern's family in words; composed rules by their parts."""
    if pattern is None:
        return "dense"
    parts = pattern.params.get("parts")
    names = [part["name"] for part in parts] if isinstance(parts, list) else [pattern.name]
    return " + ".join(names).replace("_", " ")


def standing_table(rows: Sequence[Row]) -> Markup:
    """Ours, and what ``auto`` takes, over each library and over the fastest of them in each cell."""
    head = [Column("")]
    for title in ("forward", "forward + backward"):
        head += [Column(name, "right") for name in (f"{title}, median", "best", "worst", "ahead in")]
    by_pass = [[_over_others(pass_of(row, name)) for row in rows] for name in PASSES]
    shown = []
    for title in by_pass[0][0]:
        found = [[value for row in ratios if (value := row[title]) is not None] for ratios in by_pass]
        if any(found):
            shown.append([title, *(cell for values in found for cell in _standing(values))])
    return table(head, shown)


def _over_others(times: Pass) -> dict[str, float | None]:
    by_peer = {f"ours / {NAMES[peer]}": ratio(times.own, times.peers.get(peer)) for peer in PEERS}
    fastest = {"ours": times.over_best(times.own), "auto": times.over_best(times.auto)}
    return by_peer | {f"{name} / the fastest of them": value for name, value in fastest.items()}


def _standing(values: Sequence[float]) -> list[str]:
    if not values:
        return ["–"] * 4
    ahead = sum(value < 1 for value in values)
    return [_over(median(values)), _over(min(values)), _over(max(values)), f"{ahead} of {len(values)}"]


def _legend() -> Markup:
    shown = (
        element("span", element("i", class_="swatch", style=f"background:var(--{backend})"), name)
        for backend, name in NAMES.items()
    )
    ideal = element("span", element("i", class_="swatch ideal"), "ideal: dense cuDNN × density")
    return element("div", *shown, ideal, class_="legend")


def _grouped(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> list[list[Row]]:
    found: dict[Hashable, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.values())


def _shape(row: Row) -> tuple[Hashable, ...]:
    """Equal for cells that share a figure: all of the question but density and the pattern's own numbers."""
    spec = row.spec
    sizes = (spec.seq_len, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.causal)
    return *sizes, spec.layer(0).block_size, kind(spec.layer(0).pattern)


def _times(page: Page, rows: Sequence[Row]) -> Markup:
    parts = []
    for group in _grouped(rows, _shape):
        cards = [card for name in PASSES if (card := _time(page, group, name)) is not None]
        if cards:
            parts.append(join(element("h4", _group_title(group[0])), element("div", *cards, class_="cards wide")))
    return join(*parts)


def _time(page: Page, group: Sequence[Row], name: str) -> Markup | None:
    info = peers_info(group, name)
    if info is None or len(info.lines[0].points) < 2:
        return None
    picture = page.figure(peers_plot(info), f"{_TITLES[name]} over density: {_group_title(group[0])}")
    return element("div", element("h4", _TITLES[name]), picture, class_="card")


def _group_title(row: Row) -> str:
    spec = row.spec
    heads = f"{spec.num_heads} heads × {spec.head_dim}"
    return f"{tokens(spec.seq_len)} tokens, block {spec.layer(0).block_size}, {heads}, {kind(spec.layer(0).pattern)}"


def peers_memory(page: Page, rows: Sequence[Row]) -> Markup | None:
    """Memory over length with the origin's claim drawn in; nothing where fewer than two lengths were measured."""
    plain = [row for row in rows if kind(row.spec.layer(0).pattern) == "random" and not row.spec.causal]
    cards = []
    for group in _grouped(plain, lambda row: (row.spec.num_heads, row.spec.head_dim, row.spec.layer(0).block_size)):
        info = memory_info(group)
        if info is not None:
            spec = group[0].spec
            title = f"Block {spec.layer(0).block_size}, {spec.num_heads} heads × {spec.head_dim}, {spec.dtype}"
            picture = page.figure(memory_plot(info), f"Memory against length: {title}")
            cards.append(element("div", element("h4", title), picture, class_="card"))
    if not cards:
        return None
    return join(note(_MEMORY), element("div", *cards, class_="cards wide"))


def _times_table(rows: Sequence[Row]) -> Markup:
    head = [Column("cell"), Column("kept", "right")]
    for title in ("forward", "forward + backward"):
        names = (title, "of ideal", "/ Flex", "/ best", "auto")
        head += [Column(name, "right") for name in names]
    return table(head, [_times_cells(row) for row in rows])


def _times_cells(row: Row) -> list[str]:
    shown = [row.name, percent(row.density)]
    for name in PASSES:
        times = pass_of(row, name)
        taken = NAMES.get(times.auto_name, "timed")
        shown += [
            milliseconds(times.own),
            percent(ratio(times.ideal, times.own)),
            _over(ratio(times.own, times.peers.get("flex"))),
            f"{_over(times.over_best(times.own))} {NAMES[times.best]}" if times.best else "–",
            f"{_over(times.over_best(times.auto))} {taken}" if times.best else "–",
        ]
    return shown


def _cost_table(rows: Sequence[Row]) -> Markup:
    names = ("memory", "of q + k + v + out", "error forward", "error gradient")
    head = [Column("cell"), *(Column(name, "right") for name in names), Column("who could not", "text")]
    return table(head, [_cost_cells(row) for row in rows])


def _cost_cells(row: Row) -> list[str]:
    own = row.own
    extra = max(0, extra_bytes(own, row.spec) or 0) if own else None
    return [
        row.name,
        size(extra or None),
        percent(ratio(extra, held_bytes(row.spec))),
        number(ratio(own.error_forward, own.reference_error_forward) if own else None),
        number(ratio(own.error_gradient, own.reference_error_gradient) if own else None),
        listed(f"{NAMES.get(n, n)} ({r.status})" for n, r in row.by_backend.items() if r.status != "ok"),
    ]


def _over(value: float | None) -> str:
    """One time over another."""
    return "–" if value is None else f"{value:.2f}"
