"""The store: what is written comes back, whole or not at all, on any filesystem."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from raybsa.results.__main__ import main as command_line
from raybsa.results.record import Record, SeriesPoint
from raybsa.results.rows import to_parquet
from raybsa.results.store import File, Store, StoreError


@pytest.fixture(params=["local", "file-uri", "subtree", "mock"])
def store(request, tmp_path):
    """The same suite runs on every kind of place."""
    if request.param == "local":
        return Store.create(tmp_path / "out")
    if request.param == "file-uri":
        return Store.create((tmp_path / "out").as_uri())
    if request.param == "subtree":
        return Store.create("out", filesystem=fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))
    return Store.create("out", filesystem=fs.FileSystem.from_uri("mock://")[0])


def test_a_record_comes_back_equal(store, record):
    full = record(quality=1.5, peak_bytes=1 << 40, failures_survived=2, error="a 'quoted' line\nand another – ü")
    store.write_record(full)
    assert store.read_records() == [full]


def test_series_come_back_in_order(store):
    points = [SeriesPoint("run-000", "loss", step, 0, 1.0 / (step + 1)) for step in (2, 0, 1)]
    store.write_series(points)
    store.write_series([SeriesPoint("run-001", "loss", 0, 0, 9.0)])
    assert [(p.trial_id, p.step) for p in store.read_series()] == [
        ("run-000", 0), ("run-000", 1), ("run-000", 2), ("run-001", 0)
    ]  # fmt: skip


def test_writing_a_trial_again_replaces_it(store, record):
    store.write_record(record(quality=1.0))
    store.write_record(record(quality=2.0))
    assert [r.quality for r in store.read_records()] == [2.0]


def test_compaction_keeps_every_trial_once_and_leaves_one_file(store, record):
    written = [record(f"run-{i:03d}", quality=float(i)) for i in range(5)]
    for one in written:
        store.write_record(one)
        store.write_series([SeriesPoint(one.trial_id, "loss", 0, 0, 1.0)])
    assert store.compact() == 5
    assert store.read_records() == written
    assert len(store.read_series()) == 5
    assert len(store.files("records")) == len(store.files("series")) == 1


def test_the_command_line_compacts_and_says_what_it_did(tmp_path, record, capsys):
    store = Store.create(tmp_path)
    for i in range(3):
        store.write_record(record(f"run-{i:03d}"))
    assert command_line(["compact", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"3 records in one file under {tmp_path}\n"
    assert len(os.listdir(tmp_path / "records")) == 1
    assert len(store.read_records()) == 3


def test_the_command_line_says_where_it_found_nothing(tmp_path, capsys):
    assert command_line(["compact", str(tmp_path / "nowhere")]) == 1
    assert "found none under" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_a_trial_written_after_compaction_wins_over_its_compacted_row(store, record):
    for i in range(2):
        store.write_record(record(f"run-{i:03d}", quality=0.0))
    store.compact()
    store.write_record(record("run-001", quality=7.0))
    assert [r.quality for r in store.read_records()] == [0.0, 7.0]
    assert store.compact() == 2
    assert [r.quality for r in store.read_records()] == [0.0, 7.0]


def test_a_crash_between_compaction_and_deletion_doubles_no_row(store, monkeypatch, record):
    for i in range(3):
        store.write_record(record(f"run-{i:03d}"))
    before = store.files("records")
    with monkeypatch.context() as patch:
        patch.setattr(store, "_fs", UndeletableFileSystem(store._fs))
        with pytest.raises(KeyboardInterrupt):
            store.compact()
    assert len(store.files("records")) == len(before) + 1
    assert len(store.read_records()) == 3


class UndeletableFileSystem:
    """Passes everything through but a deletion, at which the process is interrupted."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def delete_file(self, path):
        raise KeyboardInterrupt


def test_a_reader_starts_over_when_a_compaction_takes_its_files_away(store, monkeypatch, record):
    for i in range(3):
        store.write_record(record(f"run-{i:03d}"))
    listings = iter([[*store.files("records"), File(f"{store._path}/records/gone.parquet", 0, 0)]])
    real = store.files
    monkeypatch.setattr(store, "files", lambda kind: next(listings, None) or real(kind))
    assert len(store.read_records()) == 3


def test_temporary_and_foreign_files_are_not_read(tmp_path, record):
    store = Store.create(tmp_path)
    store.write_record(record())
    (tmp_path / "records" / ".run-001.parquet.77.tmp").write_bytes(b"PAR1 torn")
    (tmp_path / "records" / ".hidden.parquet").write_bytes(b"PAR1 torn")
    (tmp_path / "records" / "notes.txt").write_text("hello")
    assert len(store.read_records()) == 1


def test_a_process_killed_while_it_writes_leaves_no_half_record(tmp_path, record):
    script = f"""
import os, signal
from raybsa.results import store
from tests_record import record
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.Store({str(tmp_path)!r}).write_record(record())
"""
    (tmp_path / "tests_record.py").write_text(
        f"from raybsa.results.record import Record\ndef record(): return {record()!r}"
    )
    Store.create(tmp_path)
    died = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False)
    assert died.returncode == -9
    assert os.listdir(tmp_path / "records"), "the kill must come while the temporary file is there"
    assert Store(tmp_path).read_records() == []


def test_a_failed_write_takes_its_temporary_file_along(tmp_path, monkeypatch, record):
    store = Store.create(tmp_path)

    def refuse(*_):
        raise OSError("no rename today")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no rename today"):
        store.write_record(record())
    assert os.listdir(tmp_path / "records") == []


def test_columns_that_an_older_schema_lacks_are_none_and_unknown_ones_are_ignored(tmp_path, record):
    old = asdict(record())
    for name in ("peak_bytes", "wire_bytes", "schema_version"):
        del old[name]
    Store.create(tmp_path)
    pq.write_table(pa.Table.from_pylist([{**old, "a_later_column": 1}]), tmp_path / "records" / "old.parquet")
    (read,) = Store(tmp_path).read_records()
    assert (read.peak_bytes, read.wire_bytes, read.schema_version) == (None, None, None)
    assert read == replace(record(), wire_bytes=None, schema_version=None)


def test_the_columns_are_the_fields_in_their_order(tmp_path, record):
    store = Store.create(tmp_path)
    store.write_record(record())
    schema = pq.read_schema(tmp_path / "records" / "run-000.parquet")
    assert schema.names == [field.name for field in fields(Record)]
    assert schema.field("quality").type == pa.float64()
    assert schema.field("peak_bytes").type == pa.int64()


def test_a_path_under_a_file_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"can be written, got '.*file/out'"):
        Store.create(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="can be written"):
        Store.create(tmp_path)


def test_an_unknown_kind_of_place_is_refused():
    with pytest.raises(StoreError, match=r"pyarrow\.fs URI, got 'nowhere://x'"):
        Store.create("nowhere://x")


def test_an_empty_place_reads_as_no_records(tmp_path):
    assert Store(tmp_path / "nothing here").read_records() == []


def damaged_page(path, record):
    """A Parquet file whose footer is whole and whose pages are not: of it pyarrow says OSError."""
    rows = [record(f"old-{number}", error="x" * 500) for number in range(50)]
    data = bytearray(to_parquet(Record, rows))
    data[100 : len(data) // 2] = b"\xff" * (len(data) // 2 - 100)
    path.write_bytes(data)


def foreign(path, record):
    pq.write_table(pa.table({"name": ["somebody's own"]}), path)


def other_type(path, record):
    pq.write_table(pa.Table.from_pylist([{**asdict(record("bad")), "quality": "good"}]), path)


BAD = {
    "no parquet": lambda path, record: path.write_bytes(b"hello"),
    "empty": lambda path, record: path.write_bytes(b""),
    "a damaged page": damaged_page,
    "somebody else's": foreign,
    "a column of another type": other_type,
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_a_bad_file_hides_no_other_and_is_named_once(tmp_path, make, record, capfd):
    store = Store.create(tmp_path)
    for number in range(2):
        store.write_record(record(f"run-{number:03d}"))
    bad = tmp_path / "records" / "bad.parquet"
    make(bad, record)
    before = bad.read_bytes()
    for reader in (store, Store(tmp_path), Store(tmp_path)):
        assert [row.trial_id for row in reader.read_records()] == ["run-000", "run-001"]
    assert capfd.readouterr().err.count("bad.parquet") == 1
    assert store.compact() == 2
    assert sorted(file.is_compacted for file in store.files("records")) == [False, True]
    assert bad.read_bytes() == before, "what cannot be read is not joined, so it stays"


def test_compaction_leaves_columns_alone_that_it_would_lose(tmp_path, record):
    store = Store.create(tmp_path)
    for number in range(2):
        store.write_record(record(f"run-{number:03d}"))
    newer = tmp_path / "records" / "newer.parquet"
    pq.write_table(pa.Table.from_pylist([{**asdict(record("newer")), "a_later_column": 1}]), newer)
    assert store.compact() == 3
    assert pq.read_table(newer).column("a_later_column").to_pylist() == [1]


def test_two_compactions_at_once_lose_nothing_and_neither_complains(tmp_path, monkeypatch, record):
    store, other = Store.create(tmp_path), Store(tmp_path)
    written = [record(f"run-{number:03d}") for number in range(3)]
    for one in written:
        store.write_record(one)
    put = store._put
    monkeypatch.setattr(store, "_put", lambda path, data: (put(path, data), other.compact()))
    assert store.compact() == 3
    assert store.read_records() == written


def test_a_trial_that_is_written_while_a_compaction_runs_keeps_its_newer_row(tmp_path, monkeypatch, record):
    store = Store.create(tmp_path)
    for number in range(2):
        store.write_record(record(f"run-{number:03d}", quality=0.0))
    put = store._put

    def late(path, data):
        put(path, data)
        Store(tmp_path).write_record(record("run-001", quality=7.0, error="longer"))

    with monkeypatch.context() as patch:
        patch.setattr(store, "_put", late)
        store.compact()
    assert [row.quality for row in store.read_records()] == [0.0, 7.0]


def test_the_next_run_takes_away_what_a_killed_writer_left(tmp_path):
    Store.create(tmp_path)
    died = subprocess.Popen(["true"])
    died.wait()
    here = socket.gethostname()
    left = tmp_path / "records" / f".run-001.parquet.{here}.{died.pid}.0a1b2c3d.tmp"
    living = tmp_path / "records" / f".run-002.parquet.{here}.{os.getpid()}.0a1b2c3d.tmp"
    own = tmp_path / "records" / ".notes.tmp"
    for file in (left, living, own):
        file.write_text("half")
    Store.create(tmp_path)
    assert [file.exists() for file in (left, living, own)] == [False, True, True]


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden"])
def test_a_trial_id_that_is_no_file_name_is_refused(tmp_path, name, record):
    with pytest.raises(ValueError, match="a trial id holds letters"):
        Store.create(tmp_path).write_record(record(name))


def test_series_of_two_trials_at_once_are_refused(tmp_path):
    points = [SeriesPoint(t, "loss", 0, 0, 0.0) for t in ("a", "b")]
    with pytest.raises(ValueError, match=r"one trial at a time, got points of \['a', 'b'\]"):
        Store.create(tmp_path).write_series(points)


def test_a_folder_of_somebody_elses_is_no_place_for_results_unless_it_is_adopted(tmp_path, record):
    (tmp_path / "front").mkdir()
    (tmp_path / "front" / "index.html").write_text("my web page")
    with pytest.raises(StoreError, match=r"a folder of their own, got .*which holds front: .*say --adopt"):
        Store.create(tmp_path, adopt=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front"], "nothing was made"
    Store.create(tmp_path, adopt=True).write_record(record())
    assert len(Store.create(tmp_path, adopt=False).read_records()) == 1, "once adopted it is a folder of results"
    assert (tmp_path / "front" / "index.html").read_text() == "my web page"


def test_results_of_a_version_without_the_mark_are_gone_on_with(tmp_path, record):
    store = Store.create(tmp_path)
    store.write_record(record())
    shutil.rmtree(tmp_path / ".raybsa")
    assert Store.create(tmp_path, adopt=False).read_records() == [record()]


def test_only_what_was_written_here_and_not_changed_since_is_replaced_or_deleted(store):
    for name in ("front/01/best.json", "front/02/best.json"):
        store.write_file(name, b"ours")
    store._put(f"{store._path}/front/02/best.json", b"changed by its user")
    store._put(f"{store._path}/report.html", b"somebody else's")
    store.write_file("front/01/best.json", b"ours, newer")
    for taken in ("front/02/best.json", "report.html"):
        with pytest.raises(StoreError, match="which no job wrote: it stays as it is"):
            store.write_file(taken, b"ours")
    assert store.made("front") == ["front/01/best.json"]
    assert [store.free_name(name) for name in ("front/01/best.json", "report.html")] == [
        "front/01/best.json", "report-2.html"
    ]  # fmt: skip
    store.delete_made("front")
    assert store.made("front") == []
    assert store.read_file("front/02/best.json") == b"changed by its user"
    assert store.read_file("report.html") == b"somebody else's"
    with pytest.raises(FileNotFoundError):
        store.read_file("front/01/best.json")
