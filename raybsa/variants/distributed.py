"""BlockSparseDistributed: attention over a sequence that is spread over ranks."""

from __future__ import annotations

from torch import nn

_MISSING = "needs ring attention, which is missing; BlockSparseBase attends on one device"


class DistributedConfig:
    """How ranks share a sequence. Not there yet: its constructor raises NotImplementedError."""

    def __init__(self) -> None:
        raise NotImplementedError(f"DistributedConfig {_MISSING}")


class BlockSparseDistributed(nn.Module):
    """Not there yet: its constructor raises NotImplementedError.

    Args:
        config: how ranks share the sequence.
    """

    def __init__(self, config: DistributedConfig | None = None) -> None:
        raise NotImplementedError(f"BlockSparseDistributed {_MISSING}")
