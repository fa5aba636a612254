"""Comparing attentions on a training task: the same steps, seeds and densities for each, one row an answer."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

import torch

from raybsa.experiments.recording import Run, record_of, write
from raybsa.results.record import Measurement, Outcome, Record, spec_of
from raybsa.results.store import Store
from raybsa.spec import ADAPTIVE, DENSE, AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.attention import layer_density
from raybsa.tasks.catalog import Judgement, prepare_training
from raybsa.timing import DeviceLock, device_name


def questions(
    base: TrialSpec,
    patterns: Sequence[PatternSpec],
    densities: Sequence[float],
    seeds: Sequence[int],
    block_size: int,
) -> list[TrialSpec]:
    """Every pattern at every density with every seed, a seed after the other; the pattern ``dense`` once a seed, as
    torch's own attention."""
    asked = []
    for seed in seeds:
        for pattern in patterns:
            if pattern.name == DENSE:
                asked.append(replace(base, seed=seed, attention=(AttentionSpec(DENSE, block_size=block_size),)))
                continue
            variant = ADAPTIVE if pattern.name == ADAPTIVE else "base"
            for density in densities:
                attention = AttentionSpec(variant, pattern, density, block_size)
                asked.append(replace(base, seed=seed, attention=(attention,)))
    return asked


def training_of(spec: TrialSpec, device: torch.device) -> Judgement:
    """A question's training. Raises ValueError for a task that is unknown, does not train, or cannot be asked so."""
    training = prepare_training(spec, device, DeviceLock(device))
    if training is None:
        raise ValueError(f"a comparison needs a task that trains, got {spec.task!r}")
    return training


def answer(specs: Sequence[TrialSpec], device: torch.device, run: Run, store: Store) -> Iterator[Record]:
    """The records of the questions in their order; what ``store`` has answered already is not asked again."""
    known = {record.spec_hash: record for record in store.read_records() if record.status == "ok"}
    for number, spec in enumerate(specs):
        if spec.digest in known:
            yield known[spec.digest]
            continue
        training = training_of(spec, device)
        quality = training.advance()
        measured = Measurement(
            density=fmean(layer_density(spec, index) for index in range(spec.num_layers)),
            quality_name=quality.name,
            quality_goal=quality.goal,
            quality=quality.value,
            train_seconds=quality.train_seconds,
            curves=quality.curves,
            device=device.type,
            device_name=device_name(device),
            num_threads=torch.get_num_threads(),
            torch_version=torch.__version__,
            python_version=platform.python_version(),
        )
        outcome = Outcome(spec, measured, None, 0)
        record = record_of(outcome, run, run.trial_id(number))
        write(store, record, outcome)
        yield record


def summary(records: Sequence[Record]) -> list[str]:
    """A line for each pattern and density: its mean over seeds, and its gap to dense on the same seeds."""
    dense = {
        record.seed: record.quality for record in records if record.pattern == DENSE and record.quality is not None
    }
    groups: dict[tuple[str, float], dict[int, float]] = {}
    for record in records:
        if record.quality is not None:
            groups.setdefault((_label(record), record.density or 0.0), {})[record.seed] = record.quality
    wide = max([7, *(len(label) for label, _ in groups)])
    lines = [f"{'pattern':<{wide}} {'kept':>7} {'seeds':>5} {'mean':>8} {'worst':>8} {'- dense':>8}"]
    for (pattern, density), found in sorted(groups.items(), key=lambda item: (item[0][1], fmean(item[1].values()))):
        gaps = [value - dense[seed] for seed, value in found.items() if dense.get(seed) is not None]
        gap = f"{fmean(gaps):+8.4f}" if gaps else f"{'-':>8}"
        mean, worst = fmean(found.values()), max(found.values())
        lines.append(f"{pattern:<{wide}} {density:>7.2%} {len(found):>5} {mean:>8.4f} {worst:>8.4f} {gap}")
    return lines


def _label(record: Record) -> str:
    """The pattern's name; of a learned one also its options."""
    pattern = spec_of(record).layer(0).pattern
    if pattern is None or pattern.name != ADAPTIVE:
        return record.pattern
    return " ".join([ADAPTIVE, *(f"{name}={value}" for name, value in sorted(pattern.params.items()))])
