"""The ring's figures, its section of the report, and the forecast's page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dashboards.figures.ring_scaling import RingLine, RingPoint, ring_efficiency_plot, ring_scaling_info, ring_time_plot
from dashboards.figures.ring_timeline import timeline_info, timeline_plot
from dashboards.forecast import forecast_page
from dashboards.frames import trial_of
from dashboards.report import write_report
from dashboards.scalings import measured_scalings, preset_scalings
from dashboards.sections.ring import ring_lines
from dashboards.theme import colour
from raybsa.experiments.forecast import RingRow, can_forecast, compare, fit_rows, forecast, ring_rows
from raybsa.results.record import Record, SeriesPoint
from raybsa.results.store import Store
from raybsa.ring.cost import predict
from raybsa.ring.hardware import PRESETS, Hardware
from tests.dashboards.made import a_benchmark
from tests.dashboards.made_ring import (
    MACHINE,
    a_ring_benchmark,
    link_points,
    ring_record,
    ring_spec,
    step_points,
    step_spans,
)

HOSTILE = "<img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def rows() -> list[RingRow]:
    return ring_rows(a_ring_benchmark())


@pytest.fixture(scope="module")
def fitted(rows: list[RingRow]) -> Hardware:
    return fit_rows(rows, link_points(rows[0].record.trial_id))


def report_of(folder: Path, records: list[Record], series: list[SeriesPoint]) -> str:
    store = Store.create(folder / "results")
    for record in records:
        store.write_series(point for point in series if point.trial_id == record.trial_id)
        store.write_record(record)
    return Path(write_report(str(folder / "results"), str(folder / "report.html"))).read_text("utf-8")


def test_a_timeline_adds_up_what_all_ranks_did() -> None:
    info = timeline_info(step_spans())
    assert info is not None
    assert (info.compute_ms, info.transfer_ms, info.wait_ms) == pytest.approx((16.0, 10.0, 1.0))
    assert info.waited == pytest.approx(0.1)
    assert info.ranks == [0, 1]
    assert "waits for K, V, hop 1" in [bar.text for bar in info.bars]
    assert not any("call" in bar.text for bar in info.bars), "agreements are no part of the step's work"
    assert timeline_info([]) is None


def test_the_timeline_draws_a_lane_a_rank_and_kind() -> None:
    info = timeline_info(step_spans())
    assert info is not None
    figure = timeline_plot(info)
    lanes = ("compute", "transfer", "wait")
    assert list(figure.layout.yaxis.ticktext) == [
        f"rank {r} compute" if x == "compute" else x for r in (0, 1) for x in lanes
    ]
    lengths = {trace.marker.color: sum(trace.x) for trace in figure.data}
    assert lengths == pytest.approx({colour("compute"): 16.0, colour("transfer"): 10.0, colour("wait"): 1.0})
    assert figure.layout.xaxis.range[1] == pytest.approx(10.1)


def test_a_line_joins_the_ranks_of_one_question_and_one_rank_belongs_to_every_partition() -> None:
    lines = {line.name: line for line in ring_lines([trial_of(record) for record in a_ring_benchmark()])}
    assert len(lines) == 5
    contiguous = next(line for name, line in lines.items() if name.endswith("4K, contiguous"))
    assert [point.ranks for point in contiguous.measured] == [1, 2, 4]
    assert [point.crowded for point in contiguous.measured] == [False, False, True]
    assert contiguous.measured[0].efficiency == pytest.approx(1.0)


def test_measured_is_solid_forecast_is_dashed_and_crowded_ranks_are_open() -> None:
    measured = [RingPoint(1, 100.0, 100.0), RingPoint(4, 50.0, 100.0, crowded=True)]
    line = RingLine("window", 0.1, measured, [RingPoint(n, 100.0 / n, 100.0) for n in (1, 32, 1024)])
    info = ring_scaling_info([line, RingLine("nothing", None, [], [])])
    assert info is not None
    assert info.lines == [line]
    assert ring_scaling_info([]) is None
    for figure, value in ((ring_time_plot(info), 50.0), (ring_efficiency_plot(info), 50.0)):
        dashed = [trace for trace in figure.data if trace.line.dash == "dash"]
        (solid,) = [trace for trace in figure.data if trace.line.dash == "solid"]
        assert [list(trace.x) for trace in dashed] == [[1, 32, 1024]]
        assert list(dashed[0].text) == ["forecast"] * 3
        assert list(solid.text) == ["measured", "measured, ranks shared cores"]
        assert list(solid.y) == [100.0, value]
        assert solid.marker.color[1] == colour("card") != solid.marker.color[0]


def test_lines_of_one_colour_differ_in_points_and_dashes_and_their_names_say_which() -> None:
    points = [RingPoint(n, 100.0 / n, 100.0) for n in (1, 2)]
    lines = [RingLine("bigbird", 0.1, points, points), RingLine("window", 0.1, [], points)]
    info = ring_scaling_info([*lines, RingLine("dense", 1.0, points, [])])
    assert info is not None
    assert info.shares_colours
    for figure in (ring_time_plot(info), ring_efficiency_plot(info)):
        names = [label.text for label in figure.layout.annotations]
        assert names == ["● bigbird", "–·– window", "dense"]
        drawn = [trace for trace in figure.data if trace.line.dash != "dot"]
        assert [trace.line.dash for trace in drawn] == ["dash", "solid", "dashdot", "solid"]
    both = ring_scaling_info([line._replace(measured=points) for line in lines])
    assert both is not None
    solid = [trace for trace in ring_time_plot(both).data if trace.line.dash == "solid"]
    assert [trace.marker.symbol for trace in solid] == ["circle", "square"]
    alone = ring_scaling_info(lines[:1])
    assert alone is not None
    assert not alone.shares_colours


def test_long_times_are_drawn_in_seconds() -> None:
    info = ring_scaling_info([RingLine("dense", 1.0, [], [RingPoint(1, 2e6, 2e6), RingPoint(2, 1e6, 2e6)])])
    assert info is not None
    figure = ring_time_plot(info)
    assert figure.layout.yaxis.title.text.startswith("s,")
    assert list(figure.data[1].y) == [2000.0, 1000.0]


def test_the_report_shows_the_ring_only_where_one_was_measured(tmp_path: Path) -> None:
    records = [*a_ring_benchmark(), ring_record("hostile", ring_spec(2), device_name=HOSTILE, partition=HOSTILE)]
    page = report_of(tmp_path / "ring", records, step_points(records[1].trial_id))
    assert re.findall(r'<section id="(\w+)"', page) == ["quality", "speed", "ring", "patterns", "failures"]
    text = page.replace("\xa0", " ")
    assert "only waited for them in 1 ms of it (10 %)" in text
    assert "the ranks had to share 2 cores" in text
    assert "ring: 4 heads × 64" in text
    assert "trained at" not in text
    assert "<img src=x" not in page
    plain = report_of(tmp_path / "plain", a_benchmark()[:2], [])
    assert 'id="ring"' not in plain


def test_rows_of_the_formula_are_fitted_and_predicted_without_error(rows: list[RingRow], fitted: Hardware) -> None:
    compared = compare(rows, fitted)
    assert max(abs(error) for c in compared for error in c.errors) < 1e-3
    assert fitted.workspace_bytes == pytest.approx(1 << 20)
    assert fitted.devices == 2
    slower = fit_rows(rows, [SeriesPoint(rows[0].record.trial_id, "crowding", 2, 0, 1.4)])
    assert (slower.slow(2), slower.slow(4), fitted.slow(2), fitted.slow(4)) == (1.4, 2.0, 1.0, 2.0)
    with pytest.raises(ValueError, match="rows of one device, got no rows"):
        fit_rows([], [])
    other = ring_rows([ring_record("other", ring_spec(1), device_name="another")])
    with pytest.raises(ValueError, match="rows of one device"):
        fit_rows([*rows, *other], [])


def test_rows_of_one_rank_are_enough_to_fit_and_those_of_several_take_no_part(rows: list[RingRow]) -> None:
    slow = ring_rows(
        ring_record(f"slow-{i}", row.spec, forward_ms_p50=1e6) for i, row in enumerate(rows) if row.world_size > 1
    )
    alone = [row for row in rows if row.world_size == 1]
    for kernel, wanted in zip(fit_rows([*alone, *slow], []).kernels, fit_rows(rows, []).kernels, strict=True):
        assert kernel.direction == wanted.direction
        assert (kernel.rate, kernel.row_blocks, kernel.call_s) == pytest.approx(
            (wanted.rate, wanted.row_blocks, wanted.call_s)
        )


def test_the_forecast_goes_from_what_was_measured_to_many_ranks(rows: list[RingRow], fitted: Hardware) -> None:
    as_measured, large, weak = measured_scalings(rows, fitted, 256)
    window = next(line for line in as_measured.lines if line.name.startswith("sink window · 20"))
    assert [point.ranks for point in window.measured] == [1, 2, 4]
    assert [point.ranks for point in window.forecast] == [1, 2, 4, 8, 16, 32, 64, 128], "a rank needs a block"
    assert all(not line.measured and line.forecast[-1].ranks == 256 for line in large.lines)
    grown = next(line for line in weak.lines if "20" in line.name)
    assert [point.ranks for point in grown.measured] == [1, 2, 4]


def test_what_has_no_statistics_is_left_out_and_a_pattern_of_its_own_width_is_not() -> None:
    def asked(family: str, density: float | None, partition: str = "contiguous") -> RingRow:
        (row,) = ring_rows([ring_record("row", ring_spec(2, 2048, density, partition, family))])
        return row

    own_width = asked("sliding_window", None)
    assert [can_forecast(asked(*question)) for question in (("butterfly", 0.2), ("random", None))] == [False, False]
    assert not can_forecast(asked("sink_window", 0.2, "striped"))
    assert can_forecast(own_width)
    ring, _ = forecast(own_width.spec, MACHINE, world_size=2, seq_len=2048)
    assert ring == predict(own_width.work, own_width.sizes, MACHINE)


def test_the_page_says_what_was_measured_and_what_is_a_preset(rows: list[RingRow], fitted: Hardware) -> None:
    preset = PRESETS["h200"]
    parts = [(fitted, measured_scalings(rows, fitted, 8)), (preset, preset_scalings(preset, 8))]
    page = forecast_page(compare(rows, fitted), parts)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[0] == "Prediction against measurement"
    assert re.fullmatch(r"Scaling on Intel Xeon, 2 cores \(fitted on \d+ rows\)", headings[1])
    assert headings[2].endswith("(preset, not measured here)")
    assert "no ring was measured on this hardware" in page
    assert "rows of several ranks took no part" in page
    island = re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL)
    assert island
    assert len(json.loads(island[1])["figures"]) == 1 + 6 + 4
