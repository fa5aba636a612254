"""Many threads that do one thing at one time, and what each of them gets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
THREADS = 6


def in_threads(work: Callable[[int], Result], threads: int = THREADS) -> list[Result]:
    """``work(number)`` of every thread, in order; all begin together. The first error of any is raised."""
    together = threading.Barrier(threads)
    results: list[list[Result]] = [[] for _ in range(threads)]
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            together.wait(60)
            results[number].append(work(number))
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]
    return [result for (result,) in results]
