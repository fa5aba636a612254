"""What a search would ask, without asking: its first questions, with their predicted costs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from raybsa.experiments.costs import ENOUGH, CostModel
from raybsa.experiments.history import Answered
from raybsa.experiments.ring_costs import wire_bytes
from raybsa.experiments.screen import Screen
from raybsa.experiments.search import Plan, make_questions
from raybsa.experiments.space import SearchSpace
from raybsa.results.record import Record, SeriesPoint
from raybsa.spec import AttentionSpec, TrialSpec

_HEAD = ("pattern", "block", "asked", "f+b ms", "MiB", "wire KiB", "trial s")
_WIDTH = 58


def dry_run(
    space: SearchSpace,
    plan: Plan,
    earlier: Sequence[Answered],
    records: Sequence[Record],
    workers: int = 1,
    series: Sequence[SeriesPoint] = (),
) -> Iterator[str]:
    """Lines: each question that the plan would ask if no answer changed its mind, then the sums.

    Args:
        records: measured trials to predict from, of whatever search on the same device; without them costs are "-".
        workers: how many shares there are for trials and ranks.
        series: of these records; what rings have measured of their links.
    """
    questions = make_questions(space, plan, earlier, Screen(plan.objectives))
    model, seconds, count = CostModel.learned(records, series), 0.0, 0
    yield _row(*_HEAD)
    while (config := questions.next()) is not None:
        spec = space.spec(config)
        yield _line(spec, model)
        seconds += model.trial_seconds(spec) * spec.ranks.world_size if model else 0.0
        count += 1
    yield f"{count} trials would run after {len(earlier)} that are done; {questions.rejections}"
    if plan.algorithm in ("tpe", "nsga2"):
        yield f"{plan.algorithm} learns: what follows its first questions will depend on the answers"
    if model is None:
        yield f"no costs: {ENOUGH} measured trials in --out are needed to predict from"
    else:
        yield (
            f"about {seconds:.0f} s of work, {seconds / workers:.0f} s on {workers} worker(s) of {model.hardware.label}"
        )


def _line(spec: TrialSpec, model: CostModel | None) -> str:
    attention = next((layer for layer in spec.attention if layer.density is not None), spec.attention[0])
    ranks = f" ({spec.ranks.label})" if spec.ranks.label else ""
    name = " / ".join(map(_name, spec.attention))[: _WIDTH - len(ranks)].rstrip() + ranks
    asked = "-" if attention.density is None else f"{attention.density:.3g}"
    block = "-" if attention.pattern is None else attention.block_size
    wire = f"{wire_bytes(spec) / 2**10:.0f}" if spec.ranks.world_size > 1 else "-"  # the plan knows it, unmeasured
    seconds = "-" if model is None else f"{model.trial_seconds(spec):.1f}"
    if model is None or attention.pattern is None:  # the model is fitted to block-sparse kernels
        return _row(name, block, asked, "-", "-", wire, seconds)
    found = model.predict(spec)
    times, memory = f"{found.forward_backward_ms_p50:.2f}", f"{(found.peak_bytes or 0) / 2**20:.1f}"
    return _row(name, block, asked, times, memory, wire, seconds)


def _name(attention: AttentionSpec) -> str:
    rule = attention.rule
    return f"{rule.name} {json.dumps(rule.params, separators=(',', ':'))}" if rule.params else rule.name


def _row(name: str, *cells: object) -> str:
    return f"{name:<{_WIDTH}}" + "".join(f"{cell!s:>10}" for cell in cells)
