"""Which questions are not worth a trial: what cannot be, what says nothing, and what was asked before."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from functools import lru_cache

import torch

from raybsa import patterns
from raybsa.axis import num_blocks
from raybsa.experiments.space import Config, SearchSpace
from raybsa.gradients.catalog import build
from raybsa.gradients.codec import wide
from raybsa.spec import UNTRAINED, AttentionSpec, TrialSpec, canonical_json
from raybsa.variants.source import adaptive_options

_NOTHING = 1e-12  # a density: the smallest member
_COMPARED_BLOCKS = 512  # longer sequences are compared by their first so many blocks
TOO_SHORT = "fewer than two blocks"
DIAGONAL = "its density keeps the diagonal alone"
UNREACHED = "a density below its family's smallest blocks"
NO_RULE = "no rule stands for it"
TOO_MANY_RANKS = "more ranks than blocks"
UNSPLIT = "a selector that ranks cannot share"
MISFIT = "a codec that does not take its gradients"
REPEATED = "the blocks of an earlier question"


class Rejections:
    """Rejects configurations before a trial starts, and counts why. ``counts``: reason -> how many."""

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._seen: dict[str, list[TrialSpec]] = {}  # by the blocks at the shorter length
        self.counts: Counter[str] = Counter()

    def admit(self, config: Config) -> TrialSpec | None:
        """The question of a configuration, which then counts as asked; None, counted, where it is rejected."""
        try:
            spec = self._space.spec(config)
            reason = why_not(spec) or (REPEATED if self._was_asked(spec) else None)
        except ValueError:
            reason = NO_RULE
        if reason:
            self.counts[reason] += 1
            return None
        self.remember(spec)
        return spec

    def remember(self, spec: TrialSpec) -> None:
        """Counts a question as asked."""
        self._seen.setdefault(fingerprint(spec, min(_lengths(spec))), []).append(spec)

    def _was_asked(self, spec: TrialSpec) -> bool:
        """Whether an earlier question keeps the same blocks at both lengths; the longer is looked at where it must."""
        longer = max(_lengths(spec))
        alike = self._seen.get(fingerprint(spec, min(_lengths(spec))), ())
        return any(fingerprint(other, longer) == fingerprint(spec, longer) for other in alike)

    def __str__(self) -> str:
        reasons = (f"{count} ({reason})" for reason, count in self.counts.most_common())
        return f"{self.counts.total()} rejected before they started" + (": " * bool(self.counts)) + ", ".join(reasons)


def why_not(spec: TrialSpec) -> str | None:
    """Why a question's answer would say nothing; None where it may be asked."""
    for attention in spec.attention:
        if attention.pattern is None:
            continue
        length = min(_lengths(spec))
        if length // attention.block_size < 2:
            return TOO_SHORT
        if attention.density is not None and (reason := _why_not_kept(attention, length, spec.causal)):
            return reason
    return _why_not_shared(spec) if spec.ranks.world_size > 1 else None


def _why_not_kept(attention: AttentionSpec, length: int, causal: bool) -> str | None:
    """Why no pattern of the family keeps the density at a length; None where one does."""
    assert attention.density is not None
    blocks = num_blocks(length, attention.block_size)
    allowed = blocks * (blocks + 1) // 2 if causal else blocks**2
    if round(attention.density * allowed) <= blocks:
        return DIAGONAL
    if adaptive_options(attention.pattern) is not None:
        return None
    smallest = patterns.build(attention.rule).layout(
        length, q_block_size=attention.block_size, causal=causal, density=_NOTHING, or_least=True
    )
    return UNREACHED if attention.density * allowed < smallest.nnz_blocks / smallest.num_groups - 0.5 else None


def _why_not_shared(spec: TrialSpec) -> str | None:
    """Why ranks cannot share a question; None where they can."""
    ranks, largest = spec.ranks, max(attention.block_size for attention in spec.attention)
    if ranks.world_size > num_blocks(min(_lengths(spec)), largest):
        return TOO_MANY_RANKS
    options = (adaptive_options(attention.pattern) or {} for attention in spec.attention)
    if any(chosen.get("method") == "compressed" for chosen in options):
        return UNSPLIT
    gradients = wide(getattr(torch, spec.dtype))  # of weights under autocast, and sums of dK and dV, are no narrower
    if any(gradients not in build(codec).dtypes for codec in (ranks.codec, ranks.gradient_codec)):
        return MISFIT
    return None


@lru_cache(maxsize=4096)
def fingerprint(spec: TrialSpec, length: int) -> str:
    """Equal for questions whose attention keeps the same blocks in the first ``length`` tokens, of which at most 512
    blocks are looked at, and whose ranks share them alike.

    Raises:
        ValueError: a layer's pattern cannot be built.
    """
    layers = [canonical_json(_blocks(spec, attention, length)) for attention in spec.attention]
    return canonical_json([asdict(spec.ranks), *(layers if len(set(layers)) > 1 else layers[:1])])


def _lengths(spec: TrialSpec) -> tuple[int, ...]:
    return (spec.seq_len,) if spec.task in UNTRAINED else (spec.train_len, spec.seq_len)


def _blocks(spec: TrialSpec, attention: AttentionSpec, length: int) -> list[str]:
    if attention.pattern is None:
        return [attention.variant]
    if adaptive_options(attention.pattern) is not None:  # it keeps what it learns to keep
        return [canonical_json(attention.to_dict())]
    layout = patterns.build(attention.pattern).layout(
        min(length, _COMPARED_BLOCKS * attention.block_size),
        num_heads=spec.num_heads,
        q_block_size=attention.block_size,
        causal=spec.causal,
        density=attention.density,
        or_least=True,  # the first blocks of a longer sequence may be too few for what that keeps
    )
    return [attention.variant, attention.backend, layout.digest()]
