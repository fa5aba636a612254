"""Ranks that answer at once: a machine on which work halves with the ranks and nothing is lost."""

from __future__ import annotations

from typing import ClassVar

from raybsa.spec import TrialSpec
from raybsa.tasks.ring_contender import RankReport
from raybsa.tasks.ring_rank import LINK

BYTES_A_TOKEN = 4096


class MadeRing:
    """In place of ``ProcessRing``: remembers what it was asked, fails for ``failing`` and beyond ``room`` tokens."""

    asked: ClassVar[list[tuple[str, TrialSpec]]] = []
    failing: ClassVar[tuple[str, ...]] = ()
    room: ClassVar[int] = 1 << 40
    devices = 2

    def __init__(self, world_size: int, device: str) -> None:
        self._world_size = world_size

    def __enter__(self) -> MadeRing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, method: str, spec: TrialSpec, *_: float, limit_s: float) -> list:
        MadeRing.asked.append((method, spec))
        if method == "calibrate":
            return [[(LINK, 1 << size, 0, 2.0**size * 1e-6) for size in (12, 16, 20)]]
        if spec.layer(0).backend in self.failing:
            raise RuntimeError("no such luck")
        if spec.seq_len > self.room:
            raise RuntimeError("CUDA out of memory")
        return [_report(rank, spec, self._world_size) for rank in range(self._world_size)]


def _report(rank: int, spec: TrialSpec, world_size: int) -> RankReport:
    alone = spec.seq_len**2 * (spec.layer(0).density or 1.0) * 1e-5
    times = {"forward": alone / world_size, "forward_backward": 4 * alone / world_size}
    if spec.task_params["single"]:
        times |= {"single_forward": alone, "single_forward_backward": 4 * alone}
    report = RankReport(rank, "here", "two cores", 1, {name: [ms] * 3 for name, ms in times.items()})
    report.peak_bytes = BYTES_A_TOKEN * spec.seq_len // world_size
    report.errors = (1e-7, 1e-6)
    return report
