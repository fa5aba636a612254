"""RankChoices: the part of a search space that says how many ranks share a question, how it is dealt, and how gradients
travel. Partition and codec are only asked where there are ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raybsa.gradients.catalog import build
from raybsa.gradients.powersgd import PowerSGD
from raybsa.ring.partition import STRATEGIES
from raybsa.spec import OVER_RANKS, UNTRAINED, Ranks, canonical_json

Config = dict[str, Any]
NAMES = ("world_size", "partition", "codec")


@dataclass(frozen=True)
class RankChoices:
    """Args:
    world_sizes, partitions, codecs: as in ``SearchSpace``; codecs are specs.
    task: of the questions.

    Raises:
        ValueError: none to choose from, a number of ranks that is none, an unknown partition, or a task whose sequence
            cannot be split.
    """

    world_sizes: tuple[int, ...]
    partitions: tuple[str, ...]
    codecs: tuple[Mapping[str, Any], ...]
    task: str

    def __post_init__(self) -> None:
        if not self.world_sizes or any(type(size) is not int or size < 1 for size in self.world_sizes):
            raise ValueError(f"world_sizes are numbers of ranks from 1, got {list(self.world_sizes)}")
        if not self.codecs or not self.partitions or set(self.partitions) - set(STRATEGIES):
            raise ValueError(
                f"a space needs codecs, and partitions of {', '.join(STRATEGIES)}, got {list(self.codecs)} and "
                f"{list(self.partitions)}"
            )
        if max(self.world_sizes) > 1 and self.task not in OVER_RANKS:
            raise ValueError(
                f"only the tasks {', '.join(OVER_RANKS)} can be split over ranks, got world_sizes "
                f"{list(self.world_sizes)} with task {self.task!r}"
            )

    def names(self, config: Config) -> list[str]:
        """The parameters of these that ``config`` has, as far as it tells yet; what has one choice is not asked."""
        asked = [name for name in NAMES if len(self.choices(name)) > 1]
        return asked if self.world_size(config) > 1 else [name for name in asked if name == "world_size"]

    def choices(self, name: str) -> list[Any]:
        """What one of ``NAMES`` can be; codecs are JSON texts."""
        texts = [canonical_json(codec) for codec in self.codecs]
        return list(dict(zip(NAMES, (self.world_sizes, self.partitions, texts), strict=True))[name])

    def world_size(self, config: Config) -> int:
        """Ranks that a configuration asks for."""
        return config.get("world_size", self.world_sizes[0])

    def ranks(self, config: Config) -> Ranks:
        """What a configuration says. PowerSGD needs sums over all ranks: dK and dV then go as they are."""
        size, plain = self.world_size(config), build("none").spec
        if size == 1:
            return Ranks()
        codec = json.loads(config.get("codec", self.choices("codec")[0]))
        return Ranks(
            size,
            config.get("partition", self.partitions[0]),
            gradient_codec=plain if codec["name"] == PowerSGD.name else codec,
            codec=plain if self.task in UNTRAINED else codec,
        )

    def named(self, ranks: Ranks) -> Config:
        """The parameters that say ``ranks``, asked or not. Undoes ``ranks`` where these choices can say them."""
        found: Config = {"world_size": ranks.world_size, "partition": ranks.partition}
        said = (codec for codec in self.choices("codec") if self.ranks({**found, "codec": codec}) == ranks)
        return found | {"codec": next(said, None)}

    def others(self) -> list[Config]:
        """Each choice but the first, once: numbers of ranks, then partitions and codecs of the first ring."""
        sized = [{"world_size": size} for size in self.world_sizes] if len(self.world_sizes) > 1 else [{}]
        ring = next((config for config in sized if self.world_size(config) > 1), None)
        of_ring = [] if ring is None else [ring | {n: c} for n in NAMES[1:] for c in self.choices(n)[1:]]
        return sized[1:] + of_ring
