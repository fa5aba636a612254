"""Results for other tools: what is written is what was measured."""

import csv

import pytest

from raybsa.results.__main__ import main
from raybsa.results.export import write_tensorboard
from raybsa.results.record import SeriesPoint
from raybsa.results.roots import one_name
from raybsa.results.store import Store


@pytest.fixture
def results(tmp_path, record):
    store = Store.create(tmp_path / "results")
    for number in range(3):
        store.write_record(
            record(f"run-{number}", pattern="bigbird", quality=2.0 + number, error='a "quoted", one' * number)
        )
        store.write_series([SeriesPoint(f"run-{number}", "train_loss", step, 0, 1.0) for step in range(4)])
    return store.root


def test_a_csv_has_a_row_a_record_and_a_column_a_field(results, tmp_path, capsys):
    path = tmp_path / "trials.csv"
    assert main(["export", results, "--csv", str(path)]) == 0
    assert f"3 records in {path}" in capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["trial_id"], float(row["quality"]), row["pattern"]) for row in rows] == [
        ("run-0", 2.0, "bigbird"),
        ("run-1", 3.0, "bigbird"),
        ("run-2", 4.0, "bigbird"),
    ]
    assert rows[1]["error"] == 'a "quoted", one'
    assert rows[0]["train_seconds"] == ""


def test_a_csv_replaces_an_export_and_no_other_file(results, tmp_path, capsys):
    path = tmp_path / "trials.csv"
    for _ in range(2):
        assert main(["export", results, "--csv", str(path)]) == 0
    path.write_text("my,own,table\n1,2,3\n")
    assert main(["export", results, "--csv", str(path)]) == 1
    assert "is no table that raybsa exported, so it stays" in capsys.readouterr().err
    assert path.read_text() == "my,own,table\n1,2,3\n"


def test_a_tensorboard_log_has_a_run_a_trial_with_its_curve_and_numbers(results, tmp_path):
    folder = tmp_path / "logs"
    assert main(["export", results, "--tensorboard", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["run-0", "run-1", "run-2"]
    written = b"".join(path.read_bytes() for path in (folder / "run-1").rglob("events.*"))
    assert written.count(b"train_loss") == 4
    assert b"quality" in written


def events(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_export_that_is_repeated_replaces_what_it_wrote_and_nothing_else(results, tmp_path, record):
    folder = tmp_path / "logs"
    (folder / "run-1").mkdir(parents=True)
    (folder / "run-1" / "events.out.tfevents.1.mine").write_bytes(b"of another program")
    assert main(["export", results, "--tensorboard", str(folder)]) == 0
    first = events(folder)
    Store(results).write_record(record("run-3"))
    assert main(["export", results, "--tensorboard", str(folder)]) == 0
    assert events(folder) == first | {f"run-3/{name}events.out.tfevents.0.raybsa" for name in ("", "hparams/")}
    assert (folder / "run-1" / "events.out.tfevents.1.mine").read_bytes() == b"of another program"
    written = b"".join(path.read_bytes() for path in (folder / "run-1").rglob("*.raybsa"))
    assert written.count(b"train_loss") == 4


HOSTILE = ["../../../evil", "..", ".", "", "/etc/evil", "a/b", "a/../../b", "n\0ul", "x" * 3000, ".hidden", "日本 \n"]


def test_no_name_of_a_row_is_a_path_out_of_the_folder(tmp_path, record):
    """Names are checked on writing; the rows that are read may be another's."""
    folder = tmp_path / "deep" / "logs"
    records = [record(name) for name in HOSTILE]
    before = events(tmp_path)
    write_tensorboard(records, [SeriesPoint(name, "loss", 0, 0, 1.0) for name in HOSTILE], str(folder))
    written = events(tmp_path) - before
    assert len(written) == 2 * len(HOSTILE), "a run each, with its hyperparameters"
    assert all(name.startswith("deep/logs/") for name in written)
    assert all(len(name.split("/")) in (4, 5) for name in written)


def test_different_names_have_different_files_and_a_plain_one_keeps_its_own():
    names = [*HOSTILE, "x" * 3001, "%", "%2E.", "..%2F", "\udce9"]
    assert len({one_name(name) for name in names}) == len(names)
    assert one_name("search-20261201-024908-1a2b-007") == "search-20261201-024908-1a2b-007"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--csv", "x.csv"], "found none"), ([], "export needs --csv or --tensorboard")],
)
def test_an_export_of_nothing_says_so(tmp_path, capsys, arguments, message):
    assert main(["export", str(tmp_path / "nowhere"), *arguments]) == 1
    assert message in capsys.readouterr().err
