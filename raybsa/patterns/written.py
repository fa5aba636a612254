"""Written rules: a pattern at a density as a tensor of bytes, which a graph of torch can carry to where it runs.

A compiled graph serves any length, so it cannot hold the layout; it holds what the layout follows from. The bytes say
all of it, so that a program that was saved attends by the same rule in every process, or says that it cannot.
"""

from __future__ import annotations

import json
from functools import lru_cache
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from raybsa.cache import LayoutCache
from raybsa.layout import BlockLayout
from raybsa.patterns.catalog import build
from raybsa.patterns.pattern import Pattern
from raybsa.spec import DENSITY_MEANING, canonical_json

_STEP = 256  # bytes come in multiples of this, so that graphs over most rules have inputs of one size
_LIVING = WeakTensorKeyDictionary()  # tensor -> a weak reference to the rule that it is of


class WrittenRule:
    """A rule with all that its layouts follow from, beside lengths, heads and device. Layouts are cached.

    Args:
        rule: the pattern.
        density: as in ``Pattern.layout``, as far as a length allows it.
        block_size: tokens of a query and of a KV block.
        causal: query i sees key j only if ``j <= i``.
        cache_size: layouts to keep at hand.

    Attributes:
        tensor: (n,) uint8 on the CPU: the rule as text, by which ``rule_in`` finds or makes it again.
    """

    def __init__(
        self, rule: Pattern, density: float | None, block_size: int, causal: bool, cache_size: int = 16
    ) -> None:
        self.rule, self.density, self.block_size, self.causal = rule, density, block_size, causal
        self._cache: LayoutCache[BlockLayout] = LayoutCache(cache_size)
        words = {"block_size": block_size, "causal": causal, "density": density, "meaning": DENSITY_MEANING}
        text = canonical_json(words | {"pattern": rule.spec.to_dict()}).encode()
        text = text.ljust(-(-len(text) // _STEP) * _STEP)
        with torch.inference_mode(False):
            self.tensor = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        _LIVING[self.tensor] = ref(self)

    def __reduce__(self) -> tuple[type[WrittenRule], tuple[object, ...]]:
        """A copy, or what came from another process, is written anew."""
        return type(self), (self.rule, self.density, self.block_size, self.causal, self._cache.maxsize)

    def layout(self, q_len: int, kv_len: int, num_heads: int, device: torch.device) -> BlockLayout:
        """The rule's layout, from the cache where it is there; at a length too short for the density that of the
        family's smallest member, since an attention serves every length."""

        def make() -> BlockLayout:
            return self.rule.layout(
                q_len,
                kv_len,
                num_heads=num_heads,
                q_block_size=self.block_size,
                causal=self.causal,
                density=self.density,
                or_least=True,
                device=device,
            )

        return self._cache.get((q_len, kv_len, num_heads, device), make)


def rule_in(tensor: Tensor) -> WrittenRule:
    """The rule that is written in a tensor: the living one that it is of, else one made from its text.

    Raises:
        ValueError: text of another meaning than this version's, or a pattern that cannot be found here.
    """
    living = _LIVING.get(tensor)
    found = None if living is None else living()
    return _made(bytes(tensor.numpy())) if found is None else found


@lru_cache(maxsize=64)
def _made(text: bytes) -> WrittenRule:
    words = json.loads(text)
    if words["meaning"] != DENSITY_MEANING:
        raise ValueError(
            f"a pattern written with meaning {DENSITY_MEANING} of a layout was wanted, got {words['meaning']}: this "
            "program was saved by another version of raybsa, which would have kept other blocks; export it again"
        )
    return WrittenRule(build(words["pattern"]), words["density"], words["block_size"], words["causal"])
