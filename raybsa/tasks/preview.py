"""A preview: a question's quality before any training, with the weights that the dense baseline came to.

Its own model takes over the baseline's weights and is evaluated under its own attention. That costs one evaluation,
and ranks patterns about as well as half of their training does (docs/search.md).
"""

from __future__ import annotations

from pathlib import Path

import torch

from raybsa.tasks.training import Quality, Training


class Preview:
    """A judgement that trains nothing.

    Args:
        training: of the question, not begun.
        path: of a file that ``save_weights`` wrote.
    """

    def __init__(self, training: Training, path: str) -> None:
        self._training, self._path = training, path
        self.attention = training.attention

    def advance(self, step: int | None = None) -> Quality:
        """The quality with these weights, whatever ``step`` is.

        Raises:
            ValueError: the weights are of another model, which a learned selector's is too.
            OSError: there is no such file.
        """
        try:
            return self._training.with_weights(torch.load(self._path, map_location="cpu", weights_only=True))
        except RuntimeError as error:
            raise ValueError(f"the weights in {self._path} do not fit the model: {error}") from error


def save_weights(training: Training, path: str) -> None:
    """Writes a training's weights, under a temporary name first, so that the file is whole or not there."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".part")
    torch.save(training.weights(), unfinished)
    unfinished.replace(target)
