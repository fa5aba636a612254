"""Case: one random call as plain data. Each field's default is the plainest value, so that a case shrinks by defaults.

Nothing here imports torch: the process that draws cases outlives the one that runs them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        subject: what is called: ``function``, ``parts`` (the function over parts of the keys, merged), ``base``,
            ``multihead`` or ``adaptive``.
        transform: what of torch is done to it, a name of ``tests.fuzzing.transforms.TRANSFORMS``.
        pattern: a family of the catalog with small parameters, or ``random`` blocks; ``groups`` layouts.
        groups: ``one``, ``heads`` or ``samples`` (one a sample and head).
        mask: ``none``, ``bool``, ``float``, ``infinite`` (float, some of it -inf) or ``lowest`` (some of it the lowest
            number of its type); ``mask_shape`` says which of (B, H, Sq, Skv) it has: ``"0011"`` is (1, 1, Sq, Skv),
            ``"11"`` (Sq, Skv); ``mask_strides``: ``contiguous``, ``expanded`` to its full shape or ``transposed``.
        grad_of: the inputs that ask for a gradient, of q, k, v, m (attn_mask) and b (block_bias).
        strides: how q, k and v lie in memory, a name of ``tests.fuzzing.inputs.LAID_OUT``.
        seedless: dropout draws its own seed.
        loss: what a gradient is of, a name of ``tests.fuzzing.given.LOSSES``.
        shared: ``kv``: k is v; ``qkv``: all three are one tensor.
        misuse: what is wrong about the call, a name of ``tests.fuzzing.misuse.MISUSES``: it must be refused.
        warm: another call over the same layout comes first.
        extras: what only some subjects know, as ``name=value`` words.
    """

    seed: int = 0
    subject: str = "function"
    transform: str = "plain"
    backend: str = "auto"
    device: str = "cpu"
    dtype: str = "float64"
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    q_len: int = 32
    kv_len: int = 32
    head_dim: int = 16
    v_dim: int = 16
    q_block: int = 16
    kv_block: int = 16
    pattern: str = "dense"
    groups: str = "one"
    density: float | None = None
    causal: bool = False
    scale: float | None = None
    magnitude: float = 1.0
    mask: str = "none"
    mask_shape: str = "11"
    mask_dtype: str = "same"
    mask_strides: str = "contiguous"
    segments: int = 0
    segment_dtype: str = "int64"
    bias: bool = False
    bias_dtype: str = "same"
    dropout: float = 0.0
    seedless: bool = False
    return_lse: bool = False
    grad_of: str = "qkv"
    loss: str = "weighted"
    shared: str = ""
    misuse: str = ""
    strides: str = "contiguous"
    deterministic: bool = False
    threads: int = 1
    warm: bool = False
    extras: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: dict[str, Any]) -> Case:
        return cls(**{**data, "extras": tuple(data.get("extras", ()))})

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not plain."""
        return {name: value for name, value in asdict(self).items() if value != getattr(PLAIN, name)}

    def __str__(self) -> str:
        return f"Case({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def without(self, names: Iterable[str]) -> Case:
        """The case with these fields plain."""
        return replace(self, **{name: getattr(PLAIN, name) for name in names})

    def smaller(self) -> list[Case]:
        """Cases that differ from this one by one thing, which is plainer in them."""
        found = [replace(self, extras=tuple(x for x in self.extras if x != gone)) for gone in self.extras]
        found += [replace(self, q_len=n, kv_len=n) for n in (32, self.q_len // 2) if n and self.q_len == self.kv_len]
        found += [replace(self, head_dim=n, v_dim=n) for n in (16, self.head_dim // 2) if n]
        found += [replace(self, q_block=16, kv_block=16), replace(self, heads=1, kv_heads=1)]
        sizes = [(n, getattr(self, n)) for n in ("q_len", "kv_len", "heads", "batch")]
        found += [replace(self, **{name: size // 2}) for name, size in sizes if size > 1]
        found += [replace(self, grad_of=self.grad_of.replace(letter, "")) for letter in self.grad_of]
        return [other for other in dict.fromkeys(found) if other != self]

    def has(self, extra: str) -> bool:
        return extra in self.extras


PLAIN = Case()
