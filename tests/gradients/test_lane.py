"""A lane does one thing after the other, beside the thread that asks, and keeps the first error for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from raybsa.gradients.lane import Lane


@pytest.fixture
def lane() -> Iterator[Lane]:
    lane = Lane(torch.device("cpu"))
    yield lane
    lane.close()


def test_tasks_run_in_order_and_submit_does_not_wait(lane: Lane) -> None:
    go, done = threading.Event(), []

    def task(i: int) -> Callable[[], None]:
        return lambda: (go.wait(10.0), done.append(i))[1]

    for i in range(5):
        lane.submit(task(i))
    assert done == []
    go.set()
    lane.drain()
    assert done == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("error", [ValueError("first"), SystemExit("first")], ids=["error", "exit"])
def test_after_an_error_tasks_are_dropped_until_it_was_raised(lane: Lane, error: BaseException) -> None:
    done = []

    def fail() -> None:
        raise error

    lane.submit(fail)
    lane.submit(lambda: done.append("dropped"))
    with pytest.raises(type(error), match="first"):
        lane.drain()
    lane.submit(lambda: done.append("after"))
    lane.drain()
    assert done == ["after"]


def test_no_task_records_for_autograd(lane: Lane) -> None:
    x, made = torch.ones(2, requires_grad=True), []
    lane.submit(lambda: made.append(x * 2))
    lane.drain()
    assert not made[0].requires_grad


def test_closing_ends_the_thread() -> None:
    before = set(threading.enumerate())
    lane = Lane(torch.device("cpu"))
    (thread,) = set(threading.enumerate()) - before
    lane.close()
    thread.join(5.0)
    assert not thread.is_alive()
