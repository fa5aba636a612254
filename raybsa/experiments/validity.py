"""Which questions are not worth a trial: what cannot be, what says nothing, and what was asked before."""

from __future__ import annotations

from collections import Counter

from raybsa import patterns
from raybsa.experiments.space import Config, SearchSpace
from raybsa.spec import UNTRAINED, AttentionSpec, TrialSpec, canonical_json

_COMPARED_BLOCKS = 512  # longer sequences are compared by their first so many blocks
TOO_SHORT = "fewer than two blocks"
DIAGONAL = "its density keeps the diagonal alone"
NO_RULE = "no rule stands for it"
REPEATED = "the blocks of an earlier question"


class Rejections:
    """Rejects configurations before a trial starts, and counts why. ``counts``: reason -> how many."""

    def __init__(self, space: SearchSpace) -> None:
        self._space, self._seen = space, set[str]()
        self.counts: Counter[str] = Counter()

    def admit(self, config: Config) -> TrialSpec | None:
        """The question of a configuration, which then counts as asked; None, counted, where it is rejected."""
        try:
            spec = self._space.spec(config)
            reason = why_not(spec)
            blocks = "" if reason else fingerprint(spec)
        except ValueError:
            reason, blocks = NO_RULE, ""
        reason = reason or (REPEATED if blocks in self._seen else None)
        if reason:
            self.counts[reason] += 1
            return None
        self._seen.add(blocks)
        return spec

    def remember(self, spec: TrialSpec) -> None:
        """Counts a question as asked."""
        self._seen.add(fingerprint(spec))

    def __str__(self) -> str:
        reasons = (f"{count} ({reason})" for reason, count in self.counts.most_common())
        return f"{self.counts.total()} rejected before they started" + (": " * bool(self.counts)) + ", ".join(reasons)


def why_not(spec: TrialSpec) -> str | None:
    """Why a question's answer would say nothing; None where it may be asked."""
    for attention in spec.attention:
        if attention.pattern is None:
            continue
        blocks = min(_lengths(spec)) // attention.block_size
        if blocks < 2:
            return TOO_SHORT
        if attention.density is not None and round(attention.density * blocks) < 2:
            return DIAGONAL
    return None


def fingerprint(spec: TrialSpec) -> str:
    """Equal for questions whose attention keeps the same blocks: at the training length and at (the start of) the
    timed one.

    Raises:
        ValueError: a layer's pattern cannot be built.
    """
    return canonical_json([_blocks(spec, attention) for attention in spec.attention])


def _lengths(spec: TrialSpec) -> tuple[int, ...]:
    return (spec.seq_len,) if spec.task in UNTRAINED else (spec.train_len, spec.seq_len)


def _blocks(spec: TrialSpec, attention: AttentionSpec) -> list[str]:
    if attention.pattern is None:
        return [attention.variant]
    rule = patterns.build(attention.pattern)
    lengths = sorted({min(length, _COMPARED_BLOCKS * attention.block_size) for length in _lengths(spec)})
    layouts = (
        rule.layout(
            length,
            num_heads=spec.num_heads,
            q_block_size=attention.block_size,
            causal=spec.causal,
            density=attention.density,
        )
        for length in lengths
    )
    return [attention.variant, attention.backend, *(layout.digest() for layout in layouts)]
