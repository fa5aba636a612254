"""Other libraries as backends: what they refuse, what they are given, and on a GPU that they equal the reference."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from raybsa import BlockLayout, block_sparse_attention
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.peers import cudnn, fa4, guards
from raybsa.kernels.peers.lists import column_lists, row_lists
from tests.kernels.problems import Problem, relative_error

GOOD = Problem("good", groups=4, batch=1, q_len=512, kv_len=512, q_block=128, kv_block=128, head_dim=128, kind="global")


def call_of(problem: Problem = GOOD, dtype: torch.dtype = torch.bfloat16, grad: bool = True, **changes: Any) -> Any:
    q, k, v = (x.requires_grad_(grad) for x in problem.inputs(dtype))
    scale = 1 / math.sqrt(problem.head_dim)
    call = AttentionCall(q, k, v, problem.layout(), scale, None, None, None, 0.0, None, False, False)
    return replace(call, **changes)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries installed, and the CPU taken for a Hopper GPU."""
    for module in (fa4, cudnn):
        monkeypatch.setattr(module, "why_not_installed", lambda *_: None)
        monkeypatch.setattr(module, "why_not_hopper", lambda *_: None)
    monkeypatch.setattr(guards, "ALIGNMENT", 16)  # a CPU's tensors begin anywhere


# ---- lists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_lists_hold_the_blocks_of_rows_and_columns_for_every_head(groups: int) -> None:
    problem = Problem("lists", groups=groups, q_len=200, kv_len=300)
    layout = problem.layout()
    dense = layout.to_dense().view(-1, 1 if groups == 1 else 4, *layout.to_dense().shape[1:]).expand(2, 4, -1, -1)
    for lists, wanted in ((row_lists(layout, 2, 4), dense), (column_lists(layout, 2, 4), dense.transpose(-1, -2))):
        assert lists.indices.is_contiguous()
        listed = torch.arange(lists.indices.shape[-1]) < lists.counts[..., None]
        found = torch.zeros(*wanted.shape[:-1], wanted.shape[-1] + 1, dtype=torch.bool)
        found.scatter_(-1, torch.where(listed, lists.indices.long(), wanted.shape[-1]), True)
        assert torch.equal(found[..., :-1], wanted)
        assert (lists.shortest, lists.longest) == (int(lists.counts.min()), int(lists.counts.max()))
    assert row_lists(layout, 2, 4).shortest == 0
    assert not row_lists(layout, 2, 4).uniform


def test_lists_are_uniform_where_all_rows_have_as_many_blocks() -> None:
    layout = BlockLayout.from_rows([[0, 2], [1, 3], [2, 3], [0, 3]], q_len=64, kv_len=64, q_block_size=16)
    assert row_lists(layout, 1, 2).uniform
    assert not column_lists(layout, 1, 2).uniform
    empty = BlockLayout.from_rows([[], []], q_len=32, kv_len=32, q_block_size=16)
    assert not row_lists(empty, 1, 1).uniform


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fa4", "cudnn"])
def test_a_missing_or_old_package_is_named_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"fa4": fa4, "cudnn": cudnn}[name]
    q, k, v = GOOD.inputs(torch.bfloat16)
    monkeypatch.setattr(guards, "installed", lambda package: None)
    with pytest.raises(NotImplementedError, match=rf"{module.PACKAGE} is not installed \(pip install"):
        block_sparse_attention(q, k, v, GOOD.layout(), backend=name)
    monkeypatch.setattr(guards, "installed", lambda package: "1.0.0")
    assert f"{module.PACKAGE} 1.0.0 is too old" in str(module.why_not(call_of()))


def test_versions_are_ordered_with_betas_before_their_release() -> None:
    texts = ["1.31", "1.31.2", "1.32.0", "4.0.0b8", "4.0.0b36", "4.0.0", "4.6.2", "4.10.0"]
    orders = [guards._order(text) for text in texts]
    assert all(before < after for before, after in itertools.pairwise(orders))


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert guards.why_not_hopper(torch.device("cpu"), "FA4") == "FA4 runs on cuda, not on cpu"
    monkeypatch.setattr(guards, "_capability", lambda device: (10, 0))
    assert "this is (10, 0)" in str(guards.why_not_hopper(torch.device("cuda", 0), "FA4"))
    monkeypatch.setattr(guards, "_capability", lambda device: (9, 0))
    assert guards.why_not_hopper(torch.device("cuda", 0), "FA4") is None


@pytest.mark.usefixtures("hopper")
def test_both_serve_plain_layouts_with_gradients() -> None:
    for problem in (GOOD, replace(GOOD, groups=1), replace(GOOD, kind="random")):
        assert fa4.why_not(call_of(problem)) is None
        assert cudnn.why_not(call_of(problem)) is None
    assert cudnn.why_not(call_of(replace(GOOD, q_block=64, kv_block=64))) is None
    assert cudnn.why_not(call_of(replace(GOOD, head_dim=64), torch.float16, grad=False)) is None


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("module", [fa4, cudnn], ids=["fa4", "cudnn"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attn_mask": torch.zeros(512, 512)}, "takes no attn_mask"),
        ({"block_bias": torch.zeros(1)}, "takes no block_bias"),
        ({"segment_ids": (torch.zeros(1, 512), torch.zeros(1, 512))}, "takes no segment_ids"),
        ({"dropout_p": 0.1}, "takes no dropout"),
        ({"deterministic": True}, "an order that changes from run to run"),
        ({"layout": replace(GOOD, causal=True).layout()}, "takes no causal layout"),
        ({"layout": GOOD.layout().select(torch.arange(4), None)}, "takes no selected layout"),
        ({"layout": replace(GOOD, q_len=500).layout()}, "takes no ragged block"),
        ({"q": torch.zeros(1, 4, 512, 128, dtype=torch.float32)}, "float16 and bfloat16, got torch.float32"),
        ({"q": torch.zeros(1, 4, 512, 96, dtype=torch.bfloat16)}, "got 96"),
        ({"q": torch.zeros(262145, dtype=torch.bfloat16)[1:].view(1, 4, 512, 128)}, "begin at multiples of 16 bytes"),
        ({"q": torch.zeros(1, 4, 512, 256, dtype=torch.bfloat16)[..., ::2]}, "heads that are contiguous"),
        ({"layout": replace(GOOD, q_block=32, kv_block=32).layout()}, "got 32 x 32"),
        ({"layout": replace(GOOD, kv_block=64).layout()}, "got 128 x 64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_they_lack_is_refused(module: Any, changes: dict[str, Any], reason: str) -> None:
    assert reason in str(module.why_not(call_of(**changes)))


@pytest.mark.usefixtures("hopper")
def test_each_refuses_its_own_weak_places() -> None:
    assert "blocks of 128 x 128" in str(fa4.why_not(call_of(replace(GOOD, q_block=64, kv_block=64))))
    assert "backward takes bfloat16" in str(cudnn.why_not(call_of(dtype=torch.float16)))
    assert "backward takes head_dim 128" in str(cudnn.why_not(call_of(replace(GOOD, head_dim=64))))
    assert "as many KV heads" in str(cudnn.why_not(call_of(replace(GOOD, kv_heads=2))))
    assert "no gradient of lse" in str(cudnn.why_not(call_of(return_lse=True)))


# ---- what they are given, with a stand-in for the library --------------------------------------------------------


def attend_lists(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, block: int, scale: float) -> Any:
    """out and lse over the listed KV blocks (B, H, nQ, W), differentiable."""
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    blocks = torch.zeros(*counts.shape, k.shape[2] // block + 1, dtype=torch.bool)
    blocks.scatter_(-1, torch.where(listed, indices.long(), blocks.shape[-1] - 1), True)
    mask = blocks[..., :-1].repeat_interleave(block, 2).repeat_interleave(block, 3)
    groups = q.shape[1] // k.shape[1]
    scores = (q.float() @ k.float().repeat_interleave(groups, 1).transpose(-1, -2) * scale).masked_fill(~mask, -1e30)
    weights = torch.softmax(scores, -1) * mask
    lse = torch.logsumexp(scores, -1).masked_fill(~mask.any(-1), float("-inf"))
    return (weights @ v.float().repeat_interleave(groups, 1)).to(q.dtype), lse


def cudnn_stand_in() -> ModuleType:
    module = ModuleType("cudnn.block_sparse_attention")

    def counts_of(indices: Tensor, number: int, counts: Tensor | None) -> Tensor:
        assert indices.is_contiguous()
        assert number <= indices.shape[-1]
        return torch.full(indices.shape[:3], number) if counts is None else counts

    def forward(q, k, v, indices, number, *, q2k_block_nums, sparse_block_size, softmax_scale, **options):
        assert not q.requires_grad
        counts = counts_of(indices, number, q2k_block_nums)
        assert options == {"allow_empty_block_nums": bool((counts == 0).any()), "kv_splits": 1}
        out, lse = attend_lists(q, k, v, counts, indices, sparse_block_size, softmax_scale)
        return {"o_tensor": out, "lse_tensor": lse}

    def backward(do, q, k, v, out, lse, indices, number, *, q2k_block_nums, softmax_scale, sparse_block_size):
        assert do.is_contiguous()
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        counts = counts_of(indices, number, q2k_block_nums)
        with torch.enable_grad():
            again, again_lse = attend_lists(*leaves, counts, indices, sparse_block_size, softmax_scale)
            assert torch.equal(again, out)
            assert torch.equal(again_lse, lse)
            found = torch.autograd.grad(again, leaves, do)
        return dict(zip(("dq_tensor", "dk_tensor", "dv_tensor"), found, strict=True))

    module.block_sparse_attention_forward = forward
    module.block_sparse_attention_backward = backward
    return module


def fa4_stand_in() -> dict[str, ModuleType]:
    cute, sparsity = ModuleType("flash_attn.cute"), ModuleType("flash_attn.cute.block_sparsity")
    sparsity.BlockSparseTensorsTorch = SimpleNamespace

    def flash_attn_func(
        q, k, v, *, softmax_scale, pack_gqa, block_sparse_tensors, block_sparse_tensors_bwd, return_lse
    ):
        assert not pack_gqa
        rows, columns = block_sparse_tensors, block_sparse_tensors_bwd
        assert int(rows.mask_block_cnt.max()) == 0
        assert rows.mask_block_idx.shape == rows.full_block_idx.shape
        assert rows.block_size == (128, 128)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if columns is not None:
            assert columns.full_block_cnt.shape == (*q.shape[:2], k.shape[2] // 128)
            assert int(columns.full_block_cnt.sum()) == int(rows.full_block_cnt.sum())
        out, lse = attend_lists(q, k, v, rows.full_block_cnt, rows.full_block_idx, 128, softmax_scale)
        return out.transpose(1, 2), lse if return_lse else None

    cute.flash_attn_func = flash_attn_func
    return {"flash_attn.cute": cute, "flash_attn.cute.block_sparsity": sparsity}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", ["fa4", "cudnn"])
@pytest.mark.parametrize(
    "problem",
    [
        replace(GOOD, batch=2, groups=8),
        replace(GOOD, batch=2, groups=1),
        replace(GOOD, kind="random"),
        replace(GOOD, kind="dense"),
    ],
    ids=["per sample", "shared", "an empty row", "uniform"],
)
def test_the_library_is_given_the_layout_and_its_result_is_differentiable(
    name: str, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = {"cudnn": ModuleType("cudnn"), "flash_attn": ModuleType("flash_attn")}
    stand_ins = {"cudnn.block_sparse_attention": cudnn_stand_in(), **fa4_stand_in(), **parents}
    for module, stand_in in stand_ins.items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    layout, grad_out = problem.layout(), torch.randn(problem.batch, 4, 512, 128)
    found = {}
    for backend in (name, "reference"):
        q, k, v = (x.bfloat16().requires_grad_() for x in leaves_of(problem))
        for _ in range(2):  # the second time with lists that are known
            out = block_sparse_attention(q, k, v, layout, scale=0.1, backend=backend)
            grads = torch.autograd.grad(out, (q, k, v), grad_out.bfloat16())
            found[backend] = [out, *grads]
        with torch.no_grad():
            plain, lse = block_sparse_attention(q, k, v, layout, scale=0.1, return_lse=True, backend=backend)
        found[backend] += [plain, torch.where(lse == float("-inf"), 0.0, lse)]
    for got, wanted in zip(found[name], found["reference"], strict=True):
        assert relative_error(got, wanted) <= 2e-2


def leaves_of(problem: Problem) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(problem.heads, problem.q_len)] + [(problem.kv_heads, problem.kv_len)] * 2
    return [torch.randn(problem.batch, h, n, problem.head_dim, generator=generator) for h, n in shapes]


# ---- on a GPU ----------------------------------------------------------------------------------------------------

SHAPES = [
    replace(GOOD, name="per-head", kind="global"),
    replace(GOOD, name="shared-batch", groups=1, batch=2),
    replace(GOOD, name="per-sample", groups=8, batch=2, kind="window"),
    replace(GOOD, name="an-empty-row", kind="random", q_len=1024, kv_len=1024),
    replace(GOOD, name="cross", kind="window", q_len=512, kv_len=768),
    replace(GOOD, name="uniform", kind="dense"),
    replace(GOOD, name="head-dim-64", head_dim=64),
    replace(GOOD, name="gqa", kv_heads=2),
    replace(GOOD, name="block-64", q_block=64, kv_block=64, q_len=1024, kv_len=1024),
    replace(GOOD, name="block-64-uniform", q_block=64, kv_block=64, kind="dense"),
]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of the other libraries' compilers
@pytest.mark.parametrize("name", ["fa4", "cudnn", "flex"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("problem", SHAPES, ids=lambda p: p.name)
def test_peers_equal_the_reference_on_cuda(problem: Problem, dtype: torch.dtype, name: str) -> None:
    from raybsa.kernels.api import BACKENDS

    layout, inputs = problem.layout("cuda"), [x.requires_grad_() for x in problem.inputs(dtype, "cuda")]
    scale = 1 / math.sqrt(problem.head_dim)
    call = AttentionCall(*inputs, layout, scale, None, None, None, 0.0, None, False, False)
    reason = BACKENDS[name].why_not(call)
    if reason is not None:
        pytest.skip(reason)
    grad_out = torch.randn_like(inputs[0])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wanted = block_sparse_attention(*wide, layout, backend="reference")
    got = block_sparse_attention(*inputs, layout, backend=name)
    assert relative_error(got, wanted) <= 2e-2
    own, theirs = torch.autograd.grad(got, inputs, grad_out), torch.autograd.grad(wanted, wide, grad_out.double())
    for which, its, exact in zip("qkv", own, theirs, strict=True):
        assert relative_error(its, exact) <= 4e-2, which
