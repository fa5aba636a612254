"""How much of a model's own attention a pattern keeps: the share of its mass, on captured q, k and v. Trains no model.

The file is one of ``raybsa.tasks.capture``. A fixed pattern is judged as it is; a learned one is first distilled, in
``train_steps`` steps, on the samples that are not judged.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from raybsa.content import file_digest
from raybsa.counter import Stream, hash_u32
from raybsa.spec import TrialSpec
from raybsa.tasks.capture import Captured, load_calls
from raybsa.tasks.fidelity import DenseTruth, chosen_layout, part
from raybsa.tasks.goals import QUALITIES
from raybsa.tasks.params import known_params, require_same
from raybsa.tasks.training import Quality
from raybsa.timing import DeviceLock


class Judged(NamedTuple):
    """One attention call: what dense attention does with the samples to judge by, and the other samples."""

    truth: DenseTruth
    lesson: Captured


class Fidelities:
    """The mean recall of attention mass over a file's calls; call ``i`` meets the attention of layer ``i``."""

    attention = None  # the layer that is timed is a synthetic one

    def __init__(self, spec: TrialSpec, calls: Sequence[Judged], lock: DeviceLock) -> None:
        self._spec, self._calls, self._lock = spec, calls, lock

    def advance(self, step: int | None = None) -> Quality:
        """All of it at once, whatever ``step`` is."""
        with self._lock.shared():
            start = time.perf_counter()
            recalls = [self._recall(index, call) for index, call in enumerate(self._calls)]
            seconds = time.perf_counter() - start
        name, goal = QUALITIES["captured"]
        curves = tuple((name, index, recall) for index, recall in enumerate(recalls)) if len(recalls) > 1 else ()
        return Quality(name, goal, sum(recalls) / len(recalls), seconds, curves, self._spec.train_steps)

    def _recall(self, index: int, call: Judged) -> float:
        attention = self._spec.layer(index)
        if attention.pattern is None:
            return 1.0
        size = attention.block_size
        layout = chosen_layout(
            attention.pattern, attention.density, size, call.truth.call, call.lesson, self._spec.train_steps
        )
        return call.truth.judge(attention.pattern.name, layout).recall


def prepare_judgement(spec: TrialSpec, device: torch.device, lock: DeviceLock) -> Fidelities:
    """A judgement by the share of attention mass that lies in kept blocks, mean over calls, samples and heads.

    ``task_params``: ``file`` (a path that every worker can read), ``held_out`` (samples to judge by, 1) and
    ``eval_seed`` (0: the last samples; another one draws them).

    Raises:
        ValueError: no file, fewer samples than are to be judged, or calls of other sizes than the spec's.
    """
    params = known_params(spec, {"file": None, "held_out": 1, "eval_seed": 0})
    if not params["file"]:
        raise ValueError("task 'captured' needs the parameter 'file': q, k, v as raybsa.tasks.capture saves them")
    if "file" in spec.content:
        require_same(spec, "file", file_digest(params["file"]), f"the file {params['file']}")
    with lock.shared():
        calls = _judged(
            params["file"],
            os.stat(params["file"]).st_mtime_ns,
            spec.layer(0).block_size,
            params["held_out"],
            params["eval_seed"],
            spec.causal,
            str(device),
        )
    wanted = (spec.num_heads, spec.num_kv_heads or spec.num_heads, spec.head_dim, spec.train_len)
    for number, call in enumerate(calls):
        if (found := _sizes(call.lesson)) != wanted:
            raise ValueError(
                f"calls with (heads, KV heads, head_dim, tokens) {wanted} were wanted, call {number} has {found}"
            )
    return Fidelities(spec, calls, lock)


def question_of(path: str, base: TrialSpec) -> TrialSpec:
    """``base`` asked about a file of captured calls: its heads, its tokens, its causality; one layer is timed.

    Raises:
        ValueError, OSError: the file is none of captured calls or cannot be read.
    """
    call = load_calls(path)[0]
    heads, kv_heads, head_dim, tokens = _sizes(call)
    return replace(
        base,
        task="captured",
        task_params={"file": path},
        content={"file": file_digest(path)},
        num_layers=1,
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        head_dim=head_dim,
        seq_len=tokens,
        train_len=tokens,
        causal=call.causal,
    )


@lru_cache(maxsize=4)
def _judged(
    path: str, changed_at: int, block_size: int, held_out: int, eval_seed: int, causal: bool, device: str
) -> tuple[Judged, ...]:
    """The calls of a file; dense attention is computed once for all trials of a block size."""
    return tuple(_one(call, block_size, held_out, eval_seed, causal, device) for call in load_calls(path))


def _one(call: Captured, block_size: int, held_out: int, eval_seed: int, causal: bool, device: str) -> Judged:
    samples = len(call.q)
    if not 0 < held_out <= samples or (call.causal and not causal):
        raise ValueError(
            f"{held_out} sample(s) to judge by, causal={causal}, were wanted; "
            f"got calls of {samples} sample(s), causal={call.causal}"
        )
    order = list(range(samples))
    if eval_seed:
        order = hash_u32(eval_seed, Stream.TASK, torch.arange(samples)).argsort().tolist()
    moved = replace(call, q=call.q.to(device), k=call.k.to(device), v=call.v.to(device), causal=causal)
    return Judged(DenseTruth(part(moved, order[-held_out:]), block_size), part(moved, order[:-held_out]))


def _sizes(call: Captured) -> tuple[int, int, int, int]:
    """(heads, KV heads, head_dim, tokens)."""
    return call.q.shape[1], call.k.shape[1], call.q.shape[3], call.q.shape[2]
