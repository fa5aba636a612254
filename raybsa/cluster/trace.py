"""Trace: what one rank's operators, copies and kernels did in one training step, as a file that Chrome can show."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pyarrow import fs
from torch.profiler import ProfilerActivity, profile

from raybsa.scratch import scratch


@dataclass(frozen=True)
class Trace:
    """Which step is traced, and where its files go: ``rank0-step3.json`` and so on, a rank each, for
    ``chrome://tracing`` or ui.perfetto.dev.

    Args:
        folder: a local path or a URI of ``pyarrow.fs``.
        step: counted from 0; the first of a process also pays for what is made once.
    """

    folder: str
    step: int

    @contextmanager
    def of(self, step: int, rank: int, trouble: Callable[[str], None]) -> Iterator[None]:
        """Traces what runs inside, where ``step`` is the one. ``trouble`` hears of a trace that cannot be written."""
        if step != self.step:
            yield
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        with profile(activities=activities) as traced:
            yield
        name = f"rank{rank}-step{step}.json"
        try:
            self._write(name, traced)
        except OSError as error:
            trouble(f"the profile could not be written to {self.folder}/{name}: {error}")

    def _write(self, name: str, traced: profile) -> None:
        local = "://" not in self.folder
        filesystem, path = fs.FileSystem.from_uri(os.path.abspath(self.folder) if local else self.folder)
        filesystem.create_dir(path, recursive=True)
        with scratch("trace") as folder:
            made = Path(folder) / name
            traced.export_chrome_trace(str(made))
            with filesystem.open_output_stream(f"{path}/{name}") as stream:
                stream.write(made.read_bytes())
