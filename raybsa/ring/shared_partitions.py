"""SharedPartitions: the one partition of each length by which all that shares a group of ranks goes.

Activations stay where they are between layers. So two layers that deal a sequence in two ways would compute another
model than one device does, without a word; one partition a length rules that out. All ranks of a program ask in one
order, so what is refused on one rank is refused on all.
"""

from __future__ import annotations

from typing import NamedTuple

from raybsa.comm import Communicator
from raybsa.ring.partition import Partition

HELP = (
    "share_partition(model, communicator, seq_len), before the first shard, deals one for all layers; "
    "forget_partitions(communicator) lets go of what was dealt before"
)


class Dealing(NamedTuple):
    """How a partition was dealt: the arguments of ``partition_for``."""

    strategy: str
    equal_counts: bool


class SharedPartitions:
    """What the layers, sequences and models on one group of ranks have agreed on; ``partitions_of`` finds it.

    Kept as long as the group: a few numbers a block of each length.

    Attributes:
        latest: the partition that was asked for last; None before the first.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Partition, Dealing | None]] = {}
        self.latest: Partition | None = None

    def find(self, seq_len: int) -> Partition | None:
        """The partition of a length; None where none was settled."""
        if seq_len not in self._known:
            return None
        self.latest, _ = self._known[seq_len]
        return self.latest

    def dealing(self, seq_len: int) -> Dealing | None:
        """How the partition of a length was dealt; None where nobody said."""
        return self._known[seq_len][1]

    def settle(self, partition: Partition, dealing: Dealing | None = None) -> Partition:
        """From now on this is the partition of its length; the very object that is known where an equal one is.

        Raises:
            ValueError: another partition of this length is known; the message names what helps.
        """
        known, how = self._known.setdefault(partition.seq_len, (partition, dealing))
        if known is not partition and known.digest() != partition.digest():
            raise ValueError(
                f"{partition.seq_len} tokens are dealt to these ranks as {_described(known, how)} already, got "
                f"{_described(partition, dealing)}: {HELP}"
            )
        self.latest = known
        return known

    def confirm(self, partition: Partition) -> Partition:
        """The partition that was settled, where it still is.

        Raises:
            ValueError: it was forgotten, and perhaps another one settled, since.
        """
        known, how = self._known.get(partition.seq_len, (None, None))
        if known is None or (known is not partition and known.digest() != partition.digest()):
            now = "not dealt any more" if known is None else f"now dealt as {_described(known, how)}"
            raise ValueError(
                f"the partition {_described(partition, None)} was forgotten: its {partition.seq_len} tokens are {now}; "
                "bind the model again, by share_partition(model, communicator, seq_len), and shard again"
            )
        self.latest = known
        return known

    def forget(self) -> None:
        """Lets go of all of them."""
        self._known.clear()
        self.latest = None


def partitions_of(communicator: Communicator) -> SharedPartitions:
    """Those of the communicator's group."""
    return communicator.shared(SharedPartitions)


def forget_partitions(communicator: Communicator) -> None:
    """Lets another model deal the same lengths to these ranks in its own way. Every rank calls it.

    What was sharded before must not be used with what is dealt afterwards; a layer or a sequence that holds an earlier
    partition raises ValueError.
    """
    partitions_of(communicator).forget()


def _described(partition: Partition, dealing: Dealing | None) -> str:
    how = "given blocks" if dealing is None else f"{dealing.strategy} blocks"
    return f"{how} of {partition.block_size} tokens ({partition.digest()[:8]})"
