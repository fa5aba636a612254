"""Specs: the questions the platform asks, as plain data. Frozen, comparable, JSON-able, with a stable hash."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class PatternSpec:
    """A pattern rule as data; ``raybsa.patterns.build`` makes the rule, ``rule.spec`` goes back.

    Args:
        name: a family of ``raybsa.patterns.catalog``, or a user's own ``"module:Class"``.
        params: the rule's parameters, JSON values. Composed rules hold their parts as dicts under ``"parts"``.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a pattern's name must be a non-empty string, got {self.name!r}")
        object.__setattr__(self, "params", json.loads(canonical_json(dict(self.params))))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON has it; ``from_dict`` goes back."""
        return {"name": self.name, "params": json.loads(canonical_json(self.params))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PatternSpec:
        if not isinstance(data, Mapping) or "name" not in data or set(data) - {"name", "params"}:
            raise ValueError(f"a pattern dict has the keys 'name' and 'params', got {data!r}")
        return cls(data["name"], data.get("params") or {})

    def __hash__(self) -> int:
        return hash(canonical_json(self.to_dict()))


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, tuples as lists. Raises TypeError for what JSON cannot hold."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def stable_hash(value: Any) -> str:
    """16 hex digits that stay the same across processes and machines."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


DENSITY_MEANING = 2  # another number where the same density would keep other blocks; 1: a share of every row
DENSE = "dense"
DISTRIBUTED = "distributed"  # the variant whose ranks share the sequence
ADAPTIVE = "adaptive"  # in the place of a pattern's name: blocks that a learned selector chooses
WEIGHTS = "weights"  # task parameter of a preview: the file of weights that it borrows
MODULE = "module"  # the task whose model, data and loss are a user's own
UNTRAINED = ("speed", "ring", "ring_peers", "ring_longest", "peers")  # tasks that only measure
OVER_RANKS = ("byte_lm", "speed")  # tasks whose sequence ranks may share: a search's rings
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class AttentionSpec:
    """What a model attends with: the arguments of ``raybsa.create_block_sparse_attention``, as data.

    Args:
        variant: ``"base"``, … as the factory names them, or ``"dense"``: torch's own SDPA, the baseline.
        pattern: the rule; None only for the dense baseline.
        density: share of the allowed blocks to keep, in (0, 1]; None keeps what the rule gives by itself.
        block_size: tokens of a block, a power of two.
        backend: as in ``block_sparse_attention``.
        content: digest of what the pattern only names, a user's own code or a file (content.py); empty where it names
            nothing, or nobody looked.

    Raises:
        ValueError: a dense baseline with a pattern or density, another variant without a pattern, a density outside
            (0, 1], or a block size that is not a positive power of two.
    """

    variant: str = "base"
    pattern: PatternSpec | None = None
    density: float | None = None
    block_size: int = 64
    backend: str = "auto"
    content: str = ""

    def __post_init__(self) -> None:
        if self.variant == DENSE and (self.pattern is not None or self.density is not None):
            raise ValueError(f"the dense baseline takes no pattern and no density, got {self.pattern}, {self.density}")
        if self.variant != DENSE and not isinstance(self.pattern, PatternSpec):
            raise ValueError(f"variant {self.variant!r} needs a PatternSpec, got {self.pattern!r}")
        if self.density is not None:
            if not 0 < self.density <= 1:
                raise ValueError(f"density must lie in (0, 1], got {self.density!r}")
            object.__setattr__(self, "density", float(self.density))
        require_positive("block_size", self.block_size)
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two, got {self.block_size}")

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["pattern"] = None if self.pattern is None else self.pattern.to_dict()
        return data if self.content else _without(data, "content")

    @property
    def rule(self) -> PatternSpec:
        """The pattern; of the dense baseline that of all blocks."""
        return self.pattern or PatternSpec(DENSE)

    def factory_arguments(self, causal: bool) -> dict[str, Any]:
        """The arguments of ``raybsa.create_block_sparse_attention`` for this attention, JSON values; the dense baseline
        becomes the pattern of all blocks."""
        attention = self if self.pattern else AttentionSpec(pattern=self.rule, block_size=self.block_size)
        arguments = {key: value for key, value in attention.to_dict().items() if value is not None}
        if arguments["backend"] == "auto":
            del arguments["backend"]
        return _without(arguments, "content") | {"causal": causal}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AttentionSpec:
        values = _known(cls, data)
        if values.get("pattern") is not None:
            values["pattern"] = PatternSpec.from_dict(values["pattern"])
        return cls(**values)


@dataclass(frozen=True)
class Ranks:
    """How the ranks of a ring share a trial's sequence, as data.

    Args:
        world_size: ranks; 1 is one process with the whole sequence.
        partition, gradient_codec: those of a ``raybsa.DistributedConfig``.
        codec: how the gradients of the weights travel, where the task trains: the spec of a ``raybsa.gradients`` codec.

    Raises:
        ValueError: no positive number of ranks, or a codec that is no spec.
    """

    world_size: int = 1
    partition: str = "balanced"
    gradient_codec: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    codec: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})

    def __post_init__(self) -> None:
        require_positive("world_size", self.world_size)
        for codec in (self.gradient_codec, self.codec):
            if not isinstance(codec, Mapping) or not isinstance(codec.get("name"), str):
                raise ValueError(f"ranks have codecs as specs, with a 'name', got {codec!r}")

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the ``DistributedConfig``."""
        return {"partition": self.partition, "gradient_codec": self.gradient_codec}

    @property
    def label(self) -> str:
        """``2 ranks, zigzag, int8``; empty for one rank."""
        names = dict.fromkeys(codec["name"] for codec in (self.codec, self.gradient_codec))
        words = [f"{self.world_size} ranks", self.partition, *(name for name in names if name != "none")]
        return ", ".join(words) if self.world_size > 1 else ""


_RANKS = [f.name for f in fields(Ranks)]


@dataclass(frozen=True)
class TrialSpec:
    """One question: how good and how fast is this attention on this task at this size?

    Args:
        task: ``"byte_lm"``, ``"recall"``, ``"captured"``, ``"module"`` (quality and speed), ``"speed"`` (one attention
            call, no training), ``"peers"`` (one library's kernels beside others'), ``"compression"`` (a training whose
            gradients travel by a ``codec``), ``"ring"`` (attention over ``world_size`` ranks, dealt by a
            ``partition``: its ``task_params``), ``"ring_peers"`` (the same by another library, or dense on one
            device) or ``"ring_longest"`` (whether one step of so long a sequence fits).
        attention: one for all layers, or one a layer.
        seq_len: tokens at which speed and memory are measured.
        train_len: tokens at which quality is trained and evaluated; may be shorter than ``seq_len``.
        batch: sequences of the timed call; how many a training step takes is the task's own parameter.
        dtype: ``"float32"``, ``"float64"``, ``"bfloat16"`` or ``"float16"``.
        task_params: what only this task knows (``text``, ``distance``, …), JSON values. With ``weights``, a file,
            nothing is trained or timed: the quality is that of these weights (tasks/preview.py). In a task of
            ``OVER_RANKS`` with the variant ``"distributed"``, the fields of ``Ranks`` make it a ring's.
        content: digests of what the question only names, by kind (``text``, ``file``, ``code``, ``data``): where they
            differ it is another question. Empty where nobody looked.
        density_meaning: of the attentions' densities: 1 where the question was asked when they were a share of every
            row, so that its row can be read, and its answer is none to the same question now.

    Raises:
        ValueError: a size that is not a positive integer, a learning rate that is not positive, heads that do not
            divide, an unknown dtype, ranks that are none, or a number of attentions that is neither 1 nor
            ``num_layers``.
    """

    task: str
    attention: tuple[AttentionSpec, ...]
    seq_len: int = 2048
    train_len: int = 512
    train_steps: int = 200
    learning_rate: float = 3e-3
    batch: int = 1
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int = 32
    causal: bool = True
    dtype: str = "float32"
    seed: int = 0
    task_params: Mapping[str, Any] = field(default_factory=dict)
    content: Mapping[str, str] = field(default_factory=dict)
    density_meaning: int = DENSITY_MEANING

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", tuple(self.attention))
        if all(attention.density is None for attention in self.attention):
            object.__setattr__(self, "density_meaning", DENSITY_MEANING)
        object.__setattr__(self, "task_params", json.loads(canonical_json(dict(self.task_params))))
        object.__setattr__(self, "learning_rate", float(self.learning_rate))
        for name in ("seq_len", "train_len", "train_steps", "batch", "num_layers", "num_heads", "head_dim"):
            require_positive(name, getattr(self, name))
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate!r}")
        if self.num_kv_heads is not None:
            require_positive("num_kv_heads", self.num_kv_heads)
            if self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
                )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}, got {self.dtype!r}")
        if len(self.attention) not in (1, self.num_layers):
            raise ValueError(
                f"attention must name one spec or one a layer ({self.num_layers}), got {len(self.attention)}"
            )
        _ = self.ranks  # refuses what is none

    @property
    def is_current(self) -> bool:
        """Whether its densities mean what they mean now."""
        return self.density_meaning == DENSITY_MEANING

    def layer(self, index: int) -> AttentionSpec:
        """The attention of layer ``index``."""
        return self.attention[index % len(self.attention)]

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["attention"] = [spec.to_dict() for spec in self.attention]
        data = data if self.content else _without(data, "content")
        old = self.density_meaning == 1 or all(spec.density is None for spec in self.attention)
        return _without(data, "density_meaning") if old else data  # as it was written before there was another

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialSpec:
        """What ``to_dict`` gave. Densities without a ``density_meaning`` have the first one."""
        values = {"density_meaning": 1} | _known(cls, data)
        if "attention" not in values:
            raise ValueError(f"a trial dict names its 'attention', got {sorted(data)}")
        values["attention"] = tuple(AttentionSpec.from_dict(spec) for spec in values["attention"])
        return cls(**values)

    def __hash__(self) -> int:
        return hash(canonical_json(self.to_dict()))

    @property
    def weights(self) -> str | None:
        """The file of weights that a preview borrows; None for a question that is trained."""
        return self.task_params.get(WEIGHTS)

    @property
    def ranks(self) -> Ranks:
        """How ranks share the sequence; one rank where the question does not say, or its task's ranks are no ring's."""
        known = {name: self.task_params[name] for name in _RANKS if name in self.task_params}
        return Ranks(**known) if self.task in OVER_RANKS else Ranks()

    def over(self, ranks: Ranks) -> TrialSpec:
        """The question shared by ``ranks``; one rank is no ring. ``ranks`` undoes it, and ``alone``."""
        params = {**self.task_params, **asdict(ranks)}
        return replace(self, task_params=params) if ranks.world_size > 1 else self

    @property
    def alone(self) -> TrialSpec:
        """The question without its ranks: equal for questions that differ in nothing else."""
        params = {name: value for name, value in self.task_params.items() if name not in _RANKS}
        return replace(self, task_params=params) if self.task in OVER_RANKS else self

    def factory_arguments(self, index: int) -> dict[str, Any]:
        """The arguments of ``raybsa.create_block_sparse_attention`` for layer ``index``, JSON values."""
        layer = self.layer(index)
        arguments = layer.factory_arguments(self.causal)
        if layer.pattern is not None and layer.pattern.name == ADAPTIVE:
            sizes = {name: getattr(self, name) for name in ("num_heads", "head_dim", "num_kv_heads")}
            arguments |= {name: size for name, size in sizes.items() if size is not None}
        return arguments | ({"distributed_config": self.ranks.config} if self.ranks.world_size > 1 else {})

    @property
    def digest(self) -> str:
        """16 hex digits, the same wherever the same question is asked."""
        return stable_hash(self.to_dict())


def require_positive(name: str, value: object) -> None:
    """Raises ValueError for what is no whole number from 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _without(data: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != name}


def _known(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__} is a mapping of {sorted(names)}, got {data!r}")
    unknown = set(data) - names
    if unknown:
        raise ValueError(f"{cls.__name__} knows {sorted(names)}, got also {sorted(unknown)}")
    return dict(data)
