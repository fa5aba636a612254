"""Whether one training step of our ring's attention fits into the ranks' memory at a length, and what it takes."""

from __future__ import annotations

from raybsa.comm import Communicator
from raybsa.spec import TrialSpec
from raybsa.tasks.ring import own_ring, ring_plan
from raybsa.tasks.ring_contender import RankReport, calls_of, report_of
from raybsa.tasks.ring_rounds import timed
from raybsa.timing import peak_bytes


def measure_longest(spec: TrialSpec, communicator: Communicator) -> RankReport:
    """One forward and backward for its memory and one for its time. Raises what torch raises where memory ends; the
    other ranks then wait in vain, so whoever started them ends them."""
    contender = own_ring(spec, ring_plan(spec, communicator.device), communicator)._replace(alone=None)
    step = calls_of(contender, spec, communicator)["forward_backward"]
    report = report_of(communicator)
    report.peak_bytes = peak_bytes(step, communicator.device)
    report.times_ms = {"forward_backward": [timed(step, communicator)]}
    return report
