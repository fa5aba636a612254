"""The two ways to the sum over ranks: one all-reduce of what may be summed, or one all-gather and a sum in rank order.

Each joins the payloads of several tensors into one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.gradients.codec import Codec, Payload
from raybsa.gradients.state import State

KIND = "gradient"


def summed(
    codec: Codec, tensors: Sequence[Tensor], states: Sequence[State], communicator: Communicator
) -> list[Tensor]:
    """For codecs whose payload is one tensor, and where the sum of payloads says the sum of what they say."""
    payloads = [codec.compress(tensor, state) for tensor, state in zip(tensors, states, strict=True)]
    totals = all_reduce([payload.tensors[0] for payload in payloads], communicator)
    return [codec.decode(replace(p, tensors=(total,))) for p, total in zip(payloads, totals, strict=True)]


def gathered(
    codec: Codec, tensors: Sequence[Tensor], states: Sequence[State], communicator: Communicator
) -> list[Tensor]:
    """For all others: every rank extracts what every rank sent, and adds it up in rank order."""
    payloads = [codec.compress(tensor, state) for tensor, state in zip(tensors, states, strict=True)]
    wire = pack(payloads)
    parts = communicator.all_gather(KIND, wire) if wire.numel() else [wire] * communicator.world_size
    totals = [codec.decode(payload) for payload in unpack(parts[0], payloads)]
    for part in parts[1:]:
        for total, payload in zip(totals, unpack(part, payloads), strict=True):
            total += codec.decode(payload)
    return totals


def all_reduce(tensors: Sequence[Tensor], communicator: Communicator) -> list[Tensor]:
    """The sums over ranks of tensors of one dtype, in one message; new tensors of the same shapes."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if flat.numel():
        communicator.all_reduce(KIND, flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def pack(payloads: Sequence[Payload]) -> Tensor:
    """All tensors of all payloads as one (bytes,) uint8, the widest elements first so that each stays aligned."""
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in _by_width(payloads)])


def unpack(wire: Tensor, like: Sequence[Payload]) -> list[Payload]:
    """The payloads in ``wire``, whose shapes and dtypes are those of ``like``; views of it."""
    shapes = _by_width(like)
    pieces = wire.split([tensor.nbytes for tensor in shapes])
    found = {id(x): piece.view(x.dtype).view(x.shape) for x, piece in zip(shapes, pieces, strict=True)}
    return [replace(p, tensors=tuple(found[id(x)] for x in p.tensors)) for p in like]


def _by_width(payloads: Sequence[Payload]) -> list[Tensor]:
    return sorted((x for p in payloads for x in p.tensors), key=lambda x: -x.element_size())
