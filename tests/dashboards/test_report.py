"""The page: complete, self-contained, and nothing that a row says is ever HTML."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dashboards.frames import load
from dashboards.markup import Column, data_island, element, html, table
from dashboards.report import main, write_own_report, write_report
from raybsa.results.record import Record
from raybsa.results.store import Store
from raybsa.spec import TrialSpec
from tests.dashboards.made import DENSE, a_benchmark, lm_failure, lm_record, sparse

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def page_of(folder: Path, *records: Record) -> str:
    store = Store.create(folder / "results")
    for record in records:
        store.write_record(record)
    return Path(write_report(str(folder / "results"), str(folder / "report.html"))).read_text("utf-8")


def without_plotly(page: str) -> str:
    """The page without its largest script, which is Plotly's own."""
    return page.replace(max(re.findall(r"<script>.*?</script>", page, re.DOTALL), key=len), "")


def test_plain_text_is_escaped_and_markup_is_not() -> None:
    inner = element("b", "1 < 2 & 3", title='"quoted"')
    assert html(inner) == '<b title="&quot;quoted&quot;">1 &lt; 2 &amp; 3</b>'
    outer = element("p", inner, None, "<i>", class_="note", hidden=False)
    assert html(outer) == f'<p class="note">{html(inner)}&lt;i&gt;</p>'


def test_a_table_gives_each_cell_the_class_of_its_column() -> None:
    made = html(table([Column("name"), Column("ms", "right")], [["<a>", "3"]]))
    assert '<td>&lt;a&gt;</td><td class="right">3</td>' in made


def test_no_text_can_leave_a_data_island() -> None:
    island = data_island("x", {"text": HOSTILE})
    assert island.count("<") == 2
    assert json.loads(island[island.index(">") + 1 : -len("</script>")]) == {"text": HOSTILE}


def test_the_page_holds_every_section_and_plotly_once(tmp_path: Path) -> None:
    page = page_of(
        tmp_path, lm_record("d", DENSE, 2.2, 40.0), lm_record("a", sparse("bigbird"), 2.3, 9.0), *a_benchmark()
    )
    assert re.findall(r'<section id="(\w+)"', page) == ["quality", "speed", "patterns", "failures"]
    assert page.count("plotly.js v") == 1
    assert len(page) < 6_000_000
    for text in ("Intel Xeon, 2 cores", "torch 2.13.0", "Ray 2.60.0", "2026-03-01 10:01 UTC", "commit 0123456789ab"):
        assert text in page


def test_the_page_asks_the_network_for_nothing(tmp_path: Path) -> None:
    page = without_plotly(page_of(tmp_path, lm_record("d", DENSE, 2.2, 40.0)))
    assert "default-src 'none'" in page
    assert not re.findall(r"https?://|@import|<link|url\(", page)


def test_row_texts_are_never_html(tmp_path: Path) -> None:
    fields = {
        "run_id": HOSTILE,
        "device_name": HOSTILE,
        "quality_name": HOSTILE,
        "backend": HOSTILE,
        "git_commit": HOSTILE,
    }
    page = page_of(
        tmp_path,
        lm_record("a", sparse(HOSTILE), 2.3, 9.0, **fields),
        lm_record("b", sparse("bigbird", 0.1, seed=1), 2.3, 9.0, variant=HOSTILE, **fields),
        lm_failure("c", sparse(HOSTILE), f"ValueError: {HOSTILE}"),
    )
    page = without_plotly(page)
    assert "&lt;img src=x" in page
    assert "<img" not in page
    assert "<script>alert" not in page


def test_text_in_figures_is_escaped_for_plotly_too(tmp_path: Path) -> None:
    page = page_of(tmp_path, lm_record("a", sparse("bigbird"), 2.3, 9.0, quality_name="<b>bits</b>"))
    island = re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL)
    assert island
    figures = json.loads(island[1])["figures"]
    titles = [figure["layout"]["yaxis"]["title"]["text"] for figure in figures.values()]
    assert "&lt;b&gt;bits&lt;/b&gt; (lower is better)" in titles


def test_a_section_without_data_says_what_to_run(tmp_path: Path) -> None:
    only_speed = page_of(tmp_path / "speed", *a_benchmark()[:2])
    assert "No trial has measured a quality yet. Run <code>python jobs/search.py" in only_speed
    only_quality = page_of(tmp_path / "quality", lm_record("d", DENSE, 2.2, 40.0))
    assert "No speed benchmark has run yet. Run <code>python jobs/benchmark.py" in only_quality


def test_a_folder_of_failures_is_still_a_report_that_lists_them(tmp_path: Path) -> None:
    page = page_of(tmp_path, lm_failure("broken-7", sparse("strided"), "OutOfMemoryError: wanted 3 GiB"))
    assert "broken-7" in page
    assert "OutOfMemoryError: wanted 3 GiB" in page
    assert "No trial has finished yet" in page


def test_the_command_prints_the_path_that_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store.create(tmp_path / "results").write_record(lm_record("d", DENSE, 2.2, 40.0))
    out = tmp_path / "new" / "page.html"
    assert main([str(tmp_path / "results"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_the_command_fails_with_one_line_that_names_what_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "jobs/search.py" in message
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Store.create(tmp_path / "results").write_record(lm_record("d", DENSE, 2.2, 40.0))
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "results"), "--out", str(tmp_path / "file" / "page.html")]) == 1
    assert "file" in capsys.readouterr().err


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store.create(tmp_path / "results").write_record(lm_record("d", DENSE, 2.2, 40.0))
    results, out = str(tmp_path / "results"), tmp_path / "page.html"
    for _ in range(2):
        assert main([results, "--out", str(out)]) == 0
    for own in (out.read_text("utf-8") + "<!-- my notes -->", "<h1>my page</h1>"):
        out.write_text(own, "utf-8")
        assert main([results, "--out", str(out)]) == 1
        assert "is no page that raybsa wrote, so it stays" in capsys.readouterr().err
        assert out.read_text("utf-8") == own
    (tmp_path / "results" / "report.html").write_text("<h1>my page</h1>")
    for _ in range(2):
        assert write_own_report(results) == str(tmp_path / "results" / "report-2.html")


def test_one_bad_row_one_bad_file_and_one_diverged_value_hide_nothing_else_and_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    newer = json.dumps(TrialSpec("byte_lm", (DENSE,)).to_dict() | {"new_option": 1})
    rows = [lm_record("good-1", DENSE, 2.25, 40.0), lm_record("good-2", sparse("bigbird"), 2.5, 9.0)]
    rows += [replace(lm_record("newer-1", DENSE, 2.0, 1.0), spec=newer)]
    rows += [lm_record("diverged-1", sparse("strided"), math.inf, 9.0, train_seconds=math.nan)]
    store = Store.create(tmp_path / "results")
    (tmp_path / "results" / "records" / "empty.parquet").touch()
    page = page_of(tmp_path, *rows)
    told = capfd.readouterr().err
    for name, reason in (("newer-1.parquet", "new_option"), ("empty.parquet", "must be Parquet")):
        assert [reason in line for line in told.splitlines() if name in line] == [True], "named once, with the reason"
        assert name in page
    assert "quality is inf, train_seconds is nan" in page
    assert all(trial in page for trial in ("good-1", "good-2", "diverged-1"))
    assert re.search(r"[\[:,](NaN|-?Infinity)\b", without_plotly(page)) is None, "no figure has a number that is none"
    assert [trial.id for group in load(store.root).quality_groups for trial in group] == ["good-1", "good-2"]
