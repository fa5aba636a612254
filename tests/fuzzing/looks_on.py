"""Tensors that are no plain numbers: fake, on the meta device, distributed, and wrapped in pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.fuzzing.given import Given, Results, grad_of, gradients, values


def blank(given: Given) -> Results:
    """Zeros of the shapes and types of the outputs and gradients."""
    return {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in gradients(given).items()}


def of_fake(given: Given) -> Results:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        found = _sums(given, [mode.from_tensor(x) for x in given.xs])
    return {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in found.items()}


def of_meta(given: Given) -> Results:
    found = _sums(given, [x.to("meta") for x in given.xs])
    return {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in found.items()}


def _sums(given: Given, xs: Sequence[Tensor]) -> dict[str, tuple[list[int], torch.dtype]]:
    leaves = [x.detach().requires_grad_(i in given.asked) for i, x in enumerate(xs)]
    found = given.f(*leaves)
    differentiable = [x for x in found if x.requires_grad]
    torch.autograd.backward(differentiable, [torch.ones_like(x) for x in differentiable])
    results = given.named(found) | {f"grad {given.names[i]}": grad_of(leaves[i]) for i in given.asked}
    return {name: ([*map(int, x.shape)], x.dtype) for name, x in results.items()}


@cache
def mesh(kind: str) -> Any:
    """A mesh of this one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(kind, (1,))


def by_dtensor(given: Given) -> Results:
    """q, k and v as tensors of a mesh, the rest as it is."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placement, where = (Shard(0), Shard(1), Replicate())[given.case.seed % 3], mesh(given.case.device)
    leaves: list[Tensor] = []
    for i, x in enumerate(given.xs):
        spread = DTensor.from_local(x, where, [placement], run_check=False) if given.names[i] in "qkv" else x
        leaves.append(spread.detach().requires_grad_(i in given.asked))
    found = gradients(given._replace(f=_whole(given.f)), leaves)
    return {name: _plain(x) for name, x in found.items()}


def _whole(f: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *xs: tuple(_plain(x) for x in f(*xs))


def _plain(x: Any) -> Tensor:
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found


def by_two_tensor(given: Given) -> Results:
    """Both halves hold the same numbers."""
    from torch.testing._internal.two_tensor import TwoTensor

    def second(*xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.b for x in given.f(*(TwoTensor(x, x) for x in xs)))

    return values(given._replace(f=second))
