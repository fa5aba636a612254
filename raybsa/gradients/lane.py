"""A lane: one thread that does what it is given, in the order in which it was given it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

Task = Callable[[], None]


class Lane:
    """Runs tasks beside the thread that gives them. On CUDA it has a stream of its own: a task sees all that was queued
    on the giver's stream before it. After an error it drops tasks until ``drain`` has raised it.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._work = _Work(self._stream)
        self._thread = threading.Thread(target=self._work.run, name="raybsa-gradients", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> None:
        """Returns at once."""
        event = None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()
        self._work.queue.put((task, event))

    def drain(self) -> None:
        """Returns when all tasks are done (on CUDA: when the current stream is ordered behind them).

        Raises:
            BaseException: the first that a task raised.
        """
        done = threading.Event()
        self._work.queue.put((done, None))
        done.wait()
        error, self._work.error = self._work.error, None
        if error is not None:
            raise error
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def close(self) -> None:
        """Returns when the thread has ended, which it does once it has done what it was given."""
        self._work.queue.put((None, None))
        self._thread.join()


class _Work:
    """What the thread knows; not the lane, so that a lane that is let go of can be collected."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.queue: queue.SimpleQueue[tuple[Task | threading.Event | None, torch.cuda.Event | None]]
        self.queue, self.stream = queue.SimpleQueue(), stream
        self.error: BaseException | None = None

    def run(self) -> None:
        torch.set_grad_enabled(False)
        stream: AbstractContextManager = nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        with stream:
            while (task := (given := self.queue.get())[0]) is not None:
                if isinstance(task, threading.Event):
                    task.set()
                elif self.error is None:
                    self._do(task, given[1])
                del task, given

    def _do(self, task: Task, event: torch.cuda.Event | None) -> None:
        try:
            if self.stream is not None and event is not None:
                self.stream.wait_event(event)
            task()
        except BaseException as error:
            self.error = error
