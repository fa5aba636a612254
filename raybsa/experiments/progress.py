"""Progress of a long job: a bar on a terminal, one plain line a trial in a log."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from raybsa.printable import printable
from raybsa.results.record import Record

_BAR = 30


class Progress:
    """Tells about each record as it comes.

    Args:
        total: how many records there will be, ``count`` of them from before.
        stream: a bar is drawn where it is a terminal; of any encoding.
    """

    def __init__(self, total: int, stream: TextIO | None = None, count: int = 0) -> None:
        self._total, self._count, self._started = total, count, time.monotonic()
        self._stream = printable(stream or sys.stdout)

    def tell(self, record: Record) -> None:
        self._count += 1
        seconds = time.monotonic() - self._started
        text = f"{self._count}/{self._total} · {seconds:.0f} s · {summary(record)}"
        if self._stream.isatty():
            filled = _BAR * self._count // self._total
            end = "\n" if self._count == self._total else ""
            shown = f"[{'█' * filled}{'·' * (_BAR - filled)}] {text}"
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be drawn over
            self._stream.write(f"\r\033[K{shown[:width]}{end}")
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()


def summary(record: Record) -> str:
    """One line: the attention and what was measured."""
    name = record.pattern if record.density is None else f"{record.pattern} {record.density:.0%}"
    if record.pattern != record.variant:
        name += f" block {record.block_size}"
    if record.world_size is not None:
        name += f" on {record.world_size} ranks"
    if record.error is not None and record.status != "pruned":
        return f"{name}: failed: {' '.join(record.error.split())[:200]}"
    found = [f"{record.forward_backward_ms_p50:.3g} ms"] if record.forward_backward_ms_p50 is not None else []
    if record.quality is not None:
        found.insert(0, f"{(record.quality_name or 'quality').replace('_', ' ')} {record.quality:.3f}")
    if record.peak_bytes is not None:
        found.append(f"{record.peak_bytes / (1 << 20):.1f} MiB")
    if record.status == "pruned":
        found.append(f"{record.error}")
    return f"{name}: {', '.join(found)}"
