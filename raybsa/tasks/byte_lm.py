"""Language modelling of bytes: how many bits a held-out byte of real text costs a small transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from raybsa.counter import Stream, hash_u32
from raybsa.spec import TrialSpec, require_positive
from raybsa.tasks.goals import QUALITIES
from raybsa.tasks.model import Transformer
from raybsa.tasks.params import known_params, require_same
from raybsa.tasks.text import load_corpus
from raybsa.tasks.training import Training, cross_entropy, prepare
from raybsa.timing import DeviceLock


class ByteText:
    """The windows of a text that a trial trains on and is judged by.

    ``task_params``: ``text`` (a path; None: the standard library's sources), ``train_batch`` (windows a step, 8) and
    ``eval_windows`` (32), evenly spaced over the held-out text: the same for every trial of this ``train_len``.
    ``eval_seed`` (0): another one moves all windows by a part of their distance, to text between those of seed 0.

    Raises:
        ValueError: a text shorter than a window, an unknown parameter, no windows, or attention that sees the future.
    """

    def __init__(self, spec: TrialSpec, device: torch.device) -> None:
        params = known_params(spec, {"text": None, "train_batch": 8, "eval_windows": 32, "eval_seed": 0})
        if not spec.causal:
            raise ValueError("byte_lm predicts the next byte, so its attention must be causal, got causal=False")
        for name in ("train_batch", "eval_windows"):
            require_positive(name, params[name])
        self.spec, self.device = spec, device
        self.corpus = load_corpus(params["text"])
        require_same(spec, "text", self.corpus.digest, f"the text {params['text'] or 'of the standard library'}")
        self.train_batch, self.eval_windows = params["train_batch"], params["eval_windows"]
        self.eval_seed = params["eval_seed"]
        for name, part in (("train", self.corpus.train), ("held-out", self.corpus.held_out)):
            if len(part) <= spec.train_len:
                raise ValueError(
                    f"the {name} text must be longer than train_len {spec.train_len}, got {len(part)} bytes"
                )

    def batches(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets (train_batch, train_len) of a step, from the seed and the step alone."""
        starts = _random_starts(self.spec, step, self.train_batch, len(self.corpus.train))
        return _windows(self.corpus.train, starts, self.spec, self.device)

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets (eval_windows, train_len)."""
        last = len(self.corpus.held_out) - self.spec.train_len - 1
        starts = torch.arange(self.eval_windows) * last // max(1, self.eval_windows - 1)
        if self.eval_seed:
            draw = float(hash_u32(self.eval_seed, Stream.TASK, torch.tensor(0))) / 2**32
            starts = (starts + int((0.25 + 0.5 * draw) * last / self.eval_windows)) % (last + 1)
        return _windows(self.corpus.held_out, starts, self.spec, self.device)


def about_its_text(spec: TrialSpec, say: Callable[[str], None] = print) -> TrialSpec:
    """The question with the digest of its text; ``say`` hears which files of a user's own that is. Raises as
    ``ByteText``."""
    corpus = ByteText(spec, torch.device("cpu")).corpus
    if spec.task_params.get("text") is not None:
        say(corpus.told)
    return replace(spec, content={"text": corpus.digest})


def prepare_training(spec: TrialSpec, device: torch.device, lock: DeviceLock) -> Training:
    """A training on a ``ByteText`` that is judged by bits per held-out byte."""
    with lock.shared():
        text = ByteText(spec, device)
        model, context = prepare(Transformer(spec, 256), device, spec.dtype)
    return Training(
        model,
        text.batches,
        lambda: bits_per_byte(model, *text.held_out(), context, lock),
        name=QUALITIES["byte_lm"][0],
        goal=QUALITIES["byte_lm"][1],
        steps=spec.train_steps,
        learning_rate=spec.learning_rate,
        lock=lock,
        context=context,
    )


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, tokens: Tensor, targets: Tensor, context: AbstractContextManager, lock: DeviceLock
) -> float:
    """Mean bits of (N, S) targets, a few windows at a time."""
    model.eval()
    total = 0.0
    for some, wanted in zip(tokens.split(8), targets.split(8), strict=True):
        with lock.shared(), context:
            total += float(cross_entropy(model(some), wanted, reduction="sum"))
    return total / targets.numel() / math.log(2)


def _random_starts(spec: TrialSpec, step: int, count: int, length: int) -> Tensor:
    """(count,) int64 from the seed and the step alone."""
    numbers = hash_u32(spec.seed, Stream.TASK, torch.tensor(step), torch.arange(count))
    return numbers % (length - spec.train_len)


def _windows(text: Tensor, starts: Tensor, spec: TrialSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, train_len) tokens and the bytes that follow each of them."""
    index = starts[:, None] + torch.arange(spec.train_len + 1)
    window = text[index].long().to(device)
    return window[:, :-1], window[:, 1:]
