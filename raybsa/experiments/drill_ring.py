"""The ring that a drill breaks, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raybsa.cluster.faults import FaultPlan
from raybsa.cluster.member import MemberSettings
from raybsa.cluster.resources import Share
from raybsa.cluster.training import TrainingCoordinator, require_ring
from raybsa.experiments.drill_plan import question


@dataclass(frozen=True)
class Ring:
    """How a drill trains: ranks, warm spares, seconds of silence after which a rank is lost, the text, whether Ray may
    say of each worker that it died, and what each worker owns.

    Raises:
        ValueError: as ``require_ring``.
    """

    world_size: int = 4
    spares: int = 1
    heartbeat_s: float = 2.0
    text: str | None = None
    verbose: bool = False
    share: Share = field(default_factory=Share)

    def __post_init__(self) -> None:
        require_ring(self.world_size, spares=self.spares, heartbeat_s=self.heartbeat_s)

    def coordinator(
        self, steps: int, settings: MemberSettings, plan: FaultPlan = (), **more: Any
    ) -> TrainingCoordinator:
        options = {"say": lambda text: None} | more
        return TrainingCoordinator(
            question(steps, self.text),
            self.share,
            world_size=self.world_size,
            spares=self.spares,
            settings=settings,
            heartbeat_s=self.heartbeat_s,
            replace_s=60.0,
            wait_s=300.0,
            plan=plan,
            **options,
        )
