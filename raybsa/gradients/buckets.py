"""Buckets: the parameters whose gradients travel in one message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from raybsa.spec import stable_hash


@dataclass(frozen=True)
class Bucket:
    """Parameters of one dtype, in the order in which backward is expected to reach them."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its gradients, uncompressed."""
        return sum(parameter.nbytes for parameter in self.parameters)


def make_buckets(named_parameters: Iterable[tuple[str, nn.Parameter]], bucket_bytes: int) -> tuple[Bucket, ...]:
    """All that require a gradient, last first, each bucket closed once it holds ``bucket_bytes`` (as DDP does).

    A function of names, shapes and dtypes alone, so every rank has the same buckets in the same order.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be at least 1, got {bucket_bytes}")
    done: list[Bucket] = []
    open_by_dtype: dict[object, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in reversed([each for each in named_parameters if each[1].requires_grad]):
        part = open_by_dtype.setdefault(parameter.dtype, [])
        part.append((name, parameter))
        if sum(each.nbytes for _, each in part) >= bucket_bytes:
            done.append(_bucket(open_by_dtype.pop(parameter.dtype)))
    return (*done, *map(_bucket, open_by_dtype.values()))


def digest(buckets: Iterable[Bucket]) -> str:
    """Equal where ranks agree on what is in each bucket."""
    return stable_hash(
        [[(name, list(p.shape), str(p.dtype)) for name, p in zip(b.names, b.parameters, strict=True)] for b in buckets]
    )


def _bucket(part: list[tuple[str, nn.Parameter]]) -> Bucket:
    names, parameters = zip(*part, strict=True)
    return Bucket(names, parameters)
