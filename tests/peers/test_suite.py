"""The gpu suite on the CPU: small cells, our torch backend as ours, and stand-ins for other libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs import benchmark
from raybsa.experiments import peer_cells, peer_rows, peer_suite, peer_table
from raybsa.experiments.peer_cells import Cell, cells, parts_of, window_global
from raybsa.experiments.peer_suite import PeerSuite
from raybsa.experiments.recording import Run
from raybsa.kernels import blocked
from raybsa.kernels.api import BACKENDS
from raybsa.results.record import Record
from raybsa.results.store import Store
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks import peers as task
from raybsa.tasks.peers import GpuLost, peer_layout
from raybsa.timing import DeviceLock

ROOT = Path(__file__).parent.parent.parent
SMALL = replace(
    peer_cells.BASE,
    attention=(AttentionSpec("base", PatternSpec("random"), 0.3, 32, "blocked"),),
    seq_len=256,
    num_heads=2,
    head_dim=16,
)
CELLS = [
    Cell("small-random", "small", SMALL),
    Cell(
        "small-global",
        "small",
        replace(SMALL, attention=(AttentionSpec("base", window_global(256, 32, 0.5), None, 32, "blocked"),)),
    ),
    Cell("own-causal", "own", replace(SMALL, causal=True, num_kv_heads=1), peers=False),
]


def library(run: Any = blocked.run, refuses: str | None = None, trains: bool = True) -> Any:
    """A stand-in: what it computes and what it says."""

    def why_not(call: Any) -> str | None:
        return refuses or (None if trains or not call.needs_grad else "no backward")

    return SimpleNamespace(run=run, why_not=why_not)


def wrong(call: Any) -> Any:
    out, lse = blocked.run(call)
    return out * 1.5, lse


def raising(call: Any) -> Any:
    raise RuntimeError("no kernel\nfor this")


@pytest.fixture(autouse=True)
def quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock of our own; no profiler: on a CPU it takes a second a call."""
    monkeypatch.setattr(task, "DeviceLock", lambda device: DeviceLock(device, str(tmp_path)))
    monkeypatch.setattr(task, "peak_bytes", lambda call, device: 1 << 20)
    monkeypatch.setattr(task, "HOST_BELOW_MS", float("inf"))  # however slow the machine is


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {
        "flex": library(trains=False),
        "fa4": library(wrong),
        "cudnn": library(raising),
        "one": library(refuses="never"),
    }
    for name, module in others.items():
        monkeypatch.setitem(BACKENDS, name, module)
    monkeypatch.setattr(peer_suite, "PEERS", (*others, "two"))
    monkeypatch.setitem(BACKENDS, "two", SimpleNamespace(PACKAGE="no-such-package", why_not=lambda call: "missing"))


def suite(store: Store, asked: list[Cell] = CELLS, **changes: Any) -> PeerSuite:
    run = Run.start("benchmark")
    return PeerSuite(asked, store, run, **{"peers": True, "device": "cpu", "repeats": 5, "budget_s": 0.01, **changes})


def by_question(records: list[Record]) -> dict[tuple[str, str, int], Record]:
    return {
        (json.loads(r.spec)["attention"][0]["variant"] + " " + r.pattern, r.backend, int(r.causal)): r for r in records
    }


@pytest.mark.usefixtures("libraries")
def test_every_library_gets_a_row_that_says_what_it_did(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    measured = list(suite(store).records())
    assert [cell.name for cell, _ in measured] == [cell.name for cell in CELLS]
    rows = by_question(store.read_records())
    status = {backend: rows["base random", backend, 0].status for backend in ("blocked", "flex", "fa4", "cudnn", "one")}
    assert status == {"blocked": "ok", "flex": "ok", "fa4": "failed", "cudnn": "failed", "one": "refused"}
    assert ("base random", "two", 0) not in rows, "what is not installed has no row"
    assert "relative error 5.0e-01 forward" in str(rows["base random", "fa4", 0].error)
    assert rows["base random", "cudnn", 0].error == "RuntimeError: no kernel for this"
    assert rows["base random", "one", 0].error == "never"
    own, flex = (rows["base random", backend, 0] for backend in ("blocked", "flex"))
    for record in (own, flex):
        assert record.task == "peers"
        assert record.train_len is None
        assert record.density == pytest.approx(19 / 64)
        assert record.forward_ms_p50
        assert record.forward_host_ms
        assert record.layout_ms is not None
        assert record.error_forward is not None
        assert record.reference_error_forward is not None
        assert record.error_forward < 2 * record.reference_error_forward
        assert record.device_name
        assert record.torch_version == torch.__version__
    assert own.forward_backward_ms_p50
    assert own.peak_bytes
    assert own.error_gradient
    assert flex.forward_backward_ms_p50 is None, "it has no backward"
    assert ("base random", "flex", 1) not in rows, "a cell of our own asks nobody else"
    assert rows["dense dense", "sdpa-flash", 0].status == "ok"
    assert rows["dense dense", "sdpa-flash", 0].density == 1.0
    assert rows["dense dense", "sdpa-cudnn", 0].status == "failed", "there is none on a CPU"


@pytest.mark.usefixtures("libraries")
def test_auto_is_measured_where_it_takes_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "choose_backend", lambda call: "blocked" if call.needs_grad else "flex")
    store = Store.create(tmp_path)
    list(suite(store, CELLS[:1]).records())
    (row,) = (r for r in store.read_records() if r.backend == "auto")
    assert (row.status, row.library) == ("ok", "flex / blocked")
    assert row.forward_ms_p50
    assert row.forward_backward_ms_p50


@pytest.mark.usefixtures("libraries")
def test_a_second_run_measures_only_what_is_missing(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    assert len(list(suite(store, peers=False).records())) == 3
    before = {r.trial_id: r.created_at for r in store.read_records()}
    assert not list(suite(store, peers=False).records())
    again = [cell.name for cell, _ in suite(store).records()]
    assert again == ["small-random", "small-global"], "other libraries had not been asked there"
    after = {r.trial_id: r.created_at for r in store.read_records()}
    own = next(r.trial_id for r in store.read_records() if r.causal and r.variant == "base")
    assert after[own] == before[own]
    assert set(before) < set(after)
    assert not list(suite(store).records())


@pytest.mark.usefixtures("libraries")
def test_no_cell_is_started_after_the_time_budget(tmp_path: Path) -> None:
    late = suite(Store.create(tmp_path), time_budget_s=-1.0)
    assert not list(late.records())
    assert late.left == CELLS


@pytest.mark.usefixtures("libraries")
def test_a_lost_gpu_ends_the_run_with_the_rows_until_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: torch.device) -> None:
        raise GpuLost("gone")

    monkeypatch.setattr(task, "_require_gpu", lost)
    store = Store.create(tmp_path)
    with pytest.raises(GpuLost, match="gone"):
        list(suite(store).records())
    assert {r.backend for r in store.read_records() if r.variant != "dense"} == {"fa4"}
    monkeypatch.undo()


def test_the_gpu_suite_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        suite(Store.create(tmp_path), device="cuda")


# ---- the cells and the table -------------------------------------------------------------------------------------


def test_cells_have_names_of_their_own_and_densities_near_those_asked() -> None:
    whole = cells()
    assert len({cell.name for cell in whole}) == len(whole) == len({cell.spec for cell in whole})
    assert whole[-1].spec.seq_len == 1 << 20
    assert {cell.spec.layer(0).backend for cell in whole} == {"triton"}
    assert {cell.spec.dtype for cell in whole} == {"bfloat16"}
    for cell in whole:
        if cell.spec.seq_len == 8192 and cell.name.endswith(("-5%", "-10%", "-50%")):
            asked = float(cell.name.rpartition("-")[2].rstrip("%")) / 100
            layout = peer_layout(replace(cell.spec, num_heads=1), "cpu")
            assert layout.density == pytest.approx(asked, rel=0.12), cell.name
    assert all(cell in whole for cell in cells(quick=True))


def test_window_global_has_one_global_row_and_column_and_a_layout_a_head() -> None:
    spec = TrialSpec("peers", (AttentionSpec("base", window_global(1024, 64, 0.5), None, 64),), 1024, num_heads=3)
    layout = peer_layout(replace(spec, causal=False), "cpu")
    dense = layout.to_dense()
    assert layout.num_groups == 3
    assert dense[:, 0].all()
    assert dense[:, :, 0].all()
    assert dense.diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_are_whole_groups_and_together_everything(parts: int) -> None:
    whole = cells()
    dealt = [parts_of(whole, part, parts) for part in range(1, parts + 1)]
    assert sorted(cell.name for part in dealt for cell in part) == sorted(cell.name for cell in whole)
    groups = [{cell.group for cell in part} for part in dealt]
    assert all(not (one & two) for i, one in enumerate(groups) for two in groups[:i])


def test_the_gpu_suite_runs_where_ray_and_plotly_are_not_installed(tmp_path: Path) -> None:
    program = (
        "import sys; [sys.modules.__setitem__(name, None) for name in ('ray', 'plotly', 'optuna')];"
        f"sys.argv = ['benchmark.py', '--suite', 'gpu', '--out', {str(tmp_path)!r}, '--time-budget', '1e-9'];"
        "import torch; torch.cuda.is_available = lambda: True; torch.cuda.get_device_name = lambda device: 'H';"
        "from jobs import benchmark; sys.exit(benchmark.main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "the time budget ended: the same command goes on with 69 cells left" in done.stdout
    assert "report:  not drawn" in done.stdout


def test_a_table_of_no_rows_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peer_table.py", str(tmp_path / "none"), "--only", "causal"])
    with pytest.raises(SystemExit, match="2"):
        peer_table.main()
    assert f"whose name 'causal' finds were wanted under '{tmp_path / 'none'}', found none" in capsys.readouterr().err


def test_a_part_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of 1 .. 2, got 3"):
        parts_of(CELLS, 3, 2)


def record(backend: str, status: str = "ok", **measured: Any) -> Record:
    from raybsa.experiments.recording import record_of
    from raybsa.results.record import Measurement, Outcome
    from raybsa.tasks.peers import of_backend

    spec = of_backend(replace(SMALL, head_dim=128), backend)
    made = record_of(Outcome(spec, Measurement(**measured), None, 0), Run("r", "benchmark"), f"t-{backend}")
    return replace(made, status=status)


def test_a_line_says_how_far_ahead_of_whom() -> None:
    cell = Cell("d128-128K-b128-global-10%", "g", replace(SMALL, head_dim=128))
    held = 2 * 256 * 128 * 8
    shared = {"density": 0.1, "dense_forward_ms_p50": 8.0, "dense_forward_backward_ms_p50": 40.0}
    records = [
        record("blocked", forward_ms_p50=1.0, forward_backward_ms_p50=8.0, peak_bytes=int(1.05 * held), **shared),
        record("flex", forward_ms_p50=2.0, forward_backward_ms_p50=10.0, **shared),
        record("fa4", forward_ms_p50=0.8, **shared),
        record("cudnn", "refused", density=0.1),
        record("auto", forward_ms_p50=0.84, forward_backward_ms_p50=8.0, **shared),
    ]
    (row,) = peer_rows.rows_of(records, [cell])
    line = peer_table.line_of(row)
    assert len(line) <= 150
    forward, both = (part.split() for part in line.split("|")[1:3])
    assert forward == ["1.000", "80%", "0.50", "1.25", "fa4", "1.05"]
    assert both == ["8.000", "50%", "0.80", "0.80", "flex", "0.80"]
    assert " 5.0% " in line
    assert line.endswith("cudnn-")
    assert peer_table.HEAD.index("f+b ms") + len("f+b ms") == line.index("8.000") + len("8.000")
    assert len(peer_table.HEAD) <= 150
    assert max(len(cell.name) for cell in cells()) <= 26


def test_the_job_prints_lines_a_table_and_where_the_rows_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = PeerSuite

    def on_cpu(*arguments: Any, **options: Any) -> PeerSuite:
        return real(*arguments, **{**options, "device": "cpu", "budget_s": 0.01})

    monkeypatch.setattr(benchmark, "PeerSuite", on_cpu)
    monkeypatch.setattr(benchmark, "cells", lambda quick=False: CELLS)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--suite", "gpu", "--out", str(tmp_path), "--only", "causal"])
    assert benchmark.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("own-causal") == 2, "as it is measured, and in the table"
    assert "small-random" not in printed
    assert str(tmp_path) in printed
    assert max(map(len, printed.splitlines())) <= 150 + len(str(tmp_path))
