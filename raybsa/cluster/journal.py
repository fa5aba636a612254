"""Journal: what the ranks of a training told of their steps, its recoveries, and what it led to."""

from __future__ import annotations

from dataclasses import dataclass

from raybsa.cluster.member import Progress
from raybsa.gradients.overlap import Overlap


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says what was tried."""


@dataclass(frozen=True)
class Recovery:
    """One recovery.

    Args:
        generation: the one that broke.
        lost: (worker, why) of each lost worker; empty where the ring grew, or broke without a loss.
        noticed_at, resumed_at: when the coordinator knew, and when all ranks could train again, of ``time.time``.
        step: the step from which they went on.
        steps_lost: applied steps that had to be made again (0 where a survivor had them all).
        filled: how the ring was filled: "spare", "fresh", "shrunk", "grown" or "as it was".
        world_size: ranks afterwards.
        filled_at, formed_at: when the workers were at hand, and when all ranks had met.
    """

    generation: int
    lost: tuple[tuple[int, str], ...]
    noticed_at: float
    resumed_at: float
    step: int
    steps_lost: int
    filled: str
    world_size: int
    filled_at: float
    formed_at: float

    @property
    def resumed_in_s(self) -> float:
        return self.resumed_at - self.noticed_at

    @property
    def reasons(self) -> str:
        """Who was lost and why, in one line; where nobody was, how the ring was filled."""
        return "; ".join(f"worker {worker}: {why}" for worker, why in self.lost) or self.filled


@dataclass(frozen=True)
class TrainingResult:
    """What a training led to: the loss of every step (nats a token), its recoveries, bytes that one rank sent in one
    generation at most, by kind, a digest of the final state (equal on all ranks), bits per held-out byte, the seconds
    from the first step to the last, recoveries included, when each step was applied first (of ``time.time``), and how
    much of the gradients' travel lay within backward, over all ranks."""

    losses: dict[int, float]
    recoveries: tuple[Recovery, ...]
    sent: dict[str, int]
    digest: str
    bits_per_byte: float | None
    world_size: int
    train_seconds: float
    applied_at: dict[int, float]
    overlap: Overlap


class Journal:
    """Kept while a training runs.

    Attributes:
        losses: of every step that a rank told of (nats a token).
        recoveries: so far, in their order.
    """

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.recoveries: list[Recovery] = []
        self._applied_at: dict[int, float] = {}
        self._sent: dict[str, int] = {}
        self._overlap = Overlap()

    @property
    def reached(self) -> int:
        """The step after the last that any rank told of."""
        return max(self.losses, default=-1) + 1

    def take(self, progress: Progress) -> None:
        """What one rank tells of the steps since it told last; ranks may come in any order."""
        self.losses |= dict(progress.losses)
        self._overlap += progress.overlap
        for step, at in progress.applied_at:
            self._applied_at[step] = min(at, self._applied_at.get(step, at))
        for kind, nbytes in progress.sent.items():
            self._sent[kind] = max(self._sent.get(kind, 0), nbytes)

    def result(self, digest: str, bits_per_byte: float | None, world_size: int, train_seconds: float) -> TrainingResult:
        """All that was told, at the end."""
        return TrainingResult(
            losses=dict(sorted(self.losses.items())),
            recoveries=tuple(self.recoveries),
            sent=dict(self._sent),
            digest=digest,
            bits_per_byte=bits_per_byte,
            world_size=world_size,
            train_seconds=train_seconds,
            applied_at=dict(sorted(self._applied_at.items())),
            overlap=self._overlap,
        )
