"""A codec as a communication hook of torch's DistributedDataParallel."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.gradients.catalog import build
from raybsa.gradients.codec import Codec
from raybsa.gradients.exchange import reduce_gradients
from raybsa.gradients.lane import Lane
from raybsa.gradients.state import State


def ddp_hook(codec: Codec | Mapping[str, Any] | str, *, warmup_steps: int = 0) -> "DdpHook":
    """A hook for ``ddp_model.register_comm_hook(None, ddp_hook("powersgd"))``; any number of buckets, gloo or NCCL.

    Call it on every rank of the default group, after ``init_process_group``: it makes a group of its own, since DDP
    sends on its group, too, and in an order of its own.

    Args:
        codec: a codec, its spec, or a name.
        warmup_steps: steps at the start that are sent uncompressed.
    """
    return DdpHook(build(codec), dist.new_group(), warmup_steps)


class DdpHook:
    """Called by DDP with each bucket that is ready; answers with a future of the mean over ranks.

    It keeps a state per parameter, not per bucket, since DDP remakes its buckets after the first step.
    """

    def __init__(self, codec: Codec, group: Any, warmup_steps: int) -> None:
        self.codec, self.warmup_steps, self.step = codec, warmup_steps, 0
        self.states: dict[Tensor, State] = {}
        self._group = group
        self._open: tuple[Lane, Communicator] | None = None
        self.__name__ = self.__qualname__ = f"raybsa.gradients.ddp_hook({codec.name})"

    def __call__(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        device = bucket.buffer().device
        if self._open is None:
            self._open = Lane(device), Communicator(self._group, device=device)
        lane, communicator = self._open
        states = [self._state(parameter, communicator.rank) for parameter in bucket.parameters()]
        future: torch.futures.Future = torch.futures.Future(devices=[device] if device.type == "cuda" else None)
        codec = build("none") if self.step < self.warmup_steps else self.codec
        self.step += bucket.is_last()
        lane.submit(partial(_answer, future, codec, bucket.buffer(), bucket.gradients(), states, communicator))
        return future

    def _state(self, parameter: Tensor, rank: int) -> State:
        return self.states.setdefault(parameter, State(tensor=len(self.states), rank=rank))


def _answer(
    future: torch.futures.Future,
    codec: Codec,
    buffer: Tensor,
    gradients: list[Tensor],
    states: list[State],
    communicator: Communicator,
) -> None:
    """Sets the future to the mean over ranks; after an error, that of every later bucket to ``Cancelled``."""
    try:
        reduce_gradients(codec, gradients, states, communicator, mean=True)
    except Exception as error:
        communicator.cancel(f"a gradient exchange failed: {error}")
        future.set_exception(error)
    else:
        future.set_result(buffer)
