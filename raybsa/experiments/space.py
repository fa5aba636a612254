"""What a search may ask: families, their parameters, mixtures of heads, densities and block sizes around a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from raybsa.content import asked_now
from raybsa.experiments.layers import followed, in_turn, layer_names, named_layers
from raybsa.experiments.pattern_choices import MIXTURE, PatternChoices, is_pair_of, parameters_of
from raybsa.experiments.rank_choices import NAMES, Config, RankChoices
from raybsa.gradients.catalog import build
from raybsa.patterns.catalog import CATALOG
from raybsa.spec import ADAPTIVE, DENSE, DISTRIBUTED, AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.attention import VARIANTS
from raybsa.variants.source import layout_source

PER_LAYER = "per_layer"
REFERENCE = "reference"
_LARGEST_GRID = 4096  # ways to give each layer its family

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
            values). A parameter that is not named keeps its default; those that a density sets cannot be named.
        densities: lowest and highest, drawn log-uniformly; three significant digits count.
        block_sizes: choices, powers of two; families are first compared at the first.
        mixtures: pairs of different families that share the heads of a layer.
        shares: how many of a mixture's heads follow the first of its pair, in (0, 1).
        variants: which of the factory's variants compute it ("adaptive" is one of its own).
        references: attentions that are asked as they are, after the baseline: what the front has to beat.
        per_layer: also ask questions whose layers differ: each follows one of the families or stays dense. Density,
            block size and the parameters of a family are the same in all of them, and so are the ranks.
        world_sizes: choices of how many ranks share the sequence; families are first compared at the first. The
            baseline and the references are asked of one alone.
        partitions: of a ``DistributedConfig``, asked where there are ranks.
        codecs: how gradients travel between ranks, those of K and V too where the codec can: names or specs of
            ``raybsa.gradients``, asked where there are ranks.

    Raises:
        ValueError: an unknown family, parameter, variant, partition or codec, a range that is none, layers that differ
            where there is only one, or ranks for a task that cannot be split.
    """

    base: TrialSpec
    families: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=lambda: DEFAULT_FAMILIES)
    densities: tuple[float, float] = (0.05, 0.5)
    block_sizes: tuple[int, ...] = (16, 32, 64)
    mixtures: tuple[tuple[str, str], ...] = ()
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    variants: tuple[str, ...] = ("base",)
    references: tuple[AttentionSpec, ...] = ()
    per_layer: bool = False
    world_sizes: tuple[int, ...] = (1,)
    partitions: tuple[str, ...] = ("balanced",)
    codecs: tuple[Any, ...] = ("none",)

    def __post_init__(self) -> None:
        if not is_pair_of(self.densities, (int, float)) or not 0 < self.densities[0] <= self.densities[1] <= 1:
            raise ValueError(
                f"densities are a pair of numbers, 0 < lowest <= highest <= 1, got {_as_list(self.densities)}"
            )
        low, high = self.densities
        if not self.families or not self.block_sizes or not self.variants:
            raise ValueError(
                f"a space needs families and block sizes, and variants to compute them, got {self.families}, "
                f"{self.block_sizes} and {self.variants}"
            )
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise ValueError(f"a space's variants are of {list(VARIANTS)}, got {unknown}")
        if self.per_layer and self.base.num_layers < 2:
            raise ValueError(f"per_layer needs at least two layers that can differ, got {self.base.num_layers}")
        object.__setattr__(self, "densities", (_three_digits(low), _three_digits(high)))
        object.__setattr__(self, "codecs", tuple(build(codec).spec for codec in self.codecs))
        for family, parameters in self.families.items():
            if set_by_density := set(parameters).intersection(_free(family)):
                raise ValueError(
                    f"a density sets {', '.join(sorted(set_by_density))} of {family}, and every question of a space "
                    "has a density: leave it out, or ask it as one of the references"
                )
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
        return self.fixed_points() + [self._middle({"family": family}) for family in self.families]

    def openings(self) -> list[Config]:
        """The first points, then these again with each other choice of a family's parameters, one at a time, and the
        first family with each other choice of ranks: what was never asked cannot be learned from. Where layers may
        differ, last a question whose layers take turns."""
        first = self.first_points()
        others = [
            point | {name: choice}
            for point in first
            for name in point
            if "." in name
            for choice in self.choices(name)[1:]
        ]
        shared = [self._middle({"family": next(iter(self.families)), **ranks}) for ranks in self._sharing.others()]
        turns = {"family": PER_LAYER} | in_turn(self.families, self.base.num_layers)
        return first + others + shared + [self._middle(turns)] * self.per_layer

    def fixed_points(self) -> list[Config]:
        """What is asked whatever an algorithm thinks of it: the baseline and the references."""
        references = range(len(self.references))
        return [{"family": DENSE}, *({"family": REFERENCE, REFERENCE: index} for index in references)]

    def grid(self, densities: int = 4) -> Iterator[Config]:
        """The fixed points, then every combination at so many densities, evenly spaced on a logarithmic scale.

        Raises:
            ValueError: layers may differ in more ways than can be listed.
        """
        ways = (len(self.families) + 1) ** self.base.num_layers
        if self.per_layer and ways > _LARGEST_GRID:
            raise ValueError(f"a grid lists at most {_LARGEST_GRID} ways to give layers their families, got {ways}")
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
        own: dict[str, Sequence[Any]] = {
            "family": [*self.families, *[MIXTURE] * bool(self.mixtures), *[PER_LAYER] * self.per_layer],
            "block_size": self.block_sizes,
            "variant": self.variants,
        }
        if name in own:
            return list(own[name])
        if name in layer_names(self.base.num_layers):
            return list(dict.fromkeys([*self.families, DENSE]))
        return self._sharing.choices(name) if name in NAMES else self._patterns.choices(name)

    def distributions(self, config: Config) -> dict[str, BaseDistribution]:
        """Optuna's distribution of every parameter that ``config`` has."""
        density = FloatDistribution(*self.densities, log=True)
        return {n: density if n == "density" else CategoricalDistribution(self.choices(n)) for n in config}

    def spec(self, config: Config) -> TrialSpec:
        """The question that a configuration asks. Layers that all stay dense are the baseline.

        Raises:
            ValueError: it names a combination that no rule stands for (a mixture that leaves a rule without heads).
        """
        if config["family"] == REFERENCE:
            return replace(self.base, attention=(asked_now(self.references[config[REFERENCE]]),))
        families = _families(config)
        if set(families) == {DENSE}:
            return replace(self.base, attention=(AttentionSpec(DENSE),))
        layers = tuple(self._attention(family, config) for family in families)
        attention = layers if len(set(layers)) > 1 else layers[:1]
        return replace(self.base, attention=attention).over(self._sharing.ranks(config))

    def config(self, spec: TrialSpec) -> Config | None:
        """The configuration that asks ``spec``; None where it is no question of this space. Undoes ``spec``."""
        fixed = next((config for config in self.fixed_points() if self.spec(config) == spec), None)
        sparse = [layer for layer in spec.attention if layer.density is not None]
        if fixed is not None or not sparse:
            return fixed
        config: Config = {"density": sparse[0].density, "block_size": sparse[0].block_size}
        patterns = [layer.pattern for layer in sparse if layer.pattern is not None]
        if len(spec.attention) == 1:
            config |= self._patterns.named(patterns[0])
        else:
            config |= {"family": PER_LAYER, **named_layers(spec.attention)}
            for pattern in patterns:
                config |= parameters_of(pattern)
        variant = next((layer.variant for layer in sparse if layer.variant != ADAPTIVE), self.variants[0])
        config |= {"variant": variant, **self._sharing.named(spec.ranks)}
        unasked = {"variant", *NAMES} - set(self._names(config))
        config = {name: value for name, value in config.items() if name not in unasked}
        return config if self._has(config) and self.spec(config) == spec else None

    # ---- for ourselves -----------------------------------------------------------------------------------------

    @cached_property
    def _patterns(self) -> PatternChoices:
        return PatternChoices(self.families, self.mixtures, self.shares, self.base.num_heads)

    @cached_property
    def _sharing(self) -> RankChoices:
        return RankChoices(self.world_sizes, self.partitions, self.codecs, self.base.task)

    def _next(self, config: Config) -> str | None:
        """The parameter to choose next; None where the configuration is complete."""
        return next((name for name in self._names(config) if name not in config), None)

    def _names(self, config: Config) -> list[str]:
        """The parameters of a configuration, as far as ``config`` tells yet, in the order in which they are drawn."""
        family, alone = config.get("family"), self._sharing.world_size(config) == 1
        names = ["family", "density", "block_size", *self._sharing.names(config)]
        names += ["variant"] if len(self.variants) > 1 and family != ADAPTIVE and alone else []
        names += layer_names(self.base.num_layers) if family == PER_LAYER else []
        return names + self._patterns.names(_families(config), config)

    def _middle(self, config: Config) -> Config:
        """Completed with the middle density and each parameter's first choice."""
        low, high = self.densities
        config = config | {"density": _three_digits((low * high) ** 0.5)}
        while name := self._next(config):
            config[name] = self.choices(name)[0]
        return config

    def _attention(self, family: str, config: Config) -> AttentionSpec:
        """What one layer attends with; all of them, where they do not differ."""
        size, alone = config["block_size"], self._sharing.world_size(config) == 1
        if family == DENSE and alone:
            return AttentionSpec(DENSE, block_size=size)
        if family == DENSE:  # over ranks all blocks are a pattern like another
            return AttentionSpec(DISTRIBUTED, PatternSpec(DENSE), block_size=size)
        variant = ADAPTIVE if family == ADAPTIVE else config.get("variant", self.variants[0])
        density = _three_digits(config["density"])  # what is pasted from a report should be readable
        pattern = self._patterns.pattern(family, config)
        return asked_now(AttentionSpec(variant if alone else DISTRIBUTED, pattern, density=density, block_size=size))

    def _has(self, config: Config) -> bool:
        """Whether exactly the parameters of a question are there, each one of its choices."""
        if config["family"] not in self.choices("family") or set(self._names(config)) != set(config):
            return False
        fits = self.densities[0] <= config["density"] <= self.densities[1]
        return fits and all(value in self.choices(name) for name, value in config.items() if name != "density")


def _free(family: str) -> tuple[str, ...]:
    """The parameters of a catalog's family that a density sets."""
    return CATALOG[family].free if family in CATALOG else ()


def _families(config: Config) -> list[str]:
    """What the layers follow, as far as ``config`` tells: one for all, or one each."""
    return followed(config) if config.get("family") == PER_LAYER else [config.get("family", "")]


def _as_list(value: Any) -> Any:
    """As YAML and JSON write it."""
    return list(value) if isinstance(value, tuple) else value


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
