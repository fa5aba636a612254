"""Named searches: how large the questions are, and which attentions they may name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raybsa.experiments.space import SearchSpace
from raybsa.experiments.spaces import make_space
from raybsa.spec import DENSE, AttentionSpec, TrialSpec

_DENSE = (AttentionSpec(DENSE),)


@dataclass(frozen=True)
class Preset:
    """A search space, how many trials it is worth, and how long to time each.

    Args:
        timing: ``repeats`` and ``budget_s`` of ``timing.measure_in_turn``.
    """

    space: SearchSpace
    trials: int
    timing: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    # Two CPU cores, well under two minutes: timed at 3,072 tokens, trained at 512.
    "demo": Preset(
        make_space(
            "demo",
            TrialSpec(
                "byte_lm",
                _DENSE,
                seq_len=3072,
                train_len=512,
                train_steps=220,
                learning_rate=5e-3,
                num_heads=2,
                head_dim=32,
                task_params={"train_batch": 2, "eval_windows": 64},
            ),
        ),
        trials=14,
        timing={"repeats": 10, "budget_s": 0.5},
    ),
    # Seconds: to see that everything runs. Its quality says nothing.
    "quick": Preset(
        make_space(
            "quick",
            TrialSpec(
                "byte_lm",
                _DENSE,
                seq_len=512,
                train_len=128,
                train_steps=10,
                learning_rate=1e-2,
                num_layers=1,
                num_heads=2,
                head_dim=16,
                task_params={"train_batch": 2, "eval_windows": 8},
            ),
        ),
        trials=5,
        timing={"repeats": 5, "budget_s": 0.1},
    ),
}
