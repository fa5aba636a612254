"""Whose fault a failed trial is, by the type of what was raised."""

import errno

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from raybsa.cluster.causes import whose
from raybsa.cluster.resources import TooFewResources


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "machine"),
        (PermissionError(errno.EACCES, "Permission denied", "/tmp/raybsa.lock"), "machine"),
        (TimeoutError("took longer than 1 s"), "machine"),
        (MemoryError(), "machine"),
        (torch.OutOfMemoryError("CUDA out of memory"), "machine"),
        (TooFewResources("2 workers wanted"), "machine"),
        (ValueError("density must lie in (0, 1]"), "question"),
        (NotImplementedError("no such backward"), "question"),
        (ZeroDivisionError(), "question"),
        (RuntimeError("CUDA error"), "unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_failure_is_the_question_s_the_machine_s_or_unknown(error, wanted):
    assert whose(error) == wanted
    assert whose(RayTaskError("run", "Traceback ...", error).as_instanceof_cause()) == wanted


def test_memory_that_ray_ran_out_of_is_the_machine_s_and_a_worker_that_crashed_may_be_anyone_s():
    assert whose(OutOfMemoryError("the node ran low on memory")) == "machine"
    assert whose(WorkerCrashedError()) == "unknown"
