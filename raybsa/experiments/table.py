"""Benchmark records as the lines of a text table."""

from __future__ import annotations

from collections.abc import Sequence

from raybsa.results.record import Record, efficiencies

_COLUMNS = (
    ("computed by", 16),
    ("pattern", 16),
    ("tokens", 7),
    ("kept", 7),
    ("fwd ms", 9),
    ("dense ms", 9),
    ("of ideal", 9),
    ("f+b ms", 9),
    ("dense ms", 9),
    ("of ideal", 9),
    ("MiB", 8),
    ("err fwd", 9),
    ("err grad", 9),
)


def head_line() -> str:
    return _aligned([name for name, _ in _COLUMNS])


def line(record: Record) -> str:
    """One record; *of ideal* is the share of the ideal speed-up 1 / density, ``dense / own * density``."""
    name = [f"{record.variant}/{record.backend}", record.pattern, f"{record.seq_len}"]
    if record.error is not None:
        return f"{_aligned(name)}  failed: {' '.join(record.error.split())[:200]}"
    forward = (record.forward_ms_p50, record.dense_forward_ms_p50)
    both = (record.forward_backward_ms_p50, record.dense_forward_backward_ms_p50)
    return _aligned(
        [
            *name,
            _shown(record.density, "{:.2%}"),
            *_speed(*forward, record.density),
            *_speed(*both, record.density),
            _shown(record.peak_bytes and record.peak_bytes / 2**20, "{:.1f}"),
            _shown(record.error_forward, "{:.1e}"),
            _shown(record.error_gradient, "{:.1e}"),
        ]
    )


_RING_COLUMNS = (
    ("pattern", 16),
    ("partition", 11),
    ("ranks", 6),
    ("tokens", 7),
    ("kept", 7),
    ("fwd ms", 9),
    ("alone ms", 9),
    ("eff.", 6),
    ("f+b ms", 9),
    ("alone ms", 9),
    ("eff.", 6),
    ("MiB sent", 9),
    ("/ needed", 9),
    ("busiest", 8),
    ("err fwd", 9),
    ("err grad", 9),
)


def ring_head_line() -> str:
    return _aligned([name for name, _ in _RING_COLUMNS], _RING_COLUMNS)


def ring_line(record: Record) -> str:
    """One record of a ring; bytes are those of a forward.

    *alone*: one process with the whole sequence; *eff.*: efficiency, ``alone / (ranks · own)``; *busiest*: the most
    active blocks of a rank over their mean.
    """
    name = [record.pattern, f"{record.partition}", f"{record.world_size}", f"{record.seq_len}"]
    if record.error is not None:
        return f"{_aligned(name, _RING_COLUMNS)}  failed: {' '.join(record.error.split())[:200]}"
    sent, needed = record.wire_forward_bytes, record.needed_forward_bytes
    forward, both = efficiencies(record)
    return _aligned(
        [
            *name,
            _shown(record.density, "{:.2%}"),
            _shown(record.forward_ms_p50, "{:.2f}"),
            _shown(record.single_forward_ms_p50, "{:.2f}"),
            _shown(forward, "{:.0%}"),
            _shown(record.forward_backward_ms_p50, "{:.2f}"),
            _shown(record.single_forward_backward_ms_p50, "{:.2f}"),
            _shown(both, "{:.0%}"),
            _shown(sent and sent / 2**20, "{:.2f}"),
            _shown(sent / needed if sent and needed else None, "{:.3f}"),
            _shown(record.imbalance, "{:.3f}"),
            _shown(record.error_forward, "{:.1e}"),
            _shown(record.error_gradient, "{:.1e}"),
        ],
        _RING_COLUMNS,
    )


def _speed(own: float | None, dense: float | None, density: float | None) -> list[str]:
    share = dense / own * density if own and dense and density else None
    return [_shown(own, "{:.2f}"), _shown(dense, "{:.2f}"), _shown(share, "{:.0%}")]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _aligned(cells: list[str], columns: Sequence[tuple[str, int]] = _COLUMNS) -> str:
    """The first two columns to the left, numbers to the right; fewer cells than columns are a line's beginning."""
    widths = [width for _, width in columns][: len(cells)]
    sides = ["<", "<", *[">"] * len(widths)][: len(cells)]
    placed = zip(cells, sides, widths, strict=True)
    return " ".join(f"{cell:{side}{width}}" for cell, side, width in placed).rstrip()
