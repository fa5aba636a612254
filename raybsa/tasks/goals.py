"""What each task calls its quality, and whether it should go down or up. Known without importing torch."""

from __future__ import annotations

from typing import Literal

Goal = Literal["min", "max"]

QUALITIES: dict[str, tuple[str, Goal]] = {
    "byte_lm": ("bits_per_byte", "min"),
    "recall": ("recall_accuracy", "max"),
    "captured": ("attention_mass_recall", "max"),
    "module": ("held_out_loss", "min"),
}
