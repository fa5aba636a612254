"""Ranks as threads of one process, each with its own gloo group: real messages, no start-up time."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from raybsa.comm import Communicator

Result = TypeVar("Result")


def run_ranks(world_size: int, function: Callable[[Communicator], Result], **options: Any) -> list[Result]:
    """``function(communicator)`` on every rank at once; the results in rank order, or the first rank's error."""
    store = dist.HashStore()
    results: list[Any] = [None] * world_size
    errors: list[BaseException | None] = [None] * world_size
    groups: list[Any] = [None] * world_size

    def work(rank: int) -> None:
        try:
            groups[rank] = dist.ProcessGroupGloo(store, rank, world_size, datetime.timedelta(seconds=30))
            communicator = Communicator(groups[rank], timeout_s=30.0, **options)
            results[rank] = function(communicator)
            communicator.close()
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if error is not None:
            raise error
    return results
