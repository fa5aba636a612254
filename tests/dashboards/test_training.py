"""What the report tells of compressed gradients and of recoveries."""

from __future__ import annotations

from pathlib import Path

import pytest

from dashboards.figures.compression import loss_lines, loss_plot
from dashboards.figures.recovery import PARTS, parts_plot, recovery_info, speed_plot
from dashboards.frames import trial_of
from dashboards.report import write_report
from raybsa.experiments.compared import compare, line_of
from raybsa.results.store import Store
from tests.dashboards.made_training import LOSSES, RECOVERED, SERIES, TRAININGS


def test_a_codec_is_compared_with_the_uncompressed_training_of_its_seed() -> None:
    none, powersgd = compare(TRAININGS)
    assert (none.codec, none.fewer, none.gap) == ("none", 1.0, 0.0)
    assert (powersgd.codec, powersgd.seeds, powersgd.fewer) == ("powersgd rank=2", 2, 50.0)
    assert (powersgd.gap, powersgd.worst) == pytest.approx((0.02, 0.03)), "seed 2 has nothing to be compared with"
    assert powersgd.step_seconds == pytest.approx(0.05)
    assert "+2.00%" in line_of(powersgd)


def test_the_loss_is_drawn_against_the_bytes_that_were_sent_by_then() -> None:
    none, powersgd = loss_lines([trial_of(row) for row in TRAININGS], LOSSES)
    assert (none.kind, powersgd.kind) == ("dense", "own")
    assert none.mib == pytest.approx([250.0, 500.0, 750.0, 1000.0])
    assert powersgd.mib[-1] == pytest.approx(20.0)
    assert powersgd.loss[0] == pytest.approx(3.0)
    assert len(loss_plot([none, powersgd]).data) == 2


def test_a_recovery_has_its_parts_and_the_speed_its_gap() -> None:
    info = recovery_info(SERIES, tokens_a_step=200)
    assert info is not None
    first, second = info.parts
    assert list(first) == list(PARTS)
    assert first == pytest.approx({"detect": 0.1, "fill": 0.1, "rebuild": 0.3, "resume": 0.1})
    assert "detect" not in second, "when it struck was not recorded"
    assert info.spans[0] == pytest.approx((2.0, 2.5))
    assert [speed for _, speed in info.speed] == pytest.approx([400.0, 80.0, 400.0])
    assert len(parts_plot(info).data) == len(PARTS)
    assert len(speed_plot(info).layout.shapes) == 2
    assert recovery_info([p for p in SERIES if p.name != "applied_at"], 200) is None


def test_the_report_has_both_sections_and_leaves_compression_out_of_the_front(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "results")
    for row in (*TRAININGS, RECOVERED):
        store.write_series(point for point in (*LOSSES, *SERIES) if point.trial_id == row.trial_id)
        store.write_record(row)
    page = Path(write_report(str(tmp_path / "results"), str(tmp_path / "report.html"))).read_text("utf-8")
    assert "Compressed gradients" in page
    assert "powersgd rank=2" in page
    assert "2 recoveries of t, 4 ranks" in page
    assert "No trial has measured a quality yet" in page
