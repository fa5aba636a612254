"""The longest sequence of which one training step fits into the ranks' memory: estimated first, then tried."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from raybsa.experiments.forecast import sizes_of
from raybsa.experiments.scaling_cells import Cell, Sizes, longest_cell
from raybsa.experiments.scaling_suite import ScalingSuite
from raybsa.results.record import Record, spec_of
from raybsa.tasks.peers import Refused
from raybsa.tasks.ring import RING

CLOSE = 0.05  # how near the longest that fits and the shortest that does not shall be
FEWEST_S = 20.0  # an attempt may take, however late it begins
_MARGIN = 1.25  # an estimate is not further off
_OURS = 0.92  # of a GPU's memory; the rest is CUDA's, NCCL's and the allocator's


def try_lengths(
    suite: ScalingSuite, sizes: Sizes, records: Iterable[Record], world_size: int, device: str, budget_s: float
) -> list[tuple[Cell, Record]]:
    """The attempts' rows: those that fit are ``ok``, and the longest of them is the answer. One row that says why where
    nothing is tried."""
    rows: list[tuple[Cell, Record]] = []
    until = time.monotonic() + budget_s

    def attempt(tokens: int) -> bool:
        cell = longest_cell(sizes, tokens, world_size, device)
        record = suite.attempt(cell, max(FEWEST_S, until - time.monotonic()))
        rows.append((cell, record))
        return record.status == "ok"

    known = [r for r in records if (r.task, r.status, r.world_size) == (RING, "ok", world_size)]
    if device != "cuda" or not known:
        cell = longest_cell(sizes, sizes.strong, world_size, device)
        why = "no row of our ring says what a token takes" if device == "cuda" else "ranks share this host's memory"
        return [(cell, suite.write(cell, Refused(why)))]
    largest = max(known, key=lambda record: record.seq_len)
    room = _OURS * torch.cuda.get_device_properties(0).total_memory * world_size
    estimate = int(room / bytes_a_token(largest))
    step = sizes.block_size * 2 * world_size
    longest(attempt, largest.seq_len, estimate, step=step, until=until)
    return rows


def bytes_a_token(record: Record) -> float:
    """Of one rank, in a step of a ring whose memory was measured: what q, k and v hold, and what it needed beyond."""
    assert record.peak_bytes is not None
    assert record.world_size is not None
    sizes = sizes_of(spec_of(record))
    held = sizes.batch * (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim * sizes.itemsize
    return held + record.peak_bytes * record.world_size / record.seq_len


def longest(fits: Callable[[int], bool], known: int, estimate: int, *, step: int, until: float) -> int:
    """The longest multiple of ``step`` tokens that was seen to fit, by bisection that begins at the estimate.

    Args:
        fits: tries a length.
        known: tokens that fit for sure.
        estimate: tokens that should just fit.
        until: ``time.monotonic()`` at which no more lengths are tried.
    """
    short, long = known // step, max(int(_MARGIN * estimate) // step, known // step) + 1
    trial = estimate // step
    while long - short > max(1, CLOSE * short) and time.monotonic() < until:
        trial = trial if short < trial < long else (short + long) // 2
        if fits(trial * step):
            short = trial
        else:
            long = trial
        trial = (short + long) // 2
    return short * step
