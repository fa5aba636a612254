"""How numbers, patterns and questions read: plain text, not yet escaped for HTML."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import datetime
from itertools import groupby

from raybsa.spec import UNTRAINED, AttentionSpec, PatternSpec, TrialSpec

EARLIER_DENSITY = "its density was a share of every row, as an earlier version kept it"
_LONG, _LONGER = 160, 320  # letters of one pattern's name, and of all layers' together
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def number(value: float | None) -> str:
    """Three significant digits with thousands separators; a dash where nothing was measured."""
    if value is None:
        return "–"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}"


def quality(value: float | None) -> str:
    """Four significant digits, zeros at the end too: trials of one front often differ in the third."""
    return "–" if value is None else f"{value:#.4g}".removesuffix(".")


def milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{number(value)}\u00a0ms"


def size(value: float | None) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    if value is None:
        return "–"
    unit, name = unit_of(value)
    return f"{number(value / unit)}\u00a0{name}" if unit > 1 else f"{value:.0f}\u00a0B"


def unit_of(value: float) -> tuple[int, str]:
    """The largest binary unit of bytes that leaves at least 1, and its name."""
    return next((pair for pair in _UNITS if value >= pair[0]), (1, "B"))


def percent(share: float | None) -> str:
    return "–" if share is None else f"{number(100 * share)}\u00a0%"


def tokens(length: int) -> str:
    """``128K``, or all digits where the length is no multiple of 1,024."""
    return f"{length // 1024}K" if length and length % 1024 == 0 else f"{length:,}"


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """numerator / denominator, or None where either was not measured."""
    return numerator / denominator if numerator and denominator else None


def times(value: float | None) -> str:
    return "–" if value is None else f"{number(value)}×"


def moment(text: str) -> str:
    """An ISO 8601 time to the minute."""
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return text


def pattern_label(pattern: PatternSpec | None) -> str:
    """``bigbird(window=64)``; composed rules by their parts."""
    if pattern is None:
        return "dense"
    params = dict(pattern.params)
    parts = params.pop("parts", None)
    if isinstance(parts, list):
        joined = (" | " if pattern.name == "union" else ", ").join(map(_part_label, parts))
        return joined if pattern.name == "union" else f"{pattern.name}[{joined}]"
    return f"{pattern.name}({', '.join(f'{key}={value}' for key, value in params.items())})" if params else pattern.name


def cut(text: str, most: int = 80) -> str:
    """At most so many letters, the last of them an ellipsis where there were more."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def attention_label(attention: AttentionSpec, most: int = _LONG) -> str:
    """The pattern, cut where its name is longer, and, where one was asked for, its density."""
    if attention.pattern is None:
        return attention.variant
    name = cut(pattern_label(attention.pattern), most)
    return name if attention.density is None else f"{name} · {percent(attention.density)}"


def trial_label(spec: TrialSpec) -> str:
    """One line for a trial; a model whose layers differ names each, and how many in a row are alike, a search's ring
    how it is shared, and an earlier version's density that it was another. What is too long for a line is cut:
    ``whole_label`` has all of it."""
    label = cut(_layers_label(spec, _LONG), _LONGER)
    return f"{label} · {spec.ranks.label}" if spec.ranks.label else label


def whole_label(spec: TrialSpec) -> str:
    """The same, of any length."""
    label = _layers_label(spec, sys.maxsize)
    return f"{label} · {spec.ranks.label}" if spec.ranks.label else label


def counted(number: int, thing: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def question_label(spec: TrialSpec) -> str:
    """The sizes of a question in words."""
    heads = f"{counted(spec.num_heads, 'head')} × {spec.head_dim}"
    if spec.num_kv_heads is not None:
        heads += f" ({spec.num_kv_heads} KV heads)"
    layers = f"{counted(spec.num_layers, 'layer')}, " if spec.task not in UNTRAINED else ""
    causal = "causal" if spec.causal else "not causal"
    return f"{layers}{heads}, batch {spec.batch}, {causal}, {spec.dtype}"


def paste(spec: TrialSpec) -> str:
    """Python text that makes the attention of a trial: one module, or a list with one a layer."""
    if all(layer.pattern is None for layer in spec.attention):
        return "torch.nn.functional.scaled_dot_product_attention"
    if len(spec.attention) == 1:
        return f"create_block_sparse_attention(**{spec.factory_arguments(0)!r})"
    layers = ",\n    ".join(repr(spec.factory_arguments(index)) for index in range(spec.num_layers))
    return f"[create_block_sparse_attention(**layer) for layer in [\n    {layers},\n]]"


def _layers_label(spec: TrialSpec, most: int) -> str:
    labels = (attention_label(attention, most) for attention in spec.attention)
    runs = ((label, len(list(run))) for label, run in groupby(labels))
    label = " / ".join(label if count == 1 else f"{count}× {label}" for label, count in runs)
    return label if spec.is_current else f"{label} of each row"


def _part_label(part: object) -> str:
    return pattern_label(PatternSpec.from_dict(part)) if isinstance(part, Mapping) else str(part)
