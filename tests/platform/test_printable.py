"""What is printed on a stream of any encoding: spelled in ASCII where it must be, and never an error."""

from __future__ import annotations

import io
import sys

import pytest

from raybsa.experiments.place import FAILED, ending
from raybsa.experiments.progress import Progress
from raybsa.patterns.__main__ import main as picture
from raybsa.printable import printable
from raybsa.results.__main__ import main as results

ENCODINGS = ["ascii", "latin-1", "cp1252", "koi8-r", "shift_jis", "utf-8", "utf-16"]


def stream(encoding: str, *, terminal: bool = False) -> io.TextIOWrapper:
    made = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    if terminal:
        made.isatty = lambda: True
    return made


def written(made: io.TextIOWrapper) -> str:
    made.flush()
    return made.buffer.getvalue().decode(made.encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
def test_a_line_of_progress_fits_every_encoding(record, encoding: str, terminal: bool) -> None:
    out = stream(encoding, terminal=terminal)
    progress = Progress(2, out)
    progress.tell(record(pattern="my · pattern \udce9 日本"))
    progress.tell(record(status="failed", error="ValueError: ± 2 ≤ 1 → 3"))
    assert "1/2" in written(out)
    assert "2/2" in written(out)


def test_what_an_encoding_has_stays_and_what_it_lacks_is_spelled() -> None:
    text = "1/3 · ±2 – █ é \udce9 日"
    spelled = {
        "ascii": "1/3 . +-2 - # \\xe9 \\udce9 \\u65e5",
        "latin-1": "1/3 · ±2 - # é \\udce9 \\u65e5",
        "utf-8": "1/3 · ±2 – █ é \\udce9 日",
    }
    for encoding, wanted in spelled.items():
        out = stream(encoding)
        print(text, file=printable(out))
        assert written(out) == f"{wanted}\n"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_programs_print_what_they_have_to_say_in_every_encoding(
    tmp_path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    out = stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    picture(["bigbird", "--seq-len", "512", "--causal"])
    results(["export", str(tmp_path / "nothing · here")])
    with ending(FAILED):
        print("±")
    assert "bigbird" in written(out)


def test_a_picture_in_ascii_tells_its_shades_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for encoding in ("ascii", "utf-8"):
        out = stream(encoding)
        monkeypatch.setattr(sys, "stdout", out)
        picture(["random", "--seq-len", "16384", "--causal", "--density", "0.4"])
        shown[encoding] = written(out)
    assert len(shown["ascii"]) == len(shown["utf-8"])
    assert len(set(zip(shown["ascii"], shown["utf-8"], strict=True))) == len(set(shown["utf-8"]))


def test_a_stream_of_text_holds_everything_already() -> None:
    out = io.StringIO()
    print("·", file=printable(out))
    assert out.getvalue() == "·\n"
