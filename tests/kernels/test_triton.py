"""The Triton kernels equal the float64 reference: on the CPU under Triton's interpreter, on CUDA (-m gpu) in full."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raybsa import BlockLayout, block_sparse_attention
from raybsa.kernels import triton_arguments, triton_plan, triton_setup, triton_tiles
from raybsa.kernels.api import run_call
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.mass import block_mass
from raybsa.kernels.merge import merge
from raybsa.kernels.triton_backend import backward, mass, run
from tests.kernels.problems import PROBLEMS, Problem, in_double, outputs_and_gradients, relative_error
from tests.kernels.test_backends import _dense_in_low_precision

pytest.importorskip("triton")
from raybsa.kernels import triton_forward, triton_grad_kv, triton_grad_q

SMALL = [
    Problem("per-head-causal-ragged", causal=True, batch=1, heads=2, kv_heads=2, groups=2, q_len=101, kv_len=101),
    Problem("per-sample-gqa-causal", causal=True, batch=2, heads=2, kv_heads=1, groups=4, q_len=96, kv_len=96),
    Problem("shared-mqa-cross-ragged", batch=1, heads=2, kv_heads=1, q_len=70, kv_len=100),
    Problem("causal-rows-that-see-nothing", "dense", True, 1, 1, 1, 33, 70, 16, 64),
    Problem("causal-more-queries-than-keys", "dense", True, 1, 1, 1, 100, 40, 32, 32),
    Problem("wide-blocks-causal", "random", True, 1, 2, 2, 128, 128, 64, 16, 2),
    Problem("tall-blocks-causal-ragged", "random", True, 1, 2, 2, 121, 121, 16, 64),
    Problem("blocks-larger-than-tiles", "dense", True, 1, 1, 1, 140, 140, 128, 128, 1, 80),
    Problem("blocks-smaller-than-dot", "global", True, 1, 1, 1, 45, 45, 8, 4, 1, 16),
    Problem("one-token", "dense", False, 1, 1, 1, 1, 1),
    Problem("odd-head-dim", "global", False, 1, 1, 1, 64, 64, 32, 32, 1, 24),
]
LARGE = [
    Problem("block-128-head-dim-128", "random", True, 1, 4, 4, 1000, 1000, 128, 128, 4, 128),
    Problem("block-64-head-dim-64", "random", True, 2, 4, 2, 1024, 1024, 64, 64, 1, 64),
    Problem("block-64-head-dim-256", "global", False, 1, 2, 2, 500, 700, 64, 64, 1, 256),
    Problem("block-32-head-dim-128", "random", True, 1, 4, 4, 777, 777, 32, 32, 4, 128),
    Problem("block-16-head-dim-64", "random", False, 1, 4, 4, 512, 512, 16, 16, 4, 64),
    Problem("block-128-64-head-dim-96", "global", True, 1, 2, 2, 999, 999, 128, 64, 1, 96),
    Problem("block-256", "dense", True, 1, 2, 2, 1024, 1024, 256, 256, 1, 64),
]
TOLERANCE = (1e-5, 1e-4)  # of outputs, of gradients, in float32


def on_both(small: list[Problem], large: list[Problem]) -> Any:
    """Small problems under the interpreter, and all of them on CUDA."""
    cpu = [pytest.param(problem, "cpu", id=problem.name) for problem in small]
    cuda = [
        pytest.param(problem, "cuda", id=f"{problem.name}-cuda", marks=pytest.mark.gpu) for problem in small + large
    ]
    return pytest.mark.parametrize(("problem", "device"), cpu + cuda)


@pytest.fixture(autouse=True)
def needs_a_gpu_or_the_interpreter(request: pytest.FixtureRequest) -> None:
    device = request.node.callspec.params.get("device", "cpu") if hasattr(request.node, "callspec") else "cpu"
    if device == "cpu" and not triton_setup.interpreting():
        pytest.skip("Triton's interpreter is off where there is a GPU: run these with -m gpu")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def assert_equals_reference(problem: Problem, device: str, layout: BlockLayout | None = None, **options: Any) -> None:
    layout = layout or problem.layout(device)
    shape = (problem.batch, problem.heads, layout.q_tokens, problem.head_dim)
    kv_shape = (problem.batch, problem.kv_heads, layout.kv_tokens, problem.head_dim)
    inputs = [torch.randn(s, device=device) for s in (shape, kv_shape, kv_shape)]
    grad_out, grad_lse = torch.randn(shape, device=device), torch.randn(shape[:3], device=device)
    got = outputs_and_gradients(inputs, layout, grad_out, grad_lse, backend="triton", **options)
    wide, wide_options = in_double(inputs, options)
    wanted = outputs_and_gradients(
        wide, layout, grad_out.double(), grad_lse.double(), backend="reference", **wide_options
    )
    assert got.keys() == wanted.keys()
    for name in wanted:
        error, budget = relative_error(got[name], wanted[name]), TOLERANCE["grad" in name]
        assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.0e}"


def everything(problem: Problem, layout: BlockLayout) -> dict[str, Any]:
    """Every optional argument at once."""
    device, q_tokens, kv_tokens = layout.device, layout.q_tokens, layout.kv_tokens
    return {
        "scale": 0.3,
        "attn_mask": torch.randn(problem.batch, 1, q_tokens, kv_tokens, device=device) > -1.0,
        "segment_ids": tuple(torch.randint(0, 2, (problem.batch, n), device=device) for n in (q_tokens, kv_tokens)),
        "block_bias": torch.randn(layout.nnz_blocks, device=device),
        "dropout_p": 0.3,
        "seed": 7,
    }


@on_both(SMALL, PROBLEMS + LARGE)
def test_forward_and_backward_equal_the_reference(problem: Problem, device: str) -> None:
    assert_equals_reference(problem, device)


@on_both(SMALL[:9], PROBLEMS + LARGE)
def test_every_argument_together_equals_the_reference(problem: Problem, device: str) -> None:
    layout = problem.layout(device)
    assert_equals_reference(problem, device, layout, **everything(problem, layout))


@on_both(SMALL[:3], PROBLEMS + LARGE)
@pytest.mark.parametrize("with_all", [False, True], ids=["plain", "every-argument"])
def test_split_rows_and_columns_equal_the_reference(
    problem: Problem, device: str, with_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_plan, "MIN_PART_TOKENS", 32)
    monkeypatch.setattr(triton_plan, "SHARES", 10**6)
    made: list[int] = []
    cut = triton_plan._cut
    monkeypatch.setattr(triton_plan, "_cut", lambda *a: (work := cut(*a), made.append(work.parts))[0])
    layout = problem.layout(device)
    assert_equals_reference(problem, device, layout, **everything(problem, layout) if with_all else {})
    longest = [layout.row_counts.max().item() * layout.kv_block_size, problem.q_len]
    assert any(made) or max(longest) <= 128, "nothing was split"


@on_both([SMALL[5], SMALL[7]], LARGE)
@pytest.mark.parametrize("with_descriptors", [True, False])
def test_tiles_by_descriptors_and_by_pointers_equal_the_reference(
    problem: Problem, device: str, with_descriptors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    choose = triton_tiles.choose_tile

    def choose_with(*arguments: Any) -> triton_tiles.Tile:
        asked.append(with_descriptors)
        return choose(*arguments)._replace(descriptors=with_descriptors)

    for kernel in (triton_forward, triton_grad_q, triton_grad_kv):
        monkeypatch.setattr(kernel, "choose_tile", choose_with)
    layout = problem.layout(device)
    assert_equals_reference(problem, device, layout, **everything(problem, layout))
    assert len(asked) == 3


@on_both([SMALL[0]], LARGE[:2])
@pytest.mark.parametrize("shape", [(), (-1,), (1, -2), (4, 1, 1), (2, 1, -2, -1), (1, 4, -2, 1)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attn_mask_broadcasts_by_strides(problem: Problem, device: str, shape: tuple[int, ...], kind: str) -> None:
    sizes = {-1: problem.kv_len, -2: problem.q_len, 4: problem.heads, 2: problem.batch, 1: 1}
    mask = torch.randn([sizes[n] for n in shape], device=device)
    mask = mask > -0.5 if kind == "bool" else mask.masked_fill(mask < -1.0, float("-inf"))
    layout, inputs = problem.layout(device), problem.inputs(torch.float32, device)
    got = block_sparse_attention(*inputs, layout, attn_mask=mask, backend="triton")
    wanted = block_sparse_attention(*(x.double() for x in inputs), layout, attn_mask=mask, backend="reference")
    assert isinstance(got, Tensor)
    assert isinstance(wanted, Tensor)
    assert relative_error(got, wanted) <= TOLERANCE[0]


@on_both([SMALL[0]], LARGE[:1])
@pytest.mark.parametrize(("least", "error"), [(-1e6, 1e-3), (torch.finfo(torch.float32).min, TOLERANCE[0])])
def test_rows_that_a_mask_hides_whole_by_a_finite_number_attend_alike_to_all_that_it_hides(
    problem: Problem, device: str, least: float, error: float
) -> None:
    """Beside a small number the scores still count."""
    mask = torch.zeros(problem.q_len, problem.kv_len, device=device)
    mask[1::3], mask[2::3, ::2] = least, least
    layout, inputs = problem.layout(device), problem.inputs(torch.float32, device)
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    got = block_sparse_attention(*ours, layout, attn_mask=mask, backend="triton")
    wanted = block_sparse_attention(*theirs, layout, attn_mask=mask, backend="reference")
    grad = torch.randn_like(got)
    got.backward(grad)
    wanted.backward(grad.double())
    assert relative_error(got, wanted) <= error
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine.grad, other.grad) <= 4e-3  # what a lse of -30,000 can hold


@on_both([Problem("ids", causal=True, batch=1, heads=2, kv_heads=1, q_len=250, kv_len=250, groups=2)], [])
def test_a_selection_keeps_global_positions(problem: Problem, device: str) -> None:
    rows, cols = (torch.tensor(ids, device=device) for ids in ([0, 3, 5, 7], [1, 2, 5, 7]))
    layout = problem.layout(device).select(rows, cols)
    assert_equals_reference(problem, device, layout, **everything(problem, layout))


@on_both([Problem("ring", causal=True, batch=1, heads=2, kv_heads=1, q_len=100, kv_len=100)], LARGE[:2])
def test_backward_of_parts_with_the_global_lse_adds_up_to_the_whole(problem: Problem, device: str) -> None:
    layout, (q, k, v) = problem.layout(device), problem.inputs(torch.float32, device)
    grad_out = torch.randn_like(q)
    whole = AttentionCall(q, k, v, layout, 0.25, None, None, None, 0.0, None, True, True)
    middle = layout.num_kv_blocks // 2
    calls, tokens = [], []
    for ids in (torch.arange(middle), torch.arange(middle, layout.num_kv_blocks)):
        here = slice(int(ids[0]) * problem.kv_block, (int(ids[-1]) + 1) * problem.kv_block)
        tokens.append(here)
        part = layout.select(None, ids.to(device))
        calls.append(replace(whole, k=k[:, :, here], v=v[:, :, here], layout=part))
    out, lse = merge(*run(calls[0]), *run(calls[1]))
    delta = (out * grad_out).sum(-1)
    grads = [backward(call, lse, delta, grad_out) for call in calls]
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = block_sparse_attention(*leaves, layout, scale=0.25, backend="reference")
    (wanted * grad_out).sum().backward()
    assert relative_error(grads[0][0] + grads[1][0], leaves[0].grad) <= TOLERANCE[1]
    for place, leaf in ((1, leaves[1]), (2, leaves[2])):
        for grad, here in zip(grads, tokens, strict=True):
            assert relative_error(grad[place], leaf.grad[:, :, here]) <= TOLERANCE[1]


@on_both([SMALL[0], SMALL[7]], PROBLEMS[:7] + LARGE)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_16_bit_errors_stay_within_twice_those_of_dense_torch(
    problem: Problem, device: str, dtype: torch.dtype
) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies no bfloat16")
    layout, inputs = problem.layout(device), problem.inputs(dtype, device)
    grad_out, grad_lse = torch.randn_like(inputs[0]), torch.zeros(inputs[0].shape[:3], device=device)
    wide = [x.double() for x in inputs]
    wanted = outputs_and_gradients(wide, layout, grad_out.double(), grad_lse.double(), backend="reference")
    got = outputs_and_gradients(inputs, layout, grad_out, grad_lse, backend="triton")
    for name, reference in _dense_in_low_precision(problem, inputs, layout, grad_out).items():
        error, budget = relative_error(got[name], wanted[name]), 2 * relative_error(reference, wanted[name])
        assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.2e}"


@on_both([SMALL[0]], [LARGE[0], LARGE[3]])
def test_inputs_of_any_memory_layout_give_the_same_numbers(problem: Problem, device: str) -> None:
    layout, inputs = problem.layout(device), problem.inputs(torch.float32, device)

    def attend(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = block_sparse_attention(*leaves, layout, backend="triton")
        assert isinstance(out, Tensor)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    wanted = attend(inputs)
    fused = torch.stack([x.transpose(1, 2) for x in inputs], 2)  # (B, S, 3, H, D)
    views = {
        "fused": [fused[:, :, i].transpose(1, 2) for i in range(3)],
        "strided": [torch.stack([x, x], -1)[..., 1] for x in inputs],
    }
    for tensors in views.values():
        assert not any(x.is_contiguous() for x in tensors)
        for got, want in zip(attend(tensors), wanted, strict=True):
            torch.testing.assert_close(got, want)


@on_both([SMALL[2]], LARGE[:2])
def test_calls_repeat_to_the_bit(problem: Problem, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_plan, "MIN_PART_TOKENS", 32)
    monkeypatch.setattr(triton_plan, "SHARES", 10**6)
    layout, inputs = problem.layout(device), problem.inputs(torch.float32, device)
    grads = [torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:3], device=device)]
    first, second = (outputs_and_gradients(inputs, layout, *grads, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_lists_far_longer_than_the_rest_are_split() -> None:
    """32K tokens, a window with a global row and column: only those two are split, into parts of bounded length."""
    rows = [list(range(256)), *([0, i] for i in range(1, 256))]
    layout = BlockLayout.from_rows(rows, q_len=32768, kv_len=32768, q_block_size=128)
    q = torch.empty(1, 16, 32768, 1).expand(1, 16, 32768, 64)
    call = AttentionCall(q, q, q, layout, 1.0, None, None, None, 0.0, None, True, False)
    for work in (triton_plan.plan_rows(call, 64), triton_plan.plan_columns(call, 64).work):
        lengths = work.items[:, 3] - work.items[:, 1]
        assert work.splits[:, 0].tolist() == [0]
        assert int(lengths.max()) <= 64
        assert int(lengths.sum()) == layout.nnz_blocks
        assert work.parts == int(work.splits[0, 2]) == int((work.items[:, 4] >= 0).sum())
        assert work.items[: work.parts, 4].tolist() == list(range(work.parts)), "the longest come first"


def test_a_transient_layout_is_planned_alike_with_empty_items_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose gradients are the same to the bit, for another layout of the same rows too."""
    monkeypatch.setattr(triton_plan, "MIN_PART_TOKENS", 32)
    monkeypatch.setattr(triton_plan, "SHARES", 10**6)
    problem = Problem("per-sample-gqa-causal", causal=True, batch=1, heads=2, kv_heads=1, groups=2, q_len=90, kv_len=90)
    fixed, inputs = problem.layout("cpu"), problem.inputs(torch.float32, "cpu")
    grads = [torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:3])]
    wanted = outputs_and_gradients(inputs, fixed, *grads, backend="triton")
    plan = triton_plan.plan_columns(
        AttentionCall(*inputs[:3], fixed, 1.0, None, None, None, 0.0, None, True, False), 16
    )
    crow = fixed.crow_indices.clone()
    for _ in range(2):
        layout = replace(fixed, crow_indices=crow, transient=True)
        found = outputs_and_gradients(inputs, layout, *grads, backend="triton")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        call = AttentionCall(*inputs[:3], layout, 1.0, None, None, None, 0.0, None, True, False)
        padded = triton_plan.plan_columns(call, 16)
        items, splits = plan.work.sizes()
        assert splits
        assert torch.equal(padded.entries, plan.entries)
        assert torch.equal(padded.work.items[:items], plan.work.items)
        assert torch.equal(padded.work.splits[:splits], plan.work.splits)
        assert padded.work.items[items:, 4].unique().tolist() == [-2]
        assert not padded.work.splits[splits:].any()
        assert padded.work.parts >= plan.work.parts


def test_a_layout_with_no_blocks_and_one_with_no_rows() -> None:
    q, k = torch.randn(1, 1, 40, 16, requires_grad=True), torch.randn(1, 1, 40, 16, requires_grad=True)
    layout = BlockLayout.from_rows([[], [], []], q_len=40, kv_len=40, q_block_size=16)
    out, lse = block_sparse_attention(q, k, k, layout, return_lse=True, backend="triton")
    out.sum().backward()
    assert not out.any()
    assert (lse == float("-inf")).all()
    assert q.grad is not None
    assert k.grad is not None
    assert not q.grad.any()
    assert not k.grad.any()
    none = BlockLayout.from_rows([[0], [1], [2]], q_len=40, kv_len=40, q_block_size=16)
    none = none.select(torch.empty(0, dtype=torch.int64), None)
    q, k.grad = q.detach()[:, :, :0].requires_grad_(), None
    block_sparse_attention(q, k, k, none, backend="triton").sum().backward()
    assert not k.grad.any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q": torch.zeros(1, 1, 8, 16, dtype=torch.float64)}, "take float16, bfloat16 and float32, got torch.float64"),
        ({"q": torch.zeros(1, 1, 8, 16, dtype=torch.bfloat16)}, "interpreter multiplies no bfloat16"),
        ({"q": torch.zeros(1, 1, 8, 320)}, "take head_dim up to 256, got 320"),
        ({"attn_mask": torch.zeros(8, 8, requires_grad=True)}, "make no gradient of attn_mask"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_why_not_says_what_it_cannot_serve(changes: dict[str, Any], reason: str) -> None:
    q = changes.get("q", torch.zeros(1, 1, 8, 16))
    layout = BlockLayout.from_rows([[0]], q_len=8, kv_len=8, q_block_size=8)
    with pytest.raises(NotImplementedError, match=f"backend 'triton' cannot serve this call: .*{reason}.*'blocked'"):
        block_sparse_attention(q, q, q, layout, attn_mask=changes.get("attn_mask"), backend="triton")


def test_without_triton_or_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert triton_setup.why_not_here(cpu) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET=1" in (triton_setup.why_not_here(cpu) or "")
    monkeypatch.setattr(triton_setup, "INSTALLED", False)
    assert "pip install 'raybsa[gpu]'" in (triton_setup.why_not_here(cpu) or "")


@pytest.mark.parametrize("p", [0.1, 0.3, 1 / 3, 0.5, 2.5 / 2**24, 0.999999])
def test_dropout_threshold_is_the_reference_s_comparison(p: float) -> None:
    numbers = torch.arange(max(0, int(p * 2**24) - 9), min(2**24, int(p * 2**24) + 9))
    wanted = numbers.to(torch.float32) * 2.0**-24 >= p  # raybsa.counter.uniform, compared as reference.py does
    assert torch.equal(numbers >= triton_arguments._threshold(p), wanted)


def test_negative_and_zero_scales_equal_the_reference() -> None:
    problem = SMALL[0]
    for scale in (-0.7, 0.0):
        assert_equals_reference(problem, "cpu", scale=scale)


@on_both(SMALL[:4], LARGE[:2])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_mass_of_blocks_is_that_of_torch_in_float64(problem: Problem, device: str, with_bias: bool) -> None:
    layout = problem.layout(device)
    bias = torch.randn(layout.nnz_blocks, device=device) if with_bias else None
    q, k, v = problem.inputs(torch.float32, device)
    ids = (torch.randint(2, (len(q), q.shape[2]), device=device), torch.randint(2, (len(q), k.shape[2]), device=device))
    call = AttentionCall(q, k, v, layout, 0.25, None, ids, bias, 0.0, None, False, True)
    double = replace(call, q=q.double(), k=k.double(), v=v.double(), block_bias=None if bias is None else bias.double())
    lse = run_call(double, "reference")[1]
    torch.testing.assert_close(mass(call, lse.float()).double(), block_mass(double, lse), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("problem", LARGE[:2], ids=lambda problem: problem.name)  # by both kinds of kernels on Hopper
def test_a_cuda_graph_captures_and_replays_forward_and_backward(problem: Problem, device: str) -> None:
    layout, (q, k, v) = problem.layout(device), problem.inputs(torch.bfloat16, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step() -> list[Tensor]:
        out = block_sparse_attention(*leaves, layout, backend="triton")
        assert isinstance(out, Tensor)
        return [out, *torch.autograd.grad(out, leaves, out.detach())]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # the plan is made and the kernels are compiled outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):  # where autograd met the leaves first
        captured = step()
    torch.cuda.synchronize()
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        again = step()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, again, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_each_replay_of_a_cuda_graph_draws_dropout_anew_and_its_backward_has_the_same_mask(device: str) -> None:
    """As of torch's own. The output is linear in v, so <dL/dv, v> = <w, out> holds for the forward's mask alone."""
    problem = LARGE[0]
    layout, (q, k, v) = problem.layout(device), problem.inputs(torch.float32, device)
    v.requires_grad_()
    w = torch.randn_like(q)

    def step() -> tuple[Tensor, Tensor]:
        out = block_sparse_attention(q, k, v, layout, backend="triton", dropout_p=0.3)
        assert isinstance(out, Tensor)
        return out, torch.autograd.grad((out * w).sum(), v)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out, of_v = step()
    outs = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        outs.append(out.clone())
        torch.testing.assert_close((of_v * v).sum(), (w * out).sum(), rtol=1e-3, atol=1e-2)
    assert not torch.equal(*outs)
    torch.cuda.manual_seed(5)
    graph.replay()
    torch.cuda.synchronize()
    first = out.clone()
    torch.cuda.manual_seed(5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, first)
