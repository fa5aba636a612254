"""Hardware as data: how fast the kernel is and what a link carries. Fitted to measured rows, or a published preset."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Pass(StrEnum):
    """Kernels differ in speed by direction."""

    FORWARD = "forward"
    BACKWARD = "backward"


PRODUCTS = {Pass.FORWARD: 2, Pass.BACKWARD: 5}  # matrix products over every active block (FlashAttention, 2205.14135)


@dataclass(frozen=True)
class Kernel:
    """One direction of the kernel at a block size: a call takes ``call_s + (active + row_blocks · rows) flop / rate``.

    So a call with ``k`` active blocks a row runs at ``rate · k / (k + row_blocks)``: density acts through the length of
    the rows.

    Args:
        rate: FLOP/s over active blocks where rows are long.
        row_blocks: what a row costs besides, in blocks: the row length at which half the rate is reached.
        call_s: seconds that a call takes whatever its size.
    """

    direction: Pass
    block_size: int
    rate: float
    row_blocks: float = 0.0
    call_s: float = 0.0


@dataclass(frozen=True)
class Link:
    """``latency_s + bytes / bytes_per_s`` for a message between two ranks, each way, both ways at once."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Hardware:
    """Args:
    name: shown with every number that comes from it.
    kernels: by direction and block size; the nearest block size (by ratio) serves others.
    link: between ranks of one node.
    node_size: ranks of a node; None is one node for all.
    far_link: between nodes; None is ``link``.
    devices: how many ranks compute at full speed at once (cores); None is all of them.
    crowding: (ranks, how many times slower a kernel is where so many run at once), measured; it has the last word.
    workspace_bytes: what the kernel needs at most beside q, k, v, results and buffers.
    fitted_on: how many measured rows it was fitted on; 0 is a preset, not measured here.
    """

    name: str
    kernels: tuple[Kernel, ...]
    link: Link
    node_size: int | None = None
    far_link: Link | None = None
    devices: int | None = None
    crowding: tuple[tuple[int, float], ...] = ()
    workspace_bytes: float = 0.0
    fitted_on: int = 0

    @property
    def label(self) -> str:
        """The name, and where its numbers come from."""
        return f"{self.name} ({f'fitted on {self.fitted_on} rows' if self.fitted_on else 'preset, not measured here'})"

    def slow(self, world_size: int) -> float:
        """How many times slower a rank computes for sharing the host: as measured, else ``ranks / devices``."""
        known = dict(self.crowding)
        return known.get(world_size, max(1.0, world_size / self.devices) if self.devices else 1.0)

    def kernel(self, direction: Pass, block_size: int) -> Kernel:
        """The kernel of the nearest block size. Raises ValueError where none of this direction is known."""
        known = [kernel for kernel in self.kernels if kernel.direction == direction]
        if not known:
            raise ValueError(f"{self.name} knows no {direction} kernel")
        return min(known, key=lambda kernel: abs(math.log(kernel.block_size / block_size)))


# Kernel rates follow FlexAttention on one H100 80 GB (bf16, 16 heads x 128, non-causal, docs/ring.md): block 128 at 32K
# 10.2 % 2.16 / 8.03 ms and 50 % 10.3 / 37.9 ms, block 64 at 10 % 1.96 / 9.60 ms and 50 % 10.5 / 47.0 ms; small calls
# take about 0.1 / 0.4 ms. NVLink: two H200, NCCL p2p both ways at once, 1 MB at 14 and 256 MB at 266 to 283 GB/s.
# Between nodes: one 400 Gb/s port a GPU, as an HGX/DGX H100 has, at 90 %; its latency is an assumption.
_KERNELS = (
    Kernel(Pass.FORWARD, 128, 430e12, 0.5, 0.10e-3),
    Kernel(Pass.BACKWARD, 128, 400e12, 0.5, 0.35e-3),
    Kernel(Pass.FORWARD, 64, 420e12, 1.0, 0.08e-3),
    Kernel(Pass.BACKWARD, 64, 300e12, 1.0, 0.35e-3),
)
_NVLINK, _PORT = Link(70e-6, 280e9), Link(20e-6, 45e9)
PRESETS = {
    "h100": Hardware("H100, 8 a node, 400 Gb/s between", _KERNELS, _NVLINK, node_size=8, far_link=_PORT),
    "h200": Hardware("H200, 8 a node, 400 Gb/s between", _KERNELS, _NVLINK, node_size=8, far_link=_PORT),
}
