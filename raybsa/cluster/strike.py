"""strike: a drill's fault that no rank can do to itself, done from outside."""

from __future__ import annotations

import os
import signal

from raybsa.cluster.crew import Crew
from raybsa.cluster.faults import Fault, FaultKind, mark
from raybsa.cluster.membership import Membership
from raybsa.cluster.nodes import kill_raylet


def strike(fault: Fault, worker: int, crew: Crew, members: Membership, marks: str | None) -> None:
    """Does the fault to the worker that asked for it.

    Args:
        members: who sits beside it.
        marks: the folder for the marks of faults.
    """
    mark(marks, fault)
    if fault.kind is FaultKind.DRIVER:
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind is FaultKind.LOST_NODE:
        kill_raylet(crew.node(worker))
    elif fault.kind is FaultKind.TWO_RANKS:
        crew.kill(members.workers[(members.rank(worker) + 1) % members.world_size])
    elif fault.kind is FaultKind.SPARE and crew.spares:
        crew.kill(crew.spares[0])
    if fault.kind is not FaultKind.LOST_NODE:
        crew.kill(worker)
