"""The measured table behind ``auto``: which cell speaks for a call, who is taken, and when nobody was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from raybsa import BlockLayout, block_sparse_attention
from raybsa.kernels import api, auto, blocked
from raybsa.kernels.api import BACKENDS, choose_backend
from raybsa.kernels.auto_table import COLUMNS, PATH, Measured, family, of_device, parse, table, text_of
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.kept import kept_with_rows
from raybsa.kernels.peers import guards
from tests.kernels.problems import Problem

GOOD = Problem("good", groups=4, batch=1, q_len=512, kv_len=512, q_block=64, kv_block=64, head_dim=32, kind="window")
CELL = Measured(
    capability="sm_90",
    device="NVIDIA H100 80GB HBM3",
    dtype="bfloat16",
    backward=True,
    head_dim=32,
    block_size=64,
    heads=4,
    tokens=512,
    density=22 / 64,
    row_skew=3 * 8 / 22,
    column_skew=3 * 8 / 22,
    ms={"triton": 2.0, "flex": 3.0, "fa4": 1.0, "cudnn": 1.5},
    cell="made",
    libraries="made 1.0",
)


def call_of(problem: Problem = GOOD, dtype: torch.dtype = torch.bfloat16, grad: bool = True, **changes: Any) -> Any:
    q, k, v = (x.requires_grad_(grad) for x in problem.inputs(dtype))
    scale = 1 / math.sqrt(problem.head_dim)
    call = AttentionCall(q, k, v, problem.layout(), scale, None, None, None, 0.0, None, False, False)
    return replace(call, **changes)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The CPU is an H100 and every library is there; what the test puts into the set refuses."""
    refused: set[str] = set()

    def stand_in(name: str) -> Any:
        return SimpleNamespace(run=blocked.run, why_not=lambda call: f"{name} is out" if name in refused else None)

    for name in ("triton", "flex", "fa4", "cudnn"):
        monkeypatch.setitem(BACKENDS, name, stand_in(name))
    monkeypatch.setattr(auto, "place", lambda device: ("sm_90", "NVIDIA H100 80GB HBM3"))
    monkeypatch.setattr(guards, "ALIGNMENT", 16)  # a CPU's tensors begin anywhere
    return refused


@pytest.fixture
def measured(refusing: set[str], monkeypatch: pytest.MonkeyPatch) -> list[Measured]:
    """The rows of the table that ``auto`` reads."""
    rows = [CELL]
    monkeypatch.setattr(auto, "table", lambda: tuple(rows))
    return rows


# ---- the table ---------------------------------------------------------------------------------------------------


def test_the_package_s_table_is_read_and_written_as_it_is() -> None:
    assert text_of(table()) == PATH.read_text("utf-8")


def test_a_row_that_was_written_is_read_again() -> None:
    few = replace(
        CELL, backward=False, ms={"triton": 1.02349999, "fa4": 1.0034}, libraries="triton 3.6.0, torch 2.11, and so on"
    )
    again = parse(text_of([CELL, few]))
    assert again == (
        replace(CELL, density=0.3438, row_skew=1.091, column_skew=1.091),
        replace(few, density=0.3438, row_skew=1.091, column_skew=1.091, ms={"triton": 1.023, "fa4": 1.003}),
    )
    assert text_of(again) == text_of([CELL, few])
    assert text_of([CELL]).splitlines()[1].count("fa4,1.50,2,3,1,1.5,made,made 1.0") == 1


def test_a_table_that_cannot_be_read_says_what_was_wanted() -> None:
    with pytest.raises(ValueError, match=r"columns must be .*'capability'"):
        parse("a,b\n1,2\n")
    good = text_of([CELL])
    with pytest.raises(ValueError, match=r"a pass is one of \['forward', 'forward\+backward'\], got 'back'"):
        parse(good.replace("forward+backward", "back"))
    with pytest.raises(ValueError, match="could not convert"):
        parse(good.replace(",2,3,1,1.5,", ",fast,3,1,1.5,"))
    assert parse(",".join(COLUMNS) + "\n") == ()


@pytest.mark.parametrize(
    ("own", "taken"), [(1.0, "triton"), (1.0199, "triton"), (1.0201, "fa4"), (0.5, "triton"), (9.0, "fa4")]
)
def test_a_library_is_taken_where_it_is_faster_by_more_than_two_percent(own: float, taken: str) -> None:
    row = replace(CELL, ms={"flex": 1.5, "fa4": 1.0, "triton": own})
    assert row.order[0] == taken
    assert sorted(row.order) == ["fa4", "flex", "triton"]
    assert row.ahead == pytest.approx(min(own, 1.5) if taken == "fa4" else 1 / own), "of the next"


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Quadro", "Quadro"),
    ],
)
def test_a_family_is_the_first_word_with_a_number(name: str, word: str) -> None:
    assert family(name) == word


def test_a_gpu_reads_its_family_s_rows_or_else_those_of_its_architecture() -> None:
    other = replace(CELL, device="NVIDIA H200")
    newer = replace(CELL, capability="sm_100", device="NVIDIA B200")
    rows = (CELL, other, newer)
    assert of_device(rows, "sm_90", "NVIDIA H200 NVL") == (other,)
    assert of_device(rows, "sm_90", "NVIDIA GH200 480GB") == (CELL, other)
    assert of_device(rows, "sm_80", "NVIDIA A100-SXM4-80GB") == ()


# ---- the choice --------------------------------------------------------------------------------------------------


def test_the_fastest_that_can_serve_the_call_is_taken(measured: list[Measured], refusing: set[str]) -> None:
    taken = []
    for _ in range(5):
        taken.append(choose_backend(call_of()))
        refusing.add(taken[-1])
    assert taken == ["fa4", "cudnn", "triton", "flex", "blocked"]


def test_the_nearest_cell_decides(measured: list[Measured]) -> None:
    def won_by(name: str, **changes: Any) -> Measured:
        return replace(CELL, ms={"triton": 2.0, "flex": 2.0, "fa4": 2.0, "cudnn": 2.0, name: 1.0}, **changes)

    measured[:] = [
        won_by("fa4", density=0.2),
        won_by("flex", density=0.3, tokens=1024),
        won_by("cudnn", density=0.3),
        won_by("fa4", density=0.3, row_skew=4.0),
        won_by("fa4", density=0.3, column_skew=4.0),
        won_by("fa4", density=0.3, heads=8),
    ]
    assert choose_backend(call_of()) == "cudnn"
    wide = replace(GOOD, kind="global")
    measured[:] = [won_by("fa4"), won_by("flex", row_skew=8 / (22 / 8), column_skew=8 / (22 / 8))]
    assert choose_backend(call_of(wide)) == "flex", "one row and one column are long"


def test_each_pass_has_its_own_rows(measured: list[Measured]) -> None:
    measured.append(replace(CELL, backward=False, ms={"triton": 2.0, "cudnn": 1.0}))
    assert choose_backend(call_of()) == "fa4"
    assert choose_backend(call_of(grad=False)) == "cudnn"
    with torch.no_grad():
        assert choose_backend(call_of()) == "cudnn"


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 64},
        {"block_size": 128},
        {"dtype": "float16"},
        {"capability": "sm_80"},
        {"backward": False},
        {"tokens": 512 * 5},
        {"tokens": 512 // 5},
        {"heads": 17},
        {"density": 22 / 64 / 4.1},
    ],
    ids=str,
)
def test_what_was_not_measured_is_the_own_kernel_s(changes: dict[str, Any], measured: list[Measured]) -> None:
    assert choose_backend(call_of()) == "fa4"
    measured[:] = [replace(CELL, **changes)]
    assert auto.measured_order(call_of()) == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_mask": torch.zeros(512, 512)},
        {"block_bias": torch.zeros(1)},
        {"segment_ids": (torch.zeros(1, 512), torch.zeros(1, 512))},
        {"dropout_p": 0.1},
        {"deterministic": True},
        {"return_lse": True},
        {"layout": replace(GOOD, causal=True).layout()},
        {"layout": GOOD.layout().select(torch.arange(8), None)},
        {"layout": replace(GOOD, q_len=500, kv_len=500).layout()},
        {"layout": replace(GOOD, kv_block=32).layout()},
        {"k": torch.zeros(1, 2, 512, 32, dtype=torch.bfloat16)},
        {"layout": replace(GOOD, kv_len=1024).layout()},
        {"layout": BlockLayout.from_rows([[]] * 8, q_len=512, kv_len=512, q_block_size=64)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_feature_that_was_not_measured_is_the_own_kernel_s(changes: dict[str, Any], measured: list[Measured]) -> None:
    assert auto.measured_order(call_of(**changes)) == ()
    assert auto.measured_order(call_of(dtype=torch.float32)) == ()


def test_an_explicit_backend_still_raises_and_names_who_can(measured: list[Measured], refusing: set[str]) -> None:
    refusing.add("fa4")
    q, k, v = GOOD.inputs(torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"backend 'fa4' cannot serve this call: fa4 is out; .*'cudnn'"):
        block_sparse_attention(q, k, v, GOOD.layout(), backend="fa4")


def test_a_known_call_is_looked_up_once(measured: list[Measured], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(api, "choose_backend", lambda call: asked.append(call) or "blocked")
    layout, inputs = GOOD.layout(), GOOD.inputs(torch.float32)
    for _ in range(3):
        block_sparse_attention(*inputs, layout)
    assert len(asked) == 1


def test_layouts_of_one_call_go_to_the_own_kernel_and_share_what_their_rows_decide(
    measured: list[Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = GOOD.layout()
    chosen = [replace(layout, transient=True) for _ in range(2)]
    assert auto.measured_order(call_of(layout=layout)) == ("fa4", "cudnn", "triton", "flex")
    assert auto.measured_order(call_of(layout=chosen[0])) == ()
    assert kept_with_rows(chosen[0]) is kept_with_rows(chosen[1])
    asked = []
    monkeypatch.setattr(api, "choose_backend", lambda call: asked.append(call) or "blocked")
    inputs = GOOD.inputs(torch.float32)
    for one in (*chosen, layout):
        block_sparse_attention(*inputs, one)
    assert [call.layout for call in asked] == [chosen[0], layout]
    assert kept_with_rows(replace(layout, causal=not layout.causal)) is not kept_with_rows(layout)


class Reads(TorchFunctionMode):
    """Counts what would wait for the GPU."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("tolist", "item", "__int__", "__float__", "__bool__", "__index__", "cpu", "nonzero", "numpy")
        self.count += getattr(func, "__name__", "") in names
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads() -> Iterator[Reads]:
    with Reads() as mode:
        yield mode


def test_the_choice_reads_back_once_for_a_layout(measured: list[Measured], reads: Reads) -> None:
    call = call_of()
    before = reads.count
    assert choose_backend(call) == "fa4"
    assert reads.count == before + 1
    assert choose_backend(replace(call, scale=2.0)) == "fa4"
    assert reads.count == before + 1
    assert int(call.layout.row_counts.max()) == 3, "the count does count"
    assert reads.count == before + 2


def test_skews_are_the_longest_list_over_the_mean() -> None:
    rows = [[[0, 1, 2, 3], [0], [0], [0]], [[0], [0], [0], [0]]]
    layout = BlockLayout.from_rows(rows, q_len=64, kv_len=64, q_block_size=16)
    row, column = auto.skews(layout)
    assert row == pytest.approx(4 / (11 / 8))
    assert column == pytest.approx(8 / (11 / 4))
