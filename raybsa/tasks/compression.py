"""Compressed training: a byte language model whose ranks share each batch and exchange their gradients by a codec, or
by PyTorch's own PowerSGD hook. Task ``"compression"``: what it costs in bits per byte, and what travels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from raybsa.comm import Communicator, all_reduce_nbytes
from raybsa.gradients.catalog import build
from raybsa.gradients.exchange import GradientExchange
from raybsa.spec import TrialSpec
from raybsa.tasks.byte_lm import ByteText, bits_per_byte
from raybsa.tasks.model import Transformer
from raybsa.tasks.training import cross_entropy, descend, learning_rates, make_optimizer, prepare
from raybsa.timing import DeviceLock

RIVAL = "torch_powersgd"  # torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook
_ONE_BUCKET_MB = 1 << 14  # with several, its callbacks start collectives in another order on each rank: gloo aborts
_OWN = ("codec", "warmup_steps", "world_size")
Backward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Compressed:
    """What one rank found: bits a held-out byte, the gradients' bytes that it sent, what they would have been
    uncompressed, seconds of all steps, and the loss of every step (nats a token, of this rank's windows)."""

    bits_per_byte: float
    sent_bytes: int
    uncompressed_bytes: int
    train_seconds: float
    losses: tuple[float, ...]


def compression_params(spec: TrialSpec) -> tuple[dict[str, Any], int, int]:
    """(codec's spec, warm-up steps, ranks) of a spec's ``task_params``: ``codec`` is as ``gradients.build`` takes it,
    or ``{"name": "torch_powersgd", "params": {"rank": 4}}``; ``warmup_steps`` go uncompressed (PyTorch's hook wants at
    least 2); ``world_size`` ranks share ``train_batch`` windows.

    Raises:
        ValueError: an unknown codec or parameter, or ranks that cannot share the batch evenly.
    """
    params = spec.task_params
    codec, warmup, ranks = params.get("codec", "none"), params.get("warmup_steps", 0), params.get("world_size", 2)
    name = codec if isinstance(codec, str) else codec.get("name")
    if name == RIVAL:
        codec = {"name": RIVAL, "params": dict(codec.get("params") or {}) if isinstance(codec, dict) else {}}
        if set(codec["params"]) - {"rank"} or warmup < 2:
            raise ValueError(f"{RIVAL} takes a rank and needs 2 or more warm-up steps, got {codec['params']}, {warmup}")
    else:
        codec = build(codec).spec
    if params.get("train_batch", 8) % ranks:
        raise ValueError(f"{ranks} ranks must share train_batch evenly, got {params.get('train_batch', 8)} windows")
    return codec, warmup, ranks


def train_compressed(spec: TrialSpec, group: Any) -> Compressed:
    """One rank's part of the training: every rank of the default ``group`` calls it. CPU only."""
    codec, warmup, _ = compression_params(spec)
    device, rank, world_size = torch.device("cpu"), group.rank(), group.size()
    plain = {key: value for key, value in spec.task_params.items() if key not in _OWN}
    text = ByteText(replace(spec, task_params=plain), device)
    model, context = prepare(Transformer(spec, 256), device, spec.dtype)
    optimizer = make_optimizer(model, spec.learning_rate)
    way = (Rival if codec["name"] == RIVAL else Own)(model, codec, warmup, group)
    seconds, losses = 0.0, []
    for step, rate in enumerate(learning_rates(spec.train_steps, spec.learning_rate)):
        tokens, targets = (x[rank::world_size] for x in text.batches(step))
        begin = time.perf_counter()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad(set_to_none=False)
        with context:
            loss = cross_entropy(way.model(tokens), targets)
        way.backward(loss)
        descend(model, optimizer)
        seconds += time.perf_counter() - begin
        losses.append(float(loss.detach()))
    whole = all_reduce_nbytes(sum(p.nbytes for p in model.parameters()), world_size) * spec.train_steps
    bits = bits_per_byte(model, *text.held_out(), context, DeviceLock("cpu"))
    if not math.isfinite(bits):
        raise ValueError(f"the training diverged: {bits} bits a byte, last loss {losses[-1]}")
    return Compressed(bits, way.close(), whole, seconds, tuple(losses))


class Own:
    """Gradients by a codec of ``raybsa.gradients``."""

    def __init__(self, model: nn.Module, codec: dict[str, Any], warmup_steps: int, group: Any) -> None:
        self.model = model
        self._communicator = Communicator(group)
        self._exchange = GradientExchange(
            model.named_parameters(), codec, self._communicator, warmup_steps=warmup_steps
        )

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self._exchange.finish()

    def close(self) -> int:
        """Ends it; returns the bytes sent."""
        self._exchange.close()
        self._communicator.close()
        return self._communicator.ledger.sent["gradient"]


class Rival:
    """Gradients by PyTorch's DDP with its PowerSGD hook."""

    def __init__(self, model: nn.Module, codec: dict[str, Any], warmup_steps: int, group: Any) -> None:
        self._hook = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=codec["params"].get("rank", 4), start_powerSGD_iter=warmup_steps
        )
        self.model = DistributedDataParallel(model, bucket_cap_mb=_ONE_BUCKET_MB)
        self.model.register_comm_hook(self._hook, powerSGD_hook.powerSGD_hook)
        self._world_size, self._steps = group.size(), 0

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self._steps += 1

    def close(self) -> int:
        """Bytes sent, from the hook's own count and the uncompressed steps that it does not count."""
        sizes = [p.numel() for p in self.model.parameters()]
        numel = self._steps * sum(sizes) - self._hook.total_numel_before_compression
        numel += self._hook.total_numel_after_compression
        return all_reduce_nbytes(numel * next(self.model.parameters()).itemsize, self._world_size)
