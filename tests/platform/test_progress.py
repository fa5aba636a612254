"""Progress: a bar on a terminal, a plain line a trial in a log."""

import io

from raybsa.experiments.progress import Progress, summary


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_one_plain_line_a_trial(record):
    stream = io.StringIO()
    progress = Progress(2, stream)
    progress.tell(record(pattern="random", quality=2.5, quality_name="bits_per_byte", forward_backward_ms_p50=12.345))
    progress.tell(record(pattern="random", status="failed", error="ValueError: no\nsuch thing", density=None))
    first, second = stream.getvalue().splitlines()
    assert first.startswith("1/2 · 0 s · ")
    assert first.endswith("random 25% block 64: bits per byte 2.500, 12.3 ms")
    assert second.endswith("random block 64: failed: ValueError: no such thing")
    assert "\033" not in stream.getvalue()


def test_a_terminal_gets_a_bar_that_fills_up_on_one_line(record):
    stream = Terminal()
    progress = Progress(2, stream)
    progress.tell(record())
    assert stream.getvalue().startswith("\r\033[K[" + "█" * 15 + "·" * 15 + "] 1/2")
    progress.tell(record())
    assert stream.getvalue().count("\n") == 1
    assert "█" * 30 in stream.getvalue()


def test_a_bar_never_wraps_to_a_line_that_the_next_one_could_not_draw_over(record, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    Progress(2, stream).tell(record(status="failed", error="ValueError: " + "long " * 30))
    assert len(stream.getvalue().removeprefix("\r\033[K")) == 59


def test_the_dense_baseline_has_no_block_size(record):
    dense = record(variant="dense", pattern="dense", density=1.0, peak_bytes=3 << 20)
    assert summary(dense) == "dense 100%: 3.0 MiB"
