"""The timeline of a real step: what each rank did, in an order that can be."""

from __future__ import annotations

import torch

from raybsa import patterns
from raybsa.comm import Communicator, Phase
from raybsa.results.record import SeriesPoint
from raybsa.ring.attention import ring_attention
from raybsa.ring.partition import partition_for
from raybsa.ring.plan import RingPlan
from raybsa.ring.timeline import Span, Timeline, as_points, from_series
from tests.ranks import run_ranks

LAYOUT = patterns.build("dense").layout(16 * 24, q_block_size=16, causal=True)
PLAN = RingPlan(LAYOUT, partition_for([LAYOUT], 3, strategy="zigzag"))


def one_step(communicator: Communicator) -> list[Span]:
    timeline = Timeline(communicator.rank)
    q, k, v = (torch.randn(1, 2, PLAN.partition.lengths[communicator.rank], 8, requires_grad=True) for _ in range(3))
    communicator.barrier()
    communicator.observer = timeline
    ring_attention(q, k, v, PLAN, communicator).sum().backward()
    return timeline.spans()


def test_every_hop_is_computed_once_in_each_direction_and_moved() -> None:
    for rank, spans in enumerate(run_ranks(3, one_step)):
        assert {span.rank for span in spans} == {rank}
        assert all(span.end_s >= span.begin_s >= 0 for span in spans)
        for phase in ("forward", "backward"):
            assert [span.hop for span in spans if span.phase == phase] == [0, 1, 2]
        moved = [(span.kind, span.hop) for span in spans if span.phase == "transfer" and span.kind.startswith("kv")]
        assert sorted(moved) == sorted([("kv", 1), ("kv", 2)] * 2 + [("kv_gradient", 1), ("kv_gradient", 2)])


def test_the_first_transfer_is_under_way_while_the_own_blocks_are_computed() -> None:
    for spans in run_ranks(3, one_step):
        own = next(span for span in spans if (span.phase, span.hop) == ("forward", 0))
        transfer = next(span for span in spans if (span.phase, span.kind, span.hop) == ("transfer", "kv", 1))
        assert transfer.begin_s <= own.begin_s
        assert transfer.end_s >= own.end_s
        waits = [span for span in spans if span.phase == "wait" and span.kind == "kv" and span.hop == 1]
        assert all(wait.begin_s >= own.end_s for wait in waits)


def test_spans_survive_the_series_table() -> None:
    spans = [span for rank in run_ranks(3, one_step) for span in rank]
    rows = [SeriesPoint("trial", *point) for point in as_points(spans)]
    others = [SeriesPoint("other", *point) for point in as_points(spans[:3])]
    others.append(SeriesPoint("trial", "loss", 0, 0, 1.0))
    others.append(SeriesPoint("trial", "timeline/forward/attention/9/begin_s", 0, 0, 1.0))
    assert from_series([*others, *rows], "trial") == sorted(spans, key=lambda s: (s.rank, s.begin_s, s.end_s))


def test_an_end_without_a_begin_is_no_span() -> None:
    timeline = Timeline(0)
    timeline.end(Phase.TRANSFER, "barrier", 0)
    assert timeline.spans() == []
    timeline.begin(Phase.FORWARD, "attention", 0)
    assert timeline.spans() == []
    timeline.end(Phase.FORWARD, "attention", 0)
    (span,) = timeline.spans()
    assert span.begin_s == 0
    assert timeline.spans(origin_s=0.0)[0].begin_s > 0
