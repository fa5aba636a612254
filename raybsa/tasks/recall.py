"""Associative recall at a known distance: which pattern is right is known beforehand.

After Arora et al., Zoology (2312.04927). A few tokens carry a key and a value at once; exactly ``distance`` tokens
after each, a query token asks for its key's value; all else is noise. One attention layer that sees back that far
learns it; a pattern that does not reach ``distance`` (over all layers) can only guess: 1 in ``VALUES``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raybsa.counter import Stream, hash_u32
from raybsa.spec import TrialSpec, require_positive
from raybsa.tasks.goals import QUALITIES
from raybsa.tasks.model import Transformer
from raybsa.tasks.params import known_params
from raybsa.tasks.training import IGNORE, Training, prepare
from raybsa.timing import DeviceLock

KEYS = 8
VALUES = 8
NOISE = 8
_QUERY = KEYS * VALUES
_NOISE = _QUERY + KEYS
_ANSWER = _NOISE + NOISE
VOCABULARY = _ANSWER + VALUES
_EVAL_SEED = 0x5EED


def recall_params(spec: TrialSpec) -> dict[str, Any]:
    """The parameters of ``prepare_training``, all of them.

    Raises:
        ValueError: an unknown one, no sequences, attention that sees the future, or a distance without room for keys.
    """
    known = {"distance": spec.train_len // 2, "train_batch": 16, "eval_batch": 64, "eval_seed": 0}
    params = known_params(spec, known)
    distance = params["distance"]
    for name in ("train_batch", "eval_batch"):
        require_positive(name, params[name])
    if not spec.causal:
        raise ValueError("recall asks about the past, so its attention must be causal, got causal=False")
    if not KEYS <= distance <= spec.train_len - KEYS:
        raise ValueError(f"distance must lie in {KEYS}..{spec.train_len - KEYS} for {KEYS} keys, got {distance}")
    return params


def prepare_training(spec: TrialSpec, device: torch.device, lock: DeviceLock) -> Training:
    """A training on fresh sequences, judged by the share of right answers on a fixed set of others (chance: 1/8).

    ``task_params``: ``distance`` in tokens (half of ``train_len``), ``train_batch`` (16), ``eval_batch`` (64) and
    ``eval_seed`` (0), which draws that set.
    """
    params = recall_params(spec)
    distance = params["distance"]
    with lock.shared():
        model, context = prepare(Transformer(spec, VOCABULARY), device, spec.dtype)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        tokens, targets = sequences(spec.seed, step, params["train_batch"], spec.train_len, distance)
        return tokens.to(device), targets.to(device)

    def accuracy() -> float:
        seed = _EVAL_SEED + params["eval_seed"]
        tokens, targets = sequences(seed, -1, params["eval_batch"], spec.train_len, distance)
        with torch.no_grad(), lock.shared(), context:
            answers = model.eval()(tokens.to(device)).argmax(-1).cpu()
        asked = targets != IGNORE
        return float((answers[asked] == targets[asked]).double().mean())

    return Training(
        model,
        batches,
        accuracy,
        name=QUALITIES["recall"][0],
        goal=QUALITIES["recall"][1],
        steps=spec.train_steps,
        learning_rate=spec.learning_rate,
        lock=lock,
        context=context,
    )


def sequences(seed: int, step: int, count: int, length: int, distance: int) -> tuple[Tensor, Tensor]:
    """(count, length) int64 tokens and targets, drawn from (seed, step) alone.

    Tokens: ``key * VALUES + value`` for a pair, then one a key for a query, then noise, then one a value for an answer.
    Every sequence holds each key once. Targets are answers at the queries and ``IGNORE`` elsewhere.
    """
    rows = torch.arange(count)[:, None]
    slots = torch.arange(min(distance, length - distance))
    pairs = _draw(seed, step, 0, rows, slots).argsort(dim=1)[:, :KEYS]
    values = _draw(seed, step, 1, rows, torch.arange(KEYS)) % VALUES
    keys = torch.arange(KEYS).expand(count, KEYS)
    tokens = _NOISE + _draw(seed, step, 2, rows, torch.arange(length)) % NOISE
    tokens.scatter_(1, pairs, keys * VALUES + values)
    tokens.scatter_(1, pairs + distance, _QUERY + keys)
    targets = torch.full((count, length), IGNORE).scatter_(1, pairs + distance, _ANSWER + values)
    return tokens, targets


def _draw(seed: int, step: int, what: int, rows: Tensor, columns: Tensor) -> Tensor:
    """(rows, columns) random 32-bit numbers; ``what`` keeps the draws of one step apart."""
    return hash_u32(seed, Stream.TASK, torch.tensor(step), torch.tensor(what), rows, columns)
