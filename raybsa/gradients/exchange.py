"""Gradient exchange: while backward runs, the gradients it has finished become the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raybsa.comm import Communicator
from raybsa.gradients.buckets import Bucket, digest, make_buckets
from raybsa.gradients.catalog import build
from raybsa.gradients.codec import Codec
from raybsa.gradients.lane import Lane
from raybsa.gradients.state import State

BUCKET_BYTES = 25 * 2**20


def reduce_gradients(
    codec: Codec, gradients: Sequence[Tensor], states: Sequence[State], communicator: Communicator, *, mean: bool
) -> None:
    """Replaces gradients of one dtype by their mean (or sum) over ranks, in place; the same bits on every rank."""
    scale = communicator.world_size if mean else 1
    totals = codec.exchange([gradient / scale for gradient in gradients], states, communicator)
    for gradient, total in zip(gradients, totals, strict=True):
        gradient.copy_(total)


class GradientExchange:
    """Exchanges a model's gradients, bucket by bucket, in an order that is the same on every rank.

    A bucket goes when its gradients are ready and all before it have gone; a thread of the exchange compresses, sends
    and waits, so backward is not held up. After ``loss.backward()`` call ``finish()``: then every ``.grad`` is the mean
    over ranks. A parameter without a gradient counts as zeros, and has a gradient afterwards, as on every other rank.
    Where backward itself raised, close the exchange and make another from its ``state_dict``.

    Args:
        named_parameters: ``model.named_parameters()``; those that do not require a gradient are left alone.
        codec: a codec, its spec, or a name.
        communicator: one of its own: what others send on the same group meanwhile could come in another order.
        bucket_bytes: uncompressed size from which a bucket is closed.
        mean: the mean over ranks; else the sum.
        warmup_steps: steps at the start that are sent uncompressed.
        overlap: start in backward; else everything is sent in ``finish``.

    Raises:
        ValueError: a parameter whose dtype the codec does not take, or that is not on the communicator's device.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        codec: Codec | Mapping[str, Any] | str,
        communicator: Communicator,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        mean: bool = True,
        warmup_steps: int = 0,
        overlap: bool = True,
    ) -> None:
        self.codec, self.communicator = build(codec), communicator
        self.buckets = make_buckets(named_parameters, bucket_bytes)
        self.mean, self.warmup_steps, self.step = mean, warmup_steps, 0
        names = [name for bucket in self.buckets for name in bucket.names]
        self.states = {name: State(tensor=i, rank=communicator.rank) for i, name in enumerate(names)}
        self._check()
        self._paused = self._agreed = False
        self._begin()
        self._lane = Lane(communicator.device)
        self._hooks = list(self._hook_all()) if overlap else []

    def finish(self) -> None:
        """Sends what has not gone yet and waits: every gradient is now the same on all ranks.

        Raises:
            Exception: what the communicator's waits raise. What the codec remembers is then as before the step; the
                gradients are not to be used.
            ValueError: in the first step, where ranks disagree on the model, the codec or the step.
        """
        try:
            self._submit(len(self.buckets))
            self._lane.drain()
            self.states, self.step = self._working, self.step + 1
        finally:
            self._begin()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here only add to the local gradients."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def residual_norm(self) -> float:
        """The Euclidean norm of all that this rank has not sent yet, in units of the result."""
        return math.hypot(*(state.norm() for state in self.states.values()))

    def state_dict(self) -> dict[str, Any]:
        """Codec, step and the state of each tensor as of the last finished step: a snapshot that copies nothing."""
        states = {name: state.state_dict() for name, state in self.states.items()}
        return {"codec": self.codec.spec, "step": self.step, "states": states}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``, between two steps.

        Raises:
            ValueError: it is of another codec or model.
        """
        if build(saved["codec"]) != self.codec:
            raise ValueError(f"the saved exchange used {saved['codec']}, this one uses {self.codec.spec}")
        self._check_shapes(saved["states"])
        for name, state in self.states.items():
            state.load_state_dict(saved["states"][name])
        self.step, self._agreed = saved["step"], False
        self._begin()

    def close(self) -> None:
        """Takes its hooks off the parameters and ends its thread. What is under way is first done, or fails: cancel the
        communicator where it should not be waited for."""
        for hook in self._hooks:
            hook.remove()
        self._lane.close()

    # ---- within a step -------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._working = {name: state.copy() for name, state in self.states.items()}
        self._waiting = [set(bucket.names) for bucket in self.buckets]
        self._submitted = 0

    def _hook_all(self) -> Iterator[Any]:
        for number, bucket in enumerate(self.buckets):
            for name, parameter in zip(bucket.names, bucket.parameters, strict=True):
                yield parameter.register_post_accumulate_grad_hook(partial(self._ready, number, name))

    def _ready(self, number: int, name: str, parameter: Tensor) -> None:
        if self._paused:
            return
        if name not in self._waiting[number]:
            raise RuntimeError(f"a second gradient of {name} before finish(): accumulate inside no_sync()")
        self._waiting[number].remove(name)
        ready = self._submitted
        while ready < len(self.buckets) and not self._waiting[ready]:
            ready += 1
        self._submit(ready)

    def _submit(self, end: int) -> None:
        """Gives the buckets before ``end`` that have not gone to the lane."""
        codec = build("none") if self.step < self.warmup_steps else self.codec
        if not self._agreed:
            self._lane.submit(self._agree)
            self._agreed = True
        for bucket in self.buckets[self._submitted : end]:
            states = [self._working[name] for name in bucket.names]
            self._lane.submit(partial(self._exchange, codec, bucket, states))
        self._submitted = max(self._submitted, end)

    def _exchange(self, codec: Codec, bucket: Bucket, states: list[State]) -> None:
        for parameter in bucket.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in bucket.parameters if parameter.grad is not None]
        reduce_gradients(codec, gradients, states, self.communicator, mean=self.mean)

    def _agree(self) -> None:
        what = (
            f"codec {self.codec.spec}, step {self.step}, warm-up {self.warmup_steps}, mean {self.mean}, "
            f"{len(self.buckets)} buckets {digest(self.buckets)}"
        )
        self.communicator.agree("the gradients", what)

    # ---- checks --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        device = self.communicator.device.type
        for bucket in self.buckets:
            for name, parameter in zip(bucket.names, bucket.parameters, strict=True):
                self.codec.check(parameter.dtype)
                if parameter.device.type != device:
                    raise ValueError(f"the communicator is on {device}, got {name} on {parameter.device}")

    def _check_shapes(self, saved: Mapping[str, Any]) -> None:
        if saved.keys() != self.states.keys():
            odd = sorted(saved.keys() ^ self.states.keys())
            raise ValueError(f"the saved exchange is of another model: only one of the two has {', '.join(odd)}")
        for bucket in self.buckets:
            for name, parameter in zip(bucket.names, bucket.parameters, strict=True):
                residual = saved[name]["residual"]
                if residual is not None and residual.shape != parameter.shape:
                    raise ValueError(
                        f"{name} has the shape {tuple(parameter.shape)}, its saved residual {tuple(residual.shape)}"
                    )
