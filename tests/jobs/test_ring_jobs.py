"""The ring's benchmark and the forecast as a user runs them; the ranks themselves are tests/ring/test_measure.py's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from jobs import benchmark, scaling_forecast
from raybsa.cluster import rings
from raybsa.cluster.resources import Share
from raybsa.experiments import launch, scaling_run, scaling_suite
from raybsa.experiments.suites import SUITES
from raybsa.results.record import Measurement
from raybsa.results.store import Store
from raybsa.spec import TrialSpec
from raybsa.tasks.ring import ring_params, ring_plan
from tests.dashboards.made_ring import a_ring_benchmark, link_points
from tests.ring.made_ranks import MadeRing


def measured(specs: list[TrialSpec], **_: object) -> Iterator[tuple[TrialSpec, Measurement | str]]:
    """What ranks would answer; the last question fails."""
    for spec in specs[:-1]:
        yield (
            spec,
            Measurement(
                density=0.2,
                forward_ms_p50=2.0,
                forward_backward_ms_p50=8.0,
                single_forward_ms_p50=3.0,
                single_forward_backward_ms_p50=12.0,
                wire_forward_bytes=1 << 20,
                needed_forward_bytes=1 << 20,
                world_size=ring_params(spec)[0],
                partition="balanced",
                devices=2,
                rank_curves=(("timeline/forward/attention/0/begin_s", 0, 1, 0.5),),
            ),
        )
    yield specs[-1], "ValueError: no such luck"


def test_every_ring_trial_becomes_a_line_and_a_row_and_a_failure_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "measure_rings", measured)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--suite", "ring-quick", "--out", str(tmp_path)])
    assert benchmark.main() == 1
    records = Store(str(tmp_path)).read_records()
    assert [record.status for record in records] == ["ok", "ok", "ok", "failed"]
    assert [record.world_size for record in records] == [1, 1, 2, None]
    assert records[0].variant == "distributed"
    assert records[0].train_len is None
    assert {(point.rank, point.value) for point in Store(str(tmp_path)).read_series()} == {(1, 0.5)}
    lines = capsys.readouterr().out.splitlines()
    assert any("75%" in line and "1.000" in line for line in lines), "two ranks: 12 / (2 x 8)"
    assert any("failed: ValueError: no such luck" in line for line in lines)
    assert (tmp_path / "report.html").exists()


def test_the_distributed_variant_asks_actors_for_every_combination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rings, "measure_rings_on_actors", lambda specs, share, **_: measured(specs))
    monkeypatch.setattr(launch, "cluster", lambda address, num_cpus, verbose: nullcontext())
    monkeypatch.setattr(launch, "worker_share", Share)
    shape = ["--lengths", "512", "--density", "0.2", "--world-size", "1", "2", "--partition", "balanced", "zigzag"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--variant", "distributed", *shape, "--out", str(tmp_path)])
    assert benchmark.main() == 1, "the last one fails"
    records = Store(str(tmp_path)).read_records()
    specs = [TrialSpec.from_dict(json.loads(record.spec)) for record in records]
    assert [ring_params(spec) for spec in specs] == [(1, "balanced"), (2, "balanced"), (2, "zigzag")]
    assert {spec.layer(0).variant for spec in specs} == {"distributed"}
    assert "on actors of 1 CPU and 0 GPU each" in capsys.readouterr().out


def test_the_scaling_suite_prints_a_table_and_draws_the_forecast_with_its_rows_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MadeRing, "failing", ("sdpa-flash",))
    monkeypatch.setattr(scaling_suite, "ProcessRing", MadeRing)
    monkeypatch.setattr(benchmark, "FORECAST_RANKS", 16)
    monkeypatch.setattr(scaling_run, "default_device", lambda: "cpu")
    monkeypatch.setattr(scaling_run, "devices_of", lambda device: 2 if device == "cpu" else 0)
    monkeypatch.setattr(scaling_run, "kill_and_recover", lambda store, run, gpus: f"{gpus} GPUs: as if")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--suite", "scaling", "--quick", "--out", str(tmp_path)])
    assert benchmark.main() == 1, "one library failed"
    out = capsys.readouterr().out
    assert "0 GPUs: as if" in out
    assert "forecast: Median error: 1 rank" in out
    assert "sdpa-flash failed on 1: RuntimeError: no such luck" in out
    assert "longest: none, ranks share this host's memory" in out
    assert "left out" not in out
    assert "Prediction against measurement" in (tmp_path / "forecast.html").read_text("utf-8")
    store = Store(str(tmp_path))
    own = {record.trial_id for record in store.read_records() if record.task == "ring"}
    told = [point for point in store.read_series() if point.name == "predicted_forward_backward_ms"]
    assert {point.trial_id for point in told} == own
    assert all(point.value > 0 for point in told)


@pytest.mark.parametrize("suite", ["ring", "ring-quick", "ring-gpu"])
def test_every_ring_suite_asks_for_what_can_be_planned(suite: str) -> None:
    specs = SUITES[suite]()
    assert len(set(specs)) == len(specs)
    worlds = [ring_params(spec)[0] for spec in specs]
    assert worlds == sorted(worlds), "ranks are started once for each world size"
    for spec in specs:
        if spec.seq_len <= 8192:
            assert ring_plan(spec).world_size == ring_params(spec)[0]


def test_the_forecast_prints_the_error_of_every_row_and_writes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.create(tmp_path / "results")
    records = a_ring_benchmark()
    for record in records:
        store.write_record(record)
    store.write_series(link_points(records[0].trial_id))
    page = tmp_path / "forecast.html"
    arguments = ["--results", str(store.root), "--hardware", "h100", "--ranks", "16", "--out", str(page)]
    monkeypatch.setattr(sys, "argv", ["scaling_forecast.py", *arguments])
    assert scaling_forecast.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(records) + 2
    assert all(line.endswith("0%") for line in lines[1 : 1 + len(records)])
    assert lines[-2].startswith("Median error: 1 rank")
    assert lines[-1] == f"forecast: {page}"
    assert "preset, not measured here" in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --results, --hardware or both"),
        (["--results", "NONE"], "rows of `jobs/benchmark.py --suite ring --out NONE` were wanted, found none there"),
        (["--hardware", "h200", "--ranks", "4", "--out", "FILE/page.html"], "FILE"),
        (["--hardware", "h200", "--ranks", "0"], "argument --ranks: a whole number from 1 was wanted, got '0'"),
    ],
)
def test_a_forecast_from_nothing_says_what_to_give(
    arguments: list[str], message: str, tmp_path: Path, refused: Callable[..., tuple[int, str]]
) -> None:
    none, file = tmp_path / "none", tmp_path / "file"
    file.touch()

    def named(text: str) -> str:
        return text.replace("NONE", str(none)).replace("FILE", str(file))

    code, words = refused("scaling_forecast.py", *map(named, arguments))
    assert code == 2
    assert named(message) in words.splitlines()[-1]
