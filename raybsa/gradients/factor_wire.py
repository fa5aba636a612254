"""How PowerSGD's factors travel and are summed over ranks: as floats, or as bytes with a scale for each few of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.gradients.wire import KIND, all_reduce

BLOCK = 64  # bytes that share a scale
LEVELS = 127


class Summed(NamedTuple):
    """Sums over ranks, the same bits on every rank, and what of each was this rank's: over ranks, shares add up to the
    total (of a float wire but for what its sum rounds)."""

    totals: list[Tensor]
    shares: list[Tensor]


class FactorWire(Protocol):
    def travel(self, part: Tensor) -> tuple[Tensor, ...]:
        """What travels of ``part``."""
        ...

    def value(self, travelled: Sequence[Tensor], like: Tensor) -> Tensor:
        """What that says, in the shape and dtype of ``like``."""
        ...

    def sum(self, parts: Sequence[Tensor], communicator: Communicator) -> Summed:
        """The sums of parts of one dtype, which every rank calls with the same shapes."""
        ...


class FloatWire:
    """One all-reduce in ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def travel(self, part: Tensor) -> tuple[Tensor, ...]:
        return (part.to(self._dtype),)

    def value(self, travelled: Sequence[Tensor], like: Tensor) -> Tensor:
        return travelled[0].to(like.dtype)

    def sum(self, parts: Sequence[Tensor], communicator: Communicator) -> Summed:
        sent = [self.travel(part)[0] for part in parts]
        totals = [total.to(part.dtype) for total, part in zip(all_reduce(sent, communicator), parts, strict=True)]
        return Summed(totals, [self.value([x], part) for x, part in zip(sent, parts, strict=True)])


class Int8Wire:
    """Levels -127 .. 127, a bfloat16 scale for each ``BLOCK`` of them, rounded to the nearest. A rank sums a share of
    the blocks and sends that on, rounded once more; what this takes away it counts as its own."""

    def travel(self, part: Tensor) -> tuple[Tensor, ...]:
        return _quantised(_blocks(part))

    def value(self, travelled: Sequence[Tensor], like: Tensor) -> Tensor:
        return _decoded(travelled, like.dtype).view(-1)[: like.numel()].view(like.shape)

    def sum(self, parts: Sequence[Tensor], communicator: Communicator) -> Summed:
        joined = torch.cat([_blocks(part) for part in parts])
        sent = _quantised(joined)
        shares = _decoded(sent, joined.dtype)
        totals = shares if communicator.world_size == 1 else _summed(sent, shares, communicator)
        return Summed(_apart(totals, parts), _apart(shares, parts))


def _summed(sent: tuple[Tensor, ...], shares: Tensor, communicator: Communicator) -> Tensor:
    """(num_blocks, BLOCK) the sum of what all ranks sent; ``shares`` is corrected where this rank rounds the sum."""
    rank, ranks = communicator.rank, range(communicator.world_size)
    chunks = [tuple(x.tensor_split(len(ranks))[peer] for x in sent) for peer in ranks]
    arrived = _exchanged({peer: chunks[peer] for peer in ranks}, [chunks[rank]] * len(ranks), communicator)
    mine = shares.tensor_split(len(ranks))[rank]
    total = torch.zeros_like(mine)
    for part in arrived:
        total += _decoded(part, mine.dtype)
    again = _quantised(total)
    mine += _decoded(again, mine.dtype) - total
    spread = _exchanged(dict.fromkeys(ranks, again), chunks, communicator)
    return torch.cat([_decoded(part, mine.dtype) for part in spread])


def _exchanged(
    sends: dict[int, tuple[Tensor, ...]], like: Sequence[tuple[Tensor, ...]], communicator: Communicator
) -> list[tuple[Tensor, ...]]:
    """What every rank sent to this one, where rank r's is like ``like[r]``; its own is what it sends itself."""
    rank = communicator.rank
    wires = {peer: _packed(parts) for peer, parts in sends.items() if peer != rank and parts[0].numel()}
    buffers = {
        peer: torch.empty_like(_packed(parts)) for peer, parts in enumerate(like) if peer != rank and parts[0].numel()
    }
    communicator.exchange(KIND, wires, buffers).wait()
    return [
        sends[rank] if peer == rank else _unpacked(buffers[peer], parts) if peer in buffers else parts
        for peer, parts in enumerate(like)
    ]


def _blocks(part: Tensor) -> Tensor:
    """(num_blocks, BLOCK), the last one filled with zeros."""
    flat = part.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _apart(blocks: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of ``_blocks`` for parts whose blocks follow each other."""
    pieces = blocks.split([-(-part.numel() // BLOCK) for part in parts])
    return [x.reshape(-1)[: part.numel()].view(part.shape) for x, part in zip(pieces, parts, strict=True)]


def _quantised(blocks: Tensor) -> tuple[Tensor, ...]:
    """Scales (num_blocks,) bfloat16, levels (num_blocks, BLOCK) int8. A block that is not finite has such a scale."""
    scales = (blocks.abs().amax(1) / LEVELS).to(torch.bfloat16)
    levels = (blocks / scales.to(blocks.dtype)[:, None]).round().nan_to_num(0.0, 0.0, 0.0).clamp(-LEVELS, LEVELS)
    return scales, levels.to(torch.int8)


def _decoded(travelled: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(num_blocks, BLOCK) in ``dtype``."""
    scales, levels = travelled
    return levels.to(dtype) * scales.to(dtype)[:, None]


def _packed(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([x.reshape(-1).view(torch.uint8) for x in parts])


def _unpacked(wire: Tensor, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    pieces = wire.split([x.nbytes for x in like])
    return tuple(piece.view(x.dtype).view(x.shape) for piece, x in zip(pieces, like, strict=True))
