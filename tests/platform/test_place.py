"""How a job ends: bad input with 2, a failure with 1, one line on stderr each."""

from __future__ import annotations

import pytest

from raybsa.experiments.place import FAILED, ending, refusing


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
