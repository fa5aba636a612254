"""What a search may ask: families, their parameters, mixtures of heads, densities and block sizes around a base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from raybsa.experiments.rank_choices import NAMES, Config, RankChoices
from raybsa.gradients.catalog import build
from raybsa.spec import ADAPTIVE, DENSE, DISTRIBUTED, AttentionSpec, PatternSpec, TrialSpec, canonical_json
from raybsa.variants.source import layout_source

MIXTURE = "per_head"
REFERENCE = "reference"

# Density sets a family's own free parameter; what else shapes it is searched.
DEFAULT_FAMILIES: dict[str, dict[str, list[Any]]] = {
    "sliding_window": {},
    "sink_window": {"sink": [16, 64]},
    "bigbird": {"num_globals": [1, 2]},
    "dilated": {"dilation_rates": [[1, 2, 4], [1, 4, 16]]},
    "power_of_two": {},
    "vertical_slash": {"columns": [[0, 256]], "offsets": [[0, 128, 256]]},
    "strided": {},
    "fixed": {"span": [4, 8]},
    "chunked": {},
    "random": {},
    "butterfly": {},
    "global_blocks": {},
}


@dataclass(frozen=True)
class SearchSpace:
    """The questions of one search: the base's, with every attention that the space allows, and the dense baseline.

    Args:
        base: everything but the attention.
        families: catalog name, or ``"adaptive"`` with the options of ``BlockSelector``, -> parameter -> choices (JSON
            values). A parameter that is not named keeps its default.
        densities: lowest and highest, drawn log-uniformly; three significant digits count.
        block_sizes: choices, powers of two; families are first compared at the first.
        mixtures: pairs of different families that share the heads of a layer.
        shares: how many of a mixture's heads follow the first of its pair, in (0, 1).
        variants: which of the factory's variants compute it ("adaptive" is one of its own).
        references: attentions that are asked as they are, after the baseline: what the front has to beat.
        world_sizes: choices of how many ranks share the sequence; families are first compared at the first. The
            baseline and the references are asked of one alone.
        partitions: of a ``DistributedConfig``, asked where there are ranks.
        codecs: how gradients travel between ranks, those of K and V too where the codec can: names or specs of
            ``raybsa.gradients``, asked where there are ranks.

    Raises:
        ValueError: an unknown family, parameter, partition or codec, a range that is none, or ranks for a task that
            cannot be split.
    """

    base: TrialSpec
    families: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=lambda: DEFAULT_FAMILIES)
    densities: tuple[float, float] = (0.05, 0.5)
    block_sizes: tuple[int, ...] = (16, 32, 64)
    mixtures: tuple[tuple[str, str], ...] = ()
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    variants: tuple[str, ...] = ("base",)
    references: tuple[AttentionSpec, ...] = ()
    world_sizes: tuple[int, ...] = (1,)
    partitions: tuple[str, ...] = ("balanced",)
    codecs: tuple[Any, ...] = ("none",)

    def __post_init__(self) -> None:
        low, high = self.densities
        if not 0 < low <= high <= 1:
            raise ValueError(f"densities must be 0 < lowest <= highest <= 1, got {self.densities}")
        if not self.families or not self.block_sizes or not self.variants:
            raise ValueError(
                f"a space needs families and block sizes, and variants to compute them, got {self.families}, "
                f"{self.block_sizes} and {self.variants}"
            )
        for pair in self.mixtures:
            if len(set(pair)) != 2 or set(pair) - set(self.families):
                raise ValueError(f"a mixture is a pair of {sorted(self.families)}, got {list(pair)}")
        if not all(0 < share < 1 for share in self.shares):
            raise ValueError(f"a share of the heads lies between 0 and 1, got {list(self.shares)}")
        object.__setattr__(self, "densities", (_three_digits(low), _three_digits(high)))
        object.__setattr__(self, "codecs", tuple(build(codec).spec for codec in self.codecs))
        for config in self.first_points()[1 + len(self.references) :]:
            attention = self.spec(config).layer(0)
            layout_source(
                attention.pattern,
                None,
                None,
                density=attention.density,
                block_size=attention.block_size,
                causal=self.base.causal,
                num_heads=self.base.num_heads,
                head_dim=self.base.head_dim,
                num_kv_heads=self.base.num_kv_heads,
            )

    def draw(self, trial: Any) -> Config:
        """An Optuna trial's suggestions; parameters are asked for where their family was drawn."""
        config: Config = {}
        while name := self._next(config):
            if name == "density":
                config[name] = trial.suggest_float(name, *self.densities, log=True)
            else:
                config[name] = trial.suggest_categorical(name, self.choices(name))
        return config

    def first_points(self) -> list[Config]:
        """The baseline, the references, then each family once at the middle density and the first block size: all get
        a hearing."""
        low, high = self.densities
        points = self.fixed_points()
        for family in self.families:
            points.append(self._completed({"family": family, "density": _three_digits((low * high) ** 0.5)}))
        return points

    def openings(self) -> list[Config]:
        """The first points, then these again with each other choice of a family's parameters, one at a time, and the
        first family with each other choice of ranks: what was never asked cannot be learned from."""
        first = self.first_points()
        others = [
            point | {name: choice}
            for point in first
            for name in point
            if "." in name
            for choice in self.choices(name)[1:]
        ]
        start = {name: first[len(self.fixed_points())][name] for name in ("family", "density")}
        return first + others + [self._completed(start | choice) for choice in self._sharing.others()]

    def fixed_points(self) -> list[Config]:
        """What is asked whatever an algorithm thinks of it: the baseline and the references."""
        references = range(len(self.references))
        return [{"family": DENSE}, *({"family": REFERENCE, REFERENCE: index} for index in references)]

    def grid(self, densities: int = 4) -> Iterator[Config]:
        """The fixed points, then every combination at so many densities, evenly spaced on a logarithmic scale."""
        steps = list(dict.fromkeys(_three_digits(float(d)) for d in np.geomspace(*self.densities, densities)))

        def complete(config: Config) -> Iterator[Config]:
            name = self._next(config)
            if name is None:
                yield config
                return
            for value in steps if name == "density" else self.choices(name):
                yield from complete(config | {name: value})

        yield from self.fixed_points()
        yield from complete({})

    def choices(self, name: str) -> list[Any]:
        """What a parameter of a configuration can be; parameters of a family, and codecs, are JSON texts."""
        choices: dict[str, Sequence[Any]] = {
            "family": [*self.families, *([MIXTURE] if self.mixtures else [])],
            "block_size": self.block_sizes,
            "variant": self.variants,
            "mixture": ["+".join(pair) for pair in self.mixtures],
            "share": self.shares,
            **{name: self._sharing.choices(name) for name in NAMES},
        }
        if name in choices:
            return list(choices[name])
        family, _, parameter = name.partition(".")
        return [canonical_json(choice) for choice in self.families[family][parameter]]

    def distributions(self, config: Config) -> dict[str, BaseDistribution]:
        """Optuna's distribution of every parameter that ``config`` has."""
        density = FloatDistribution(*self.densities, log=True)
        return {n: density if n == "density" else CategoricalDistribution(self.choices(n)) for n in config}

    def spec(self, config: Config) -> TrialSpec:
        """The question that a configuration asks.

        Raises:
            ValueError: it names a combination that no rule stands for (a mixture that leaves a rule without heads).
        """
        if config["family"] == DENSE:
            return replace(self.base, attention=(AttentionSpec(DENSE),))
        if config["family"] == REFERENCE:
            return replace(self.base, attention=(self.references[config[REFERENCE]],))
        density = _three_digits(config["density"])  # what is pasted from a report should be readable
        variant = ADAPTIVE if config["family"] == ADAPTIVE else config.get("variant", self.variants[0])
        pattern = self._mixture(config) if config["family"] == MIXTURE else self._pattern(config["family"], config)
        ranks = self._sharing.ranks(config)
        variant = DISTRIBUTED if ranks.world_size > 1 else variant
        attention = AttentionSpec(variant, pattern, density=density, block_size=config["block_size"])
        return replace(self.base, attention=(attention,)).over(ranks)

    def config(self, spec: TrialSpec) -> Config | None:
        """The configuration that asks ``spec``; None where it is no question of this space. Undoes ``spec``."""
        attention, ranks = spec.attention[0], spec.ranks
        if attention.pattern is None or (attention in self.references and ranks.world_size == 1):
            return next((config for config in self.fixed_points() if self.spec(config) == spec), None)
        config = {"density": attention.density, "block_size": attention.block_size, **self._named(attention.pattern)}
        config |= {"variant": attention.variant, **self._sharing.named(ranks)}
        names = self._names(config)
        config = {name: value for name, value in config.items() if "." in name or name in names}
        return config if self._has(config) and self.spec(config) == spec else None

    # ---- for ourselves -----------------------------------------------------------------------------------------

    @cached_property
    def _sharing(self) -> RankChoices:
        return RankChoices(self.world_sizes, self.partitions, self.codecs, self.base.task)

    def _next(self, config: Config) -> str | None:
        """The parameter to choose next; None where the configuration is complete."""
        return next((name for name in self._names(config) if name not in config), None)

    def _completed(self, config: Config) -> Config:
        """``config`` with the first choice of whatever it leaves open."""
        config = dict(config)
        while name := self._next(config):
            config[name] = self.choices(name)[0]
        return config

    def _names(self, config: Config) -> list[str]:
        """The parameters of a configuration, as far as ``config`` tells yet, in the order in which they are drawn."""
        family = config.get("family")
        choose_variant = len(self.variants) > 1 and family != ADAPTIVE and self._sharing.world_size(config) == 1
        names = ["family", "density", "block_size", *self._sharing.names(config)]
        names += ["variant"] if choose_variant else []
        if family == MIXTURE:
            names += ["mixture", "share"]
        rules = config["mixture"].split("+") if "mixture" in config else [str(family)]
        return names + [f"{rule}.{name}" for rule in rules if rule in self.families for name in self.families[rule]]

    def _pattern(self, family: str, config: Config) -> PatternSpec:
        return PatternSpec(family, {name: json.loads(config[f"{family}.{name}"]) for name in self.families[family]})

    def _mixture(self, config: Config) -> PatternSpec:
        """The first rule on a share of the heads, the second on the others: as short a cycle as says so."""
        heads = self.base.num_heads
        first, second = (self._pattern(rule, config).to_dict() for rule in config["mixture"].split("+"))
        count = round(config["share"] * heads)
        if not 0 < count < heads:
            raise ValueError(f"a share of {config['share']:g} of {heads} heads leaves a rule without heads")
        turns = gcd(count, heads)
        return PatternSpec(MIXTURE, {"parts": [first] * (count // turns) + [second] * ((heads - count) // turns)})

    def _named(self, pattern: PatternSpec) -> Config:
        """The part of a configuration that names the pattern."""
        if pattern.name != MIXTURE:
            return {"family": pattern.name, **_parameters(pattern)}
        parts = [PatternSpec.from_dict(part) for part in pattern.params["parts"]]
        first, second, heads = parts[0], parts[-1], self.base.num_heads
        count = heads * parts.count(first) // len(parts)
        share = next((share for share in self.shares if round(share * heads) == count), None)
        named = {"family": MIXTURE, "mixture": f"{first.name}+{second.name}", "share": share}
        return named | _parameters(first) | _parameters(second)

    def _has(self, config: Config) -> bool:
        """Whether exactly the parameters of a question are there, each one of its choices."""
        if config["family"] not in self.choices("family") or set(self._names(config)) != set(config):
            return False
        density = config["density"]
        fits = density is not None and self.densities[0] <= density <= self.densities[1]
        return fits and all(value in self.choices(name) for name, value in config.items() if name != "density")


def _parameters(pattern: PatternSpec) -> Config:
    return {f"{pattern.name}.{name}": canonical_json(value) for name, value in pattern.params.items()}


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
