"""The benchmark job as a user runs it: a table, rows on disk, a report; and its words about bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Self

import pytest

from jobs import benchmark as job
from raybsa.cluster.coordinator import Coordinator
from raybsa.cluster.resources import Share
from raybsa.experiments import launch
from raybsa.results.record import Measurement, Outcome
from raybsa.results.store import Store
from raybsa.spec import TrialSpec


@pytest.mark.cluster
def test_every_measurement_becomes_a_line_a_row_and_a_place_in_the_report(
    tmp_path: Path, ray_cluster: str, run_job: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    shape = ["--lengths", "256", "--heads", "2", "--head-dim", "16", "--block-size", "32", "--density", "0.5"]
    timed = ["--variant", "base", "multihead", "--threads", "2", "--repeats", "5", "--budget", "0.1"]
    done = run_job("benchmark.py", "--out", str(tmp_path), *shape, *timed, "--address", ray_cluster)
    assert done.returncode == 0, done.stderr
    records = Store(str(tmp_path)).read_records()
    assert [record.variant for record in records] == ["base", "multihead"]
    for record in records:
        assert record.status == "ok"
        assert record.density == 0.5
        assert record.error_forward is not None
        assert record.error_forward < 1e-5
        assert record.error_gradient is not None
        assert record.error_gradient < 1e-4
        assert record.forward_ms_p50
        assert record.dense_forward_backward_ms_p50
        assert record.peak_bytes
        assert f"{record.variant}/auto" in done.stdout
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
    assert str(tmp_path / "report.html") in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "no_such"], "no_such"),
        (["--pattern", json.dumps({"name": "bigbird", "params": {"width": 3}})], "width"),
        (["--density", "1.5"], "density must lie in (0, 1], got 1.5"),
        (["--block-size", "48"], "power of two, got 48"),
        (["--heads", "3", "--kv-heads", "2"], "num_heads must be a multiple of num_kv_heads, got 3 and 2"),
        (["--dtype", "int8"], "int8"),
        (["--suite", "ring-gpu"], "the ring-gpu suite needs 2 CUDA devices, this machine has 0"),
        (["--suite", "gpu"], "the gpu suite needs a CUDA device, this machine has none"),
        (["--suite", "gpu", "--part", "3/2"], "a part is one of 1 .. 2, got 3"),
        (["--suite", "gpu", "--only", "7K"], "--only '7K' finds none of 69 cells, as 'd64-8K-b128-random-1%'"),
        (["--variant", "base", "distributed"], "--variant distributed is measured alone, got base distributed"),
        (["--address", "127.0.0.1:1"], "wanted at '127.0.0.1:1', nothing answers there"),
        (["--address", "127.0.0.1:1", "--variant", "distributed"], "nothing answers there"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_end_with_one_line_before_anything_starts(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., tuple[int, str]],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    code, words = refused("benchmark.py", "--out", str(tmp_path / "results"), *arguments)
    assert code == 2
    assert words.startswith("jobs/benchmark.py: ")
    assert message in words
    assert len(words.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--pattern", '{"a"', "a JSON object was wanted, got '{\"a\"': Expecting"),
        ("--backend", "fast", "unknown backend 'fast'; there are auto, "),
        ("--only", "[", "a regular expression was wanted, got '[': unterminated"),
        ("--part", "half", "a part is I/N, as 2/3, got 'half'"),
        ("--world-size", "0", "a whole number from 1 was wanted, got '0'"),
        ("--budget", "0", "a positive number was wanted, got '0'"),
    ],
)
def test_a_value_that_is_none_is_refused_with_its_option(
    option: str, value: str, message: str, tmp_path: Path, refused: Callable[..., tuple[int, str]]
) -> None:
    code, words = refused("benchmark.py", "--out", str(tmp_path / "results"), option, value)
    assert code == 2
    assert f"error: argument {option}: {message}" in words.splitlines()[-1]


def test_an_unwritable_results_path_is_refused_before_anything_is_measured(
    tmp_path: Path, refused: Callable[..., tuple[int, str]]
) -> None:
    file = tmp_path / "a file"
    file.write_text("in the way")
    code, words = refused("benchmark.py", "--out", str(file / "results"))
    assert code == 2
    assert str(file) in words


def test_ctrl_c_keeps_what_was_measured_and_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        """A coordinator whose second trial the user does not wait for."""

        def __init__(self, *_: object, **__: object) -> None:
            self.outcomes = iter([Measurement(density=0.5, forward_ms_p50=1.0)])

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def run(self, spec: TrialSpec) -> Outcome:
            measured = next(self.outcomes, None)
            if measured is None:
                raise KeyboardInterrupt
            return Outcome(spec, measured, None, 0)

    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--out", str(tmp_path), "--lengths", "128", "256", "512"])
    monkeypatch.setattr(launch, "cluster", lambda address, verbose: nullcontext())
    monkeypatch.setattr(launch, "worker_share", lambda cpus: Share())
    for name in ("__init__", "__enter__", "__exit__", "run"):  # the class stays itself: the job imports more of it
        monkeypatch.setattr(Coordinator, name, getattr(Interrupted, name))
    assert job.main() == 130
    assert len(Store(str(tmp_path)).read_records()) == 1
    assert (tmp_path / "report.html").exists()
    assert "ended after 1 of 3 measurements" in capsys.readouterr().out
