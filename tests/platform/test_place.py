"""How a job ends: bad input with 2, a failure with 1, one line on stderr each."""

from __future__ import annotations

import os

import pytest

from raybsa.experiments.place import FAILED, absolute, ending, refusing


def test_bad_input_is_one_line_and_a_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/jobs/train.py"])
    with pytest.raises(SystemExit) as ended, ending(FAILED, ValueError), refusing():
        raise ValueError("a word was wanted,\n  got two")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "jobs/train.py: a word was wanted, got two\n"


def test_what_fails_later_has_another_code_and_what_was_not_named_goes_through(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["jobs/train.py"])
    with pytest.raises(SystemExit) as ended, ending(FAILED, OSError):
        raise OSError("no space left")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "jobs/train.py: no space left\n"
    with pytest.raises(KeyError), ending(FAILED, OSError), refusing():
        raise KeyError("a mistake of ours")


def test_a_path_that_no_shell_has_seen_means_what_a_shell_would_make_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ``--out=~/results`` bash leaves the tilde alone."""
    monkeypatch.setenv("HOME", "/home/ann")
    found = [absolute("--out", path) for path in ("~/results", "~", "results", "/results", "s3://bucket/~", "a~/b")]
    here = os.getcwd()
    wanted = ["/home/ann/results", "/home/ann", f"{here}/results", "/results", "s3://bucket/~", f"{here}/a~/b"]
    assert found == wanted
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert absolute("--out", "~/results") == "/home/ann/results"


@pytest.mark.parametrize("path", ["s3:/bucket/results", "gs:bucket", "abfss:/x", "file:/tmp/results", "minio:/x"])
def test_a_uri_with_too_few_slashes_is_no_folder_of_that_name(path: str) -> None:
    with pytest.raises(ValueError, match=f"a URI begins with {path.partition(':')[0]}://, .* got '{path}'"):
        absolute("--out", path)
    assert absolute("--out", f"./{path}") == os.path.abspath(f"./{path}")
