"""The gpu suite in the report: the numbers behind its figures, and what the page says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dashboards.figures.peer_memory import CLAIMED, memory_info, memory_plot
from dashboards.figures.peers import SYMBOLS, peers_info, peers_plot
from dashboards.markup import html
from dashboards.report import write_report
from dashboards.sections.peers import kind, standing_table
from dashboards.theme import PALETTE, colour
from raybsa.experiments import peer_rows
from raybsa.experiments.peer_cells import cells
from raybsa.experiments.peer_rows import Row, held_bytes, rows_of
from raybsa.results.record import Record
from raybsa.results.store import Store
from raybsa.spec import PatternSpec
from tests.dashboards.made import a_benchmark
from tests.dashboards.made_peers import LAUNCH_MS, MEMORY, SHARE, a_gpu_suite

HOSTILE = "<img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return a_gpu_suite()


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """No table: auto takes our own."""
    monkeypatch.setattr(peer_rows, "table", lambda: ())


def rows(records: list[Record], name: str) -> list[Row]:
    return [row for row in rows_of(records, cells()) if re.search(name, row.name)]


def page_of(folder: Path, records: list[Record]) -> str:
    store = Store.create(folder / "results")
    for record in records:
        store.write_record(record)
    return Path(write_report(str(folder / "results"), str(folder / "report.html"))).read_text("utf-8")


def test_each_library_is_a_line_over_density_and_the_ideal_is_dense_times_density(records: list[Record]) -> None:
    info = peers_info(rows(records, "d128-32K-b128-random"), "forward")
    assert info is not None
    assert [line.backend for line in info.lines] == ["triton", "flex", "fa4", "cudnn"]
    assert [point.density for point in info.ideal] == [0.01, 0.05, 0.1, 0.5]
    assert [point.ms for point in info.ideal] == pytest.approx([14.3 * d for d in (0.01, 0.05, 0.1, 0.5)])
    for line in info.lines:
        wanted = [LAUNCH_MS[line.backend] + point.ms / SHARE[line.backend] for point in info.ideal]
        assert [point.ms for point in line.points] == pytest.approx(wanted)


def test_hover_says_how_near_the_ideal_a_mark_is_and_what_ours_takes_of_it(records: list[Record]) -> None:
    info = peers_info(rows(records, "d128-32K-b128-random-50%"), "forward_backward")
    assert info is not None
    own, flex = info.lines[0].points[0], info.lines[1].points[0]
    assert f"{4 * (0.04 + 7.15 / 0.8):.3g}" in own.told
    assert "79.6\u00a0% of ideal" in own.told
    assert own.told.endswith("auto takes it")
    assert f"ours takes {own.ms / flex.ms:.2f} of its time" in flex.told


def test_who_refused_or_has_no_backward_has_no_line(records: list[Record]) -> None:
    def backends(name: str, which: str) -> list[str]:
        info = peers_info(rows(records, name), which)
        assert info is not None
        return [line.backend for line in info.lines]

    assert backends("d128-8K-b64-global", "forward") == ["triton", "flex", "cudnn"]
    assert backends("d64-8K-b128-random", "forward_backward") == ["triton", "flex", "fa4"]
    failed = [replace(r, status="failed") for r in records if r.backend == "triton"]
    assert peers_info(rows(failed, "d128"), "forward") is None


def test_a_backend_has_one_colour_and_symbol_in_all_figures(records: list[Record]) -> None:
    info = peers_info(rows(records, "d128-8K-b128-random"), "forward")
    memory = memory_info(rows(records, "b128-random"))
    assert info is not None
    assert memory is not None
    drawn = {(t.marker.color, t.marker.symbol) for t in peers_plot(info).data if t.mode != "lines"}
    assert drawn == {(colour(backend), symbol) for backend, symbol in SYMBOLS.items()}
    also = {(t.marker.color, t.marker.symbol) for t in memory_plot(memory).data}
    assert also == drawn | {(colour("dense"), "diamond"), (colour("claim"), "x")}
    assert set(SYMBOLS) < set(PALETTE)


def test_memory_is_what_comes_on_top_of_outputs_and_gradients(records: list[Record]) -> None:
    mine = rows(records, "d128-.*b64-random")
    info = memory_info(mine)
    assert info is not None
    assert set(info.lines) == {"triton", "flex", "cudnn", "dense"}
    for backend, points in info.lines.items():
        assert [point.tokens for point in points] == [8192, 32768, 131072]
        share, kept = (0.25, 0) if backend == "dense" else (MEMORY[backend], 1 << 20)
        for point in points:
            held = next(held_bytes(row.spec) for row in mine if row.spec.seq_len == point.tokens)
            assert point.size == pytest.approx(share * held + kept, abs=2)
    claimed = next(trace for trace in memory_plot(info).data if trace.line.dash == "dash")
    assert list(claimed.x) == list(CLAIMED)
    assert list(claimed.y) == [40, 160, 640, 2560, 10240]
    assert memory_info(rows(records, "d128-8K-b64-random")) is None, "one length is no line"


def test_the_page_of_a_gpu_suite_is_about_kernels_alone(tmp_path: Path, records: list[Record]) -> None:
    short = [r for r in records if r.seq_len == 8192]
    strange = [replace(r, library=HOSTILE, error=HOSTILE) if r.backend == "fa4" else r for r in short]
    page = page_of(tmp_path, strange)
    assert re.findall(r'<section id="(\w+)"', page) == ["peers", "failures"]
    assert "On NVIDIA H100 80GB HBM3" in page
    assert "How fast are the kernels" in page
    rows = sum(cell.spec.seq_len == 8192 for cell in cells())
    assert len(re.findall(r"<td>d\d+-8K-", page)) == 2 * rows, "one in the table of times, one in that of memory"
    assert "FA4 (refused)" in page
    assert "<p>None.</p>" in page, "a refusal is no failure"
    assert "&lt;img src=x" in page
    assert "<img src=x" not in page


def test_ours_over_each_library_is_told_first(records: list[Record]) -> None:
    mine = rows(records, "d128-32K-b128-random-(1|50)%")
    found = re.findall(r"<tr>(.*?)</tr>", html(standing_table(mine)))
    table = {line[0]: line[1:] for row in found[1:] if (line := re.findall(r"<td.*?>(.*?)</td>", row))}
    own, fa4, cudnn = (
        [LAUNCH_MS[name] + 14.3 * d / SHARE[name] for d in (0.01, 0.5)] for name in ("triton", "fa4", "cudnn")
    )
    over_fa4 = [own[0] / fa4[0], own[1] / fa4[1]]
    assert over_fa4[0] < 1 < over_fa4[1]
    shown = [f"{sum(over_fa4) / 2:.2f}", f"{over_fa4[0]:.2f}", f"{over_fa4[1]:.2f}", "1 of 2"]
    assert table["ours / FA4"] == shown * 2
    assert table["ours / FlexAttention"][3] == "2 of 2"
    assert table["ours / the fastest of them"][1:3] == [f"{own[0] / min(fa4[0], cudnn[0]):.2f}", shown[2]]
    refused = html(standing_table(rows(records, "d128-32K-b64-random-1%")))
    assert "ours / cuDNN" in refused
    assert "ours / FA4" not in refused


def test_kernels_stand_beside_the_other_sections_and_draw_no_patterns(tmp_path: Path, records: list[Record]) -> None:
    few = [r for r in records if r.seq_len == 8192 and r.block_size == 64]
    page = page_of(tmp_path, [*a_benchmark()[:2], *few])
    assert re.findall(r'<section id="(\w+)"', page) == ["quality", "speed", "peers", "patterns", "failures"]
    pictures = page[page.index('<section id="patterns"') : page.index('<section id="failures"')]
    assert pictures.count("data-figure") == 1


def test_a_kind_names_a_pattern_without_its_numbers() -> None:
    parts = [{"name": "sliding_window", "params": {"window": 3}}, {"name": "global_blocks", "params": {}}]
    assert kind(PatternSpec("union", {"parts": parts})) == "sliding window + global blocks"
    assert kind(PatternSpec("sink_window", {"sink": 1})) == "sink window"
    assert kind(None) == "dense"
