"""A folder that is watched: what is new is read, what was read is not read again."""

from __future__ import annotations

from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raybsa.results.record import SeriesPoint
from raybsa.results.store import Store
from raybsa.results.watched import Curves, Records
from tests.dashboards.made import DENSE, lm_record


def same(record):
    return record


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store that writes down which files were read."""
    made = Store.create(tmp_path)
    made.asked = []
    real = made.table
    monkeypatch.setattr(made, "table", lambda path: made.asked.append(path.rpartition("/")[2]) or real(path))
    return made


def test_only_new_and_replaced_files_are_read(store):
    watched = Records(store, same)
    assert not watched.look(), "an empty folder holds nothing new"
    for name in ("a", "b"):
        store.write_record(lm_record(name, DENSE, 2.0, 9.0))
    assert watched.look()
    assert watched.read(60) == 2
    assert not watched.look()
    assert watched.read(60) == 0
    store.write_record(lm_record("b", DENSE, 1.5, 9.0))
    store.write_record(lm_record("c", DENSE, 1.0, 9.0))
    assert watched.look()
    assert watched.read(60) == 2
    assert sorted(store.asked) == ["a.parquet", "b.parquet", "b.parquet", "c.parquet"]
    assert sorted(record.quality for record in watched.rows) == [1.0, 1.5, 2.0]


def test_reading_stops_when_its_time_is_up_and_goes_on_later_the_newest_first(store):
    for name in ("a", "b", "c"):
        store.write_record(lm_record(name, DENSE, 2.0, 9.0))
    watched = Records(store, same)
    watched.look()
    assert watched.read(0) == 1
    assert (watched.unread, [record.trial_id for record in watched.rows]) == (2, ["c"])
    assert [watched.read(0), watched.read(0), watched.read(0)] == [1, 1, 0]


def test_a_compaction_changes_no_row(store):
    for name in ("a", "b"):
        store.write_record(lm_record(name, DENSE, 2.0, 9.0))
        store.write_series([SeriesPoint(name, "loss", 0, 0, 1.0)])
    watched, curves = Records(store, same), Curves(store)
    watched.look(), watched.read(60), curves.look()
    before, points = {r.trial_id: r for r in watched.rows}, dict(curves)
    store.compact()
    assert watched.look()
    assert curves.look()
    watched.read(60)
    assert {r.trial_id: r for r in watched.rows} == before
    assert dict(curves) == points
    assert len(curves) == 2


def test_what_cannot_be_read_is_told_and_hides_nothing_else(store, tmp_path):
    store.write_record(lm_record("good", DENSE, 2.0, 9.0))
    store.write_record(lm_record("odd", DENSE, 2.0, 9.0))
    (tmp_path / "records" / "torn.parquet").write_bytes(b"not Parquet")

    def parse(record):
        if record.trial_id == "odd":
            raise ValueError("odd is odd")
        return record.trial_id

    watched = Records(store, parse)
    watched.look(), watched.read(60)
    assert watched.rows == ["good"]
    assert any("torn.parquet" in problem for problem in watched.problems)
    assert "odd is odd" in watched.problems


def test_a_row_of_an_older_schema_lacks_what_it_lacks(store, tmp_path):
    row = {k: v for k, v in asdict(lm_record("old", DENSE, 2.0, 9.0)).items() if k not in ("library", "wire_bytes")}
    pq.write_table(pa.Table.from_pylist([{**row, "of the future": 1}]), tmp_path / "records" / "old.parquet")
    watched = Records(store, same)
    watched.look(), watched.read(60)
    assert (watched.rows[0].quality, watched.rows[0].library, watched.rows[0].wire_bytes) == (2.0, None, None)


def test_curves_are_read_when_they_are_asked_for(store):
    for name in ("a", "b"):
        store.write_series([SeriesPoint(name, "loss", step, 0, 1.0) for step in range(3)])
    curves = Curves(store)
    assert curves.look()
    assert [point.step for point in curves["b"]] == [0, 1, 2]
    assert curves["b"]
    assert store.asked == ["b.parquet"]
    assert curves.get("nobody", ()) == ()
