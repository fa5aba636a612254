"""The scaling suite without ranks: what is asked, what time leaves out, and what is done about failures."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from raybsa.experiments import scaling_longest, scaling_recovery, scaling_suite
from raybsa.experiments.recording import Run
from raybsa.experiments.scaling_cells import QUICK, SIZES, Cell, cells, longest_cell, worlds_of
from raybsa.experiments.scaling_longest import longest, try_lengths
from raybsa.experiments.scaling_recovery import kill_and_recover
from raybsa.experiments.scaling_suite import ScalingSuite
from raybsa.experiments.scaling_table import text_of
from raybsa.results.record import Record
from raybsa.results.store import Store
from raybsa.tasks.ring import ring_params, ring_plan
from tests.ring.made_ranks import MadeRing


def suite_in(folder: Path, **options: float) -> ScalingSuite:
    store = Store.create(folder)
    return ScalingSuite(QUICK["cpu"], [2, 1], "cpu", store, Run.start("test"), **({"time_budget_s": 60.0} | options))


@pytest.fixture(autouse=True)
def made_ring(monkeypatch: pytest.MonkeyPatch) -> type[MadeRing]:
    MadeRing.asked, MadeRing.failing = [], ()
    monkeypatch.setattr(scaling_suite, "ProcessRing", MadeRing)
    return MadeRing


def test_the_most_ranks_come_first_then_one() -> None:
    assert [worlds_of(devices) for devices in (1, 2, 3, 4, 8, 64)] == [
        [1], [2, 1], [2, 1], [4, 1, 2], [8, 1, 4, 2], [8, 1, 4, 2]
    ]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_number_of_ranks_is_asked_every_question_once(device: str) -> None:
    for world_size in (1, 2, 4, 8):
        asked = cells(SIZES[device], world_size, device, [1, 2, 4, 8])
        assert len({cell.spec for cell in asked}) == len(asked)
        assert {ring_params(cell.spec)[0] for cell in asked} == {world_size}
        own = {(cell.scaling, cell.density) for cell in asked if cell.backend == "auto"}
        kinds = ("both",) if world_size == 2 else ("strong", "weak")
        assert own == {(kind, density) for kind in kinds for density in (0.05, 0.01, 1.0)}
        assert asked[0].density == 0.05
        flash = [cell.spec.seq_len for cell in asked if cell.backend == "sdpa-flash"]
        weak = SIZES[device].weak
        assert sorted(flash) == ([weak, 2 * weak, 4 * weak, 8 * weak] if world_size == 1 else [])
    for cell in cells(QUICK["cpu"], 2, "cpu", [2, 1]):
        assert ring_plan(cell.spec).world_size == 2


def test_every_cell_that_nobody_refuses_becomes_a_row(tmp_path: Path, made_ring: type[MadeRing]) -> None:
    suite = suite_in(tmp_path)
    rows = list(suite.records())
    assert not suite.left
    stored = {record.trial_id: record for record in Store(str(tmp_path)).read_records()}
    assert stored == {record.trial_id: record for _, record in rows}
    refused = {cell.backend for cell, record in rows if record.status == "refused"}
    assert refused == {"torch-cp-cudnn", "torch-cp-flash", "torch-cp-flex"}
    assert all(record.error for _, record in rows if record.status == "refused")
    assert {record.status for cell, record in rows if cell.backend in ("auto", "sdpa-flash")} == {"ok"}
    assert [method for method, _ in made_ring.asked].count("calibrate") == 2, "once for each number of ranks"
    text = text_of(rows)
    assert max(map(len, text.splitlines())) <= 170
    (dense,) = (line for line in text.splitlines() if line.startswith("both") and "dense" in line)
    assert "2.00 2.00" in dense, "MadeRing's two ranks take half of its one device's time"
    assert "100%" in dense
    assert "torch-cp-flex refused on 1, 2: FlexAttention has no backward on cpu" in text


def test_a_library_that_fails_is_not_asked_again_and_our_rows_go_on(
    tmp_path: Path, made_ring: type[MadeRing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling_suite, "why_not", lambda spec, device: None)
    made_ring.failing = ("torch-cp-flex",)
    rows = list(suite_in(tmp_path).records())
    said = [record.error for cell, record in rows if cell.backend == "torch-cp-flex" and cell.world_size == 2]
    assert said == ["RuntimeError: no such luck", "failed before: RuntimeError: no such luck"]
    assert sum(spec.layer(0).backend == "torch-cp-flex" for _, spec in made_ring.asked) == 2, "once a number of ranks"
    assert all(record.status == "ok" for cell, record in rows if cell.backend == "auto")
    others = [line for line in text_of(rows).splitlines() if "torch-cp-cudnn 1.00 1.00" in line]
    assert others, "MadeRing answers for everyone alike"


def test_what_time_does_not_suffice_for_is_left_out_and_named(tmp_path: Path, made_ring: type[MadeRing]) -> None:
    suite = suite_in(tmp_path, time_budget_s=0.0)
    rows = list(suite.records())
    assert {record.status for _, record in rows} == {"refused"}
    own = [cell.name for cell in suite.left if cell.backend == "auto"]
    assert own[:2] == ["both 1K 5% on 2", "both 1K dense on 2"]
    assert [method for method, _ in made_ring.asked] == ["calibrate"] * 2


@pytest.mark.parametrize("room", [10_000, 52_000, 99_000, 140_000])
@pytest.mark.parametrize("estimate", [70_000, 100_000])
def test_the_longest_sequence_is_found_from_an_estimate(room: int, estimate: int) -> None:
    tried: list[int] = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= room

    found = longest(fits, 10_000, estimate, step=100, until=time.monotonic() + 60)
    assert found <= room
    assert found >= min(0.9 * room, 1.1 * estimate)
    assert len(tried) <= 10
    assert not tried or tried[0] == estimate
    assert longest(fits, 10_000, estimate, step=100, until=0.0) == 10_000, "no time: what is known"


def test_lengths_are_tried_where_ranks_have_memory_of_their_own(
    tmp_path: Path, made_ring: type[MadeRing], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = suite_in(tmp_path)
    known = [record for _, record in suite.records()]
    ((_, refused),) = try_lengths(suite, QUICK["cpu"], known, 2, "cpu", 1.0)
    assert (refused.status, refused.error) == ("refused", "ranks share this host's memory")

    class Device:
        total_memory = 40 << 20

    rows: list[tuple[Cell, Record]] = []
    monkeypatch.setattr(scaling_longest.torch.cuda, "get_device_properties", lambda device: Device)
    made_ring.room = 9_000
    rows = try_lengths(suite, QUICK["cpu"], known, 2, "cuda", 60.0)
    fit = [record.seq_len for _, record in rows if record.status == "ok"]
    assert 8_000 < max(fit) <= 9_000
    assert any(record.status == "failed" for _, record in rows)
    assert f"longest: {max(fit) >> 10}K tokens at 1 % on 2" in text_of(rows)
    assert ring_plan(longest_cell(QUICK["cpu"], max(fit), 2, "cpu").spec).world_size == 2


def test_without_ray_a_row_says_that_no_training_was_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_recovery, "find_spec", lambda name: None)
    assert kill_and_recover(Store.create(tmp_path), Run.start("test"), 8).endswith("not run, Ray is not installed")
    (record,) = Store(str(tmp_path)).read_records()
    assert (record.task, record.status, record.error) == ("byte_lm", "refused", "Ray is not installed")
