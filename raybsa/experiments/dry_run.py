"""What a search would ask, without asking: its first questions, with their predicted costs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from raybsa.experiments.costs import ENOUGH, CostModel
from raybsa.experiments.history import Answered
from raybsa.experiments.screen import Screen
from raybsa.experiments.search import Plan, make_questions
from raybsa.experiments.space import SearchSpace
from raybsa.results.record import Record
from raybsa.spec import AttentionSpec, TrialSpec

_HEAD = ("pattern", "block", "asked", "f+b ms", "MiB", "trial s")


def dry_run(
    space: SearchSpace, plan: Plan, earlier: Sequence[Answered], records: Sequence[Record], workers: int = 1
) -> Iterator[str]:
    """Lines: each question that the plan would ask if no answer changed its mind, then the sums.

    Args:
        records: measured trials to predict from, of whatever search on the same device; without them costs are "-".
        workers: how many trials run at once.
    """
    questions = make_questions(space, plan, earlier, Screen(plan.objectives))
    model, seconds, count = CostModel.learned(records), 0.0, 0
    yield _row(*_HEAD)
    while (config := questions.next()) is not None:
        spec = space.spec(config)
        yield _line(spec, model)
        seconds, count = seconds + (model.trial_seconds(spec) if model else 0.0), count + 1
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
    attention = next((layer for layer in spec.attention if layer.pattern), spec.attention[0])
    name = " / ".join(map(_name, spec.attention))[:58].rstrip()
    asked = "-" if attention.density is None else f"{attention.density:.3g}"
    if model is None:
        return _row(name, attention.block_size, asked, "-", "-", "-")
    found = model.predict(spec)
    mib = (found.peak_bytes or 0) / 2**20
    if attention.pattern is None:  # the model is fitted to block-sparse kernels
        return _row(name, "-", asked, "-", "-", f"{model.trial_seconds(spec):.1f}")
    return _row(
        name,
        attention.block_size,
        asked,
        f"{found.forward_backward_ms_p50:.2f}",
        f"{mib:.1f}",
        f"{model.trial_seconds(spec):.1f}",
    )


def _name(attention: AttentionSpec) -> str:
    if attention.pattern is None:
        return attention.variant
    params = attention.pattern.params
    text = json.dumps(params, separators=(",", ":")) if params else ""
    return f"{attention.pattern.name} {text}".rstrip()


def _row(name: str, *cells: object) -> str:
    return f"{name:<58}" + "".join(f"{cell!s:>10}" for cell in cells)
