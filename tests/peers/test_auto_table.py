"""From rows of the gpu suite to the table behind ``auto``, and ``auto`` in the suite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raybsa.experiments import auto_table, peer_rows, peer_table
from raybsa.experiments.peer_cells import Cell, cells
from raybsa.experiments.recording import Run, record_of
from raybsa.kernels.auto_table import Measured, parse, text_of
from raybsa.results.record import Measurement, Outcome, Record
from raybsa.results.store import Store
from raybsa.tasks.peers import of_backend

H100 = {"capability": "sm_90", "device_name": "NVIDIA H100 80GB HBM3"}
ASKED = [
    cell for cell in cells() if cell.name in ("d128-8K-b64-random-5%", "d128-8K-b64-global-5%", "32K-b32-random-5%")
]


def row(cell: Cell, backend: str, forward: float, both: float | None, status: str = "ok", **changes: Any) -> Record:
    measured = Measurement(
        **{**H100, "density": 0.05, "forward_ms_p50": forward, "forward_backward_ms_p50": both, **changes},
        library=f"{backend} 1.0",
    )
    made = record_of(Outcome(of_backend(cell.spec, backend), measured, None, 0), Run("r", "benchmark"), "")
    return replace(made, status=status, trial_id=f"peers-{made.spec_hash}-{made.capability}")


def suite_rows(**changes: Any) -> list[Record]:
    random, wide, own = (next(c for c in ASKED if word in c.name) for word in ("b64-random", "b64-global", "b32"))
    return [
        row(random, "triton", 1.0, 5.0, **changes),
        row(random, "flex", 2.0, 6.0, **changes),
        row(random, "cudnn", 0.5, None, **changes),
        row(random, "fa4", 0.1, 0.1, "refused", **changes),
        row(wide, "triton", 1.0, 5.0, **changes),
        row(wide, "cudnn", 0.99, 4.0, **changes),
        row(wide, "flex", 0.2, 0.2, "failed", **changes),
        row(own, "triton", 1.0, 5.0, **changes),
    ]


def test_cells_in_which_others_were_measured_become_a_row_a_pass() -> None:
    made = auto_table.table_rows(suite_rows(), ASKED)
    assert [(r.cell[8:], r.backward, r.order[0], r.ms) for r in made] == [
        ("b64-random-5%", False, "cudnn", {"triton": 1.0, "flex": 2.0, "cudnn": 0.5}),
        ("b64-random-5%", True, "triton", {"triton": 5.0, "flex": 6.0}),
        ("b64-global-5%", False, "triton", {"triton": 1.0, "cudnn": 0.99}),
        ("b64-global-5%", True, "cudnn", {"triton": 5.0, "cudnn": 4.0}),
    ]
    first, *_, last = made
    assert (first.capability, first.device, first.dtype) == ("sm_90", "NVIDIA H100 80GB HBM3", "bfloat16")
    assert (first.head_dim, first.block_size, first.heads, first.tokens) == (128, 64, 16, 8192)
    assert first.libraries == "triton 1.0, flex 1.0, cudnn 1.0"
    assert first.row_skew == pytest.approx(1.0, abs=0.1), "rows are even to a block"
    assert last.row_skew == pytest.approx(18.5, rel=0.01), "one row is global"


def test_rows_without_other_libraries_make_no_table() -> None:
    with pytest.raises(ValueError, match="rows of the gpu suite with --peers, found none"):
        auto_table.table_rows([r for r in suite_rows() if r.backend == "triton"], ASKED)


def test_the_command_makes_the_same_table_again_and_keeps_other_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(auto_table, "cells", lambda: ASKED)
    first, second = Store.create(tmp_path / "one"), Store.create(tmp_path / "two")
    for record in suite_rows():
        first.write_record(record)
    for record in suite_rows(capability="sm_80", device_name="NVIDIA A100-SXM4-80GB"):
        second.write_record(record)
    out = tmp_path / "table.csv"

    def command(folder: str) -> str:
        assert auto_table.main([str(tmp_path / folder), "--out", str(out)]) == 0
        return out.read_text("utf-8")

    alone = command("one")
    assert "NVIDIA H100 80GB HBM3, forward: cudnn in 1 cells" in capsys.readouterr().out
    assert text_of(parse(alone)) == alone
    assert command("one") == alone
    both = command("two")
    assert len(parse(both)) == 2 * len(parse(alone)) == 8
    assert [line for line in both.splitlines() if "A100" not in line] == alone.splitlines()
    assert command("one") == both
    part = Store.create(tmp_path / "part")
    for record in suite_rows()[:4]:
        part.write_record(record)
    assert command("part") == both, "cells that were not measured again stay"


def test_the_command_fails_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store.create(tmp_path / "empty")
    out = tmp_path / "table.csv"
    assert auto_table.main([str(tmp_path / "empty"), "--out", str(out)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[Measured]:
    rows = auto_table.table_rows(suite_rows(), ASKED)
    monkeypatch.setattr(peer_rows, "table", lambda: tuple(rows))
    return rows


def autos(records: list[Record]) -> list[list[str]]:
    """The ``auto`` column of both passes, cell after cell."""
    lines = [peer_table.line_of(row) for row in peer_rows.rows_of(records, ASKED)]
    return [[part.split()[-1] for part in line.split("|")[1:3]] for line in lines]


def test_the_suite_s_table_shows_what_auto_takes_over_the_best_library(known: list[Measured]) -> None:
    assert autos(suite_rows()) == [["1.00", "0.83"], ["1.01", "1.00"], ["-", "-"]]
    known.clear()
    assert autos(suite_rows()) == [["2.00", "0.83"], ["1.01", "1.25"], ["-", "-"]], "our own where nothing is known"


def test_where_auto_was_measured_that_is_shown(known: list[Measured]) -> None:
    random = next(c for c in ASKED if "b64-random" in c.name)
    assert autos([*suite_rows(), row(random, "auto", 0.55, 5.4)])[0] == ["1.10", "0.90"]
