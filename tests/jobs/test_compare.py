"""The comparison: every attention trained alike, answers kept, and asked once."""

from __future__ import annotations

import pytest

from jobs import compare
from raybsa.results.store import Store

LINE = (
    "compare --tokens 128 --steps 6 --layers 1 --heads 2 --head-dim 16 --device cpu --threads 1 --density 0.2 "
    "--seeds 0 1 --pattern adaptive sliding_window dense"
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    def call(line: str) -> int:
        monkeypatch.setattr("sys.argv", f"{line} --out {tmp_path / 'results'}".split())
        return compare.main()

    return call


def test_every_attention_is_trained_alike_and_a_second_run_asks_for_what_is_missing(run, tmp_path, capsys):
    assert run(LINE.replace("--seeds 0 1", "--seeds 0")) == 0
    first = Store(tmp_path / "results").read_records()
    assert run(LINE) == 0
    records = Store(tmp_path / "results").read_records()
    assert [(r.pattern, r.seed) for r in records] == [
        (pattern, seed) for seed in (0, 1) for pattern in ("adaptive", "sliding_window", "dense")
    ]
    assert records[:3] == first
    assert {r.quality_name for r in records} == {"bits_per_byte"}
    assert [r.density for r in records[:3]] == pytest.approx([2 / 9, 2 / 9, 1.0])
    shown = capsys.readouterr().out
    table = shown[shown.rindex("pattern ") :].splitlines()
    assert sorted(line.split()[0] for line in table[1:4]) == ["adaptive", "dense", "sliding_window"]
    assert "+0.0000" in next(line for line in table if line.startswith("dense"))


def test_adaptive_warms_up_for_its_share_of_the_steps(run, tmp_path):
    assert run(LINE.replace("sliding_window dense", "").replace("0 1", "0") + " --warmup 0.5 --anneal 0.17") == 0
    (record,) = Store(tmp_path / "results").read_records()
    assert '"params":{"anneal":1,"warmup":3}' in record.spec


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("--warmup 3", "a share in 0 .. 1 was wanted, got '3'"),
        ("--warmup 0.6 --anneal 0.6", "are shares of the same 6 steps, got {'warmup': 4, 'anneal': 4}"),
    ],
)
def test_shares_of_more_steps_than_there_are_are_refused(run, tmp_path, capsys, shares, message):
    with pytest.raises(SystemExit, match="2"):
        run(f"{LINE} adaptive {shares}")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_an_unknown_pattern_is_refused_before_anything_is_trained(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(LINE + " spiral")
    assert "unknown pattern 'spiral'" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
