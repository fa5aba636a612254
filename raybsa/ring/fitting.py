"""fit: Hardware from measured rows, by linear least squares of the relative error.

A kernel's seconds are linear in three unknowns (see ``hardware.Kernel``): ``call_s + a · pairs + b · rows`` with
``a = flop / rate`` and ``b = row_blocks · a``, fitted to whole sequences on one rank, by direction and block size. A
link's are linear in two, ``latency + bytes / bandwidth``, fitted to timed exchanges of known size. Each equation is
divided by its measured seconds, so that short and long calls weigh alike; a coefficient that would be negative is zero.
Rows of several ranks take no part: predicting them is the test.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from raybsa.ring.cost import Sizes, pair_flop
from raybsa.ring.hardware import Hardware, Kernel, Link, Pass
from raybsa.ring.work import Work

_NO_LINK = Link(0.0, float("inf"))


class Timed(NamedTuple):
    """A whole sequence on one rank, and how long it took in one direction."""

    work: Work
    sizes: Sizes
    direction: Pass
    seconds: float


def fit(
    name: str,
    calls: Sequence[Timed],
    messages: Sequence[tuple[int, float]],
    *,
    devices: int | None = None,
    node_size: int | None = None,
    far_link: Link | None = None,
) -> Hardware:
    """What explains the measurements best.

    Args:
        name: of the hardware.
        calls: measured on one rank; at least one of each direction.
        messages: (bytes, seconds) of single exchanges; without any, messages cost nothing.
        devices, node_size, far_link: as in ``Hardware``, given, not fitted.

    Raises:
        ValueError: no call of some direction, or a time that is not positive.
    """
    if any(call.seconds <= 0 for call in calls) or any(seconds <= 0 for _, seconds in messages):
        raise ValueError("measured seconds must be positive")
    groups: dict[tuple[Pass, int], list[Timed]] = defaultdict(list)
    for call in calls:
        groups[call.direction, call.work.q_block_size].append(call)
    missing = [str(direction) for direction in Pass if direction not in {key[0] for key in groups}]
    if missing:
        raise ValueError(f"fit needs measured calls of both directions, got none of {', '.join(missing)}")
    kernels = tuple(_kernel(*key, group) for key, group in sorted(groups.items()))
    link = _link(messages) if messages else _NO_LINK
    return Hardware(name, kernels, link, node_size, far_link, devices, fitted_on=len(calls) + len(messages))


def _kernel(direction: Pass, block_size: int, calls: Iterable[Timed]) -> Kernel:
    table = []
    for work, sizes, _, seconds in calls:
        flop = pair_flop(work, sizes, direction)
        table.append((1.0, flop * work.active.sum(), flop * work.rows.sum(), seconds))
    *columns, seconds = np.array(table).T
    call_s, a, b = _relative_least_squares(np.stack(columns, 1), seconds)
    if a == 0:  # too few lengths to tell pairs from the rest: all of it is pairs
        call_s, b, a = 0.0, 0.0, float(np.mean(seconds / columns[1]))
    return Kernel(direction, block_size, 1 / a, b / a, call_s)


def _link(messages: Sequence[tuple[int, float]]) -> Link:
    nbytes, seconds = np.array(messages, dtype=float).T
    latency, per_byte = _relative_least_squares(np.stack([np.ones_like(nbytes), nbytes], 1), seconds)
    return Link(latency, 1 / per_byte if per_byte else float("inf"))


def _relative_least_squares(columns: np.ndarray, seconds: np.ndarray) -> list[float]:
    """The x >= 0 that makes ``columns @ x / seconds`` closest to 1: the best of all subsets of unknowns (two or three),
    each solved without the bound, that happen to keep it."""
    scale = np.maximum(np.abs(columns).max(0), 1e-300)
    scaled = columns / scale / seconds[:, None]
    best, least = np.zeros(columns.shape[1]), np.inf
    for count in range(1, columns.shape[1] + 1):
        for chosen in map(list, combinations(range(columns.shape[1]), count)):
            found = np.linalg.lstsq(scaled[:, chosen], np.ones(len(seconds)), rcond=None)[0]
            error = float(((scaled[:, chosen] @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(columns.shape[1]), error
                best[chosen] = found
    return [float(x) for x in best / scale]
