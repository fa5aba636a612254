"""A results folder in a cloud answers within seconds, or is told; nothing waits for quarters of an hour."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import fs

from dashboards.report import main as report
from raybsa.results import reach
from raybsa.results.store import Store, StoreError


class Cloud:
    """Stands for ``pyarrow.fs.FileSystem``: every URI finds this filesystem."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, type_name: str, answer) -> None:
        self.type_name, self.answer, self.asked = type_name, answer, []
        monkeypatch.setattr(reach, "fs", SimpleNamespace(FileSystem=self, LocalFileSystem=fs.LocalFileSystem))

    def from_uri(self, uri: str):
        self.asked.append(uri)
        return self, "bucket/results"

    def get_file_info(self, path: str):
        return self.answer()


def raising(error: Exception):
    def answer():
        raise error

    return answer


def test_a_cloud_that_never_answers_is_told_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(reach, "ANSWER_SECONDS", 0.2)
    silent = threading.Event()
    Cloud(monkeypatch, "s3", lambda: silent.wait(30))
    start = time.monotonic()
    assert report(["s3://bucket/results", "--out", str(tmp_path / "report.html")]) == 1
    with pytest.raises(StoreError, match=r"reached at 's3://bucket/results': no answer within 0 s.*credentials"):
        Store.create("s3://bucket/results")
    assert time.monotonic() - start < 10
    silent.set()


@pytest.mark.parametrize("error", [pa.ArrowException("no token"), OSError("no token"), PermissionError("no token")])
def test_whatever_a_cloud_says_is_an_error_of_the_store(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    Cloud(monkeypatch, "abfs", raising(error))
    with pytest.raises(StoreError, match=r"results cannot be reached at 'abfs://c@a.dfs.core/x': no token"):
        Store("abfs://c@a.dfs.core/x")


def test_google_s_retries_are_limited_for_the_question_and_not_for_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = Cloud(monkeypatch, "gcs", lambda: None)
    for uri in ("gs://b/x", "gs://b/x?scheme=http", "gs://b/x?retry_limit_seconds=2"):
        cloud.asked.clear()
        assert reach.filesystem_of(uri) == (cloud, "bucket/results")
        assert cloud.asked[0] == uri
        assert cloud.asked[1].count("retry_limit_seconds=") == 1
        assert cloud.asked[1].startswith(uri)


def test_a_uri_that_pyarrow_does_not_know_and_one_that_it_does(tmp_path) -> None:
    for root in ("foo://x", "s3:/x", "gs:x"):
        with pytest.raises(StoreError, match=rf"must be a local path or a pyarrow\.fs URI, got '{root}'"):
            Store(root)
    found, path = reach.filesystem_of(f"file://{tmp_path}")
    assert isinstance(found, fs.LocalFileSystem)
    assert path == str(tmp_path)
