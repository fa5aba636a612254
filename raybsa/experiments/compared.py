"""Compressed trainings side by side: bytes saved against bits per byte lost, each seed against its own baseline."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from raybsa.results.record import Record
from raybsa.spec import canonical_json

HEAD = (
    f"{'codec':32s}{'seeds':>6s}{'fewer bytes':>13s}{'bits a byte':>13s}{'gap':>9s}{'worst gap':>11s}{'s a step':>10s}"
)


class Compared(NamedTuple):
    """A codec's trainings of one question.

    Args:
        codec: its name and parameters.
        seeds: trainings that have an uncompressed one of their seed.
        fewer: uncompressed bytes / bytes sent.
        bits: bits per held-out byte, the mean over seeds.
        gap, worst: relative to the uncompressed training of the same seed, mean and largest.
        step_seconds: mean.
    """

    codec: str
    seeds: int
    fewer: float
    bits: float
    gap: float
    worst: float
    step_seconds: float


def compare(records: Iterable[Record]) -> list[Compared]:
    """A row for each codec and question, the fewest bytes last; seeds without an uncompressed training are left out."""
    groups: dict[str, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record.task == "compression" and record.status == "ok" and record.quality is not None:
            question, codec = _asked(record)
            groups[question][codec][record.seed] = record
    rows = []
    for codecs in groups.values():
        baselines = codecs.get("none", {})
        for codec, by_seed in codecs.items():
            pairs = [(record, baselines[seed]) for seed, record in sorted(by_seed.items()) if seed in baselines]
            if pairs:
                rows.append(_compared(codec, pairs))
    return sorted(rows, key=lambda row: row.fewer)


def line_of(row: Compared) -> str:
    return (
        f"{row.codec:32s}{row.seeds:>6d}{row.fewer:>12.1f}x{row.bits:>13.4f}{row.gap:>+9.2%}{row.worst:>+11.2%}"
        f"{row.step_seconds:>10.3f}"
    )


def codec_label(codec: dict[str, Any] | str) -> str:
    """``powersgd rank=4``."""
    if isinstance(codec, str):
        return codec
    return " ".join([codec["name"], *(f"{name}={value}" for name, value in (codec.get("params") or {}).items())])


def _asked(record: Record) -> tuple[str, str]:
    """(what all compared trainings share, the codec)."""
    spec = json.loads(record.spec)
    params = {k: v for k, v in spec["task_params"].items() if k not in ("codec", "warmup_steps")}
    question = {**spec, "seed": None, "task_params": params}
    return canonical_json(question), codec_label(spec["task_params"].get("codec", "none"))


def _compared(codec: str, pairs: list[tuple[Record, Record]]) -> Compared:
    gaps = [(own.quality or 0.0) / (plain.quality or 1.0) - 1.0 for own, plain in pairs]
    owns = [own for own, _ in pairs]
    steps = json.loads(owns[0].spec)["train_steps"]
    return Compared(
        codec,
        len(pairs),
        statistics.mean(plain.wire_bytes / own.wire_bytes for own, plain in pairs),
        statistics.mean(own.quality or 0.0 for own in owns),
        statistics.mean(gaps),
        max(gaps),
        statistics.mean((own.train_seconds or 0.0) / steps for own in owns),
    )
