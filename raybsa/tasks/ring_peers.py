"""Other libraries' attention over ranks, and torch's dense attention on one device, beside our ring.

Each is compared with the reference on a small case of the same question before it is timed. They make their own groups
and send by themselves, not through our Communicator, so no bytes of theirs are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from raybsa.comm import Communicator
from raybsa.kernels.peers import dense
from raybsa.spec import TrialSpec
from raybsa.tasks.context_parallel import flex_context_parallel, sdpa_context_parallel, why_no_context_parallel
from raybsa.tasks.peers import FORWARD_TOLERANCE, GRADIENT_TOLERANCE
from raybsa.tasks.ring import ring_params
from raybsa.tasks.ring_contender import Contender, RankReport, calls_of, reference_errors, report_of, small_of
from raybsa.tasks.ring_rounds import rounds
from raybsa.timing import peak_bytes

MakeContender = Callable[[TrialSpec, Any], AbstractContextManager[Contender]]
FLASH = "sdpa-flash"
TORCH_RINGS = {"torch-cp-cudnn": "sdpa-cudnn", "torch-cp-flash": FLASH}  # context_parallel over a line of dense.LINES
TORCH_FLEX = "torch-cp-flex"
ON_ONE_DEVICE = (FLASH,)


@contextmanager
def on_one_device(spec: TrialSpec, mesh: Any, *, line: str) -> Iterator[Contender]:
    """Dense attention of the whole sequence by a kernel of torch's."""
    yield Contender(torch.arange(spec.seq_len), partial(dense.attend, line, causal=spec.causal))


MAKERS: dict[str, MakeContender] = {
    FLASH: partial(on_one_device, line=FLASH),
    **{name: partial(sdpa_context_parallel, line=line) for name, line in TORCH_RINGS.items()},
    TORCH_FLEX: flex_context_parallel,
}


def why_not(spec: TrialSpec, device: str) -> str | None:
    """Why the library that ``spec.layer(0).backend`` names cannot answer on ``"cpu"`` or ``"cuda"``; None: it can.

    Raises:
        ValueError: no such library.
    """
    attention, (world_size, _) = spec.layer(0), ring_params(spec)
    name = attention.backend
    if name not in MAKERS:
        raise ValueError(f"a ring is measured beside one of {sorted(MAKERS)}, got backend {name!r}")
    is_dense = attention.pattern is not None and attention.pattern.name == "dense"
    if name != TORCH_FLEX and not is_dense:
        return f"{name} is dense, this pattern is not"
    if name in ON_ONE_DEVICE:
        return None if world_size == 1 else f"{name} computes on one device, not on {world_size}"
    return why_no_context_parallel(spec, device, world_size, flex=name == TORCH_FLEX)


def measure_ring_peer(
    spec: TrialSpec, communicator: Communicator, mesh: Any, *, repeats: int = 20, budget_s: float = 2.0
) -> RankReport:
    """As ``measure_rank``, of the library that the question names; ``mesh``: of all ranks, None for one device.

    Raises:
        ArithmeticError: its results on the small case are not attention.
    """
    name = spec.layer(0).backend
    report, small = report_of(communicator), small_of(spec, communicator.world_size)
    with MAKERS[name](small, mesh) as contender:
        report.errors = reference_errors(contender, small, communicator)
    forward, gradient = report.errors
    if not (forward <= FORWARD_TOLERANCE and gradient <= GRADIENT_TOLERANCE):
        raise ArithmeticError(f"{name} is off by {forward:.1e} forward, {gradient:.1e} in gradients on {small.seq_len}")
    with MAKERS[name](spec, mesh) as contender:
        calls = calls_of(contender, spec, communicator)
        for call in calls.values():
            call()
        report.times_ms = rounds(calls, communicator, repeats, budget_s)
        report.peak_bytes = peak_bytes(calls["forward_backward"], communicator.device)
    return report
