"""Whoever looks on at a call sees one operator: traces, fake and meta tensors, dispatch modes, subclasses of Tensor."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from raybsa import BlockLayout, BlockSparseBase, BlockSparseMultihead, block_sparse_attention, patterns

TOKENS, BLOCK, HEADS = 40, 16, 4
LAYOUT = patterns.build("random").layout(TOKENS, num_heads=HEADS, q_block_size=BLOCK, causal=True, density=0.7)
BACKENDS = ["auto", "cpp", "blocked", "reference"]
OURS = BACKENDS[:3]

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit.trace, and torch's compiler itself
]


def heads(seed: int = 1, tokens: int = TOKENS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, tokens, 16, generator=generator) for h in (HEADS, 2, 2)]


def attend(backend: str, **options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: block_sparse_attention(q, k, v, LAYOUT, backend=backend, **options)  # type: ignore[return-value]


def wanted(*x: Tensor) -> Tensor:
    return attend("reference")(*x)


def gradients(f: Callable[..., Tensor], *x: Tensor) -> tuple[Tensor, ...]:
    leaves = [y.detach().clone().requires_grad_() for y in x]
    return torch.autograd.grad(f(*leaves).square().sum(), leaves)


TRACES: dict[str, Callable[..., Callable[..., Any]]] = {
    "make_fx": lambda f, *x: make_fx(f)(*x),
    "make_fx before dispatch": lambda f, *x: make_fx(f, pre_dispatch=True)(*x),
    "jit.trace": lambda f, *x: torch.jit.trace(f, x),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trace", TRACES)
def test_a_trace_computes_the_same_of_other_numbers(trace: str, backend: str) -> None:
    traced = TRACES[trace](attend(backend), *heads())
    torch.testing.assert_close(traced(*heads(2)), wanted(*heads(2)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", ["torch.func", "autograd"])
def test_a_trace_of_gradients_computes_the_same_of_other_numbers(by: str, backend: str) -> None:
    def of_autograd(*x: Tensor) -> tuple[Tensor, ...]:
        return gradients(attend(backend), *x)

    of_func = grad(lambda *x: attend(backend)(*x).square().sum(), (0, 1, 2))
    traced = make_fx(of_autograd if by == "autograd" else of_func)(*heads())
    torch.testing.assert_close(traced(*heads(2)), gradients(wanted, *heads(2)))


def test_a_traced_module_draws_dropout_as_it_runs() -> None:
    module = BlockSparseBase(pattern="dense", block_size=BLOCK, dropout=0.5)
    traced = torch.jit.trace(module, tuple(heads()), check_trace=False)
    assert not torch.equal(traced(*heads()), traced(*heads()))
    torch.manual_seed(3)
    found = traced(*heads())
    torch.manual_seed(3)
    torch.testing.assert_close(found, module(*heads()))


def test_a_trace_among_fake_tensors_is_refused_by_torch_unless_it_takes_constants() -> None:
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        make_fx(attend("auto"), tracing_mode="fake")(*heads())
    traced = make_fx(attend("auto"), tracing_mode="fake", _allow_non_fake_inputs=True)(*heads())
    torch.testing.assert_close(traced(*heads(2)), wanted(*heads(2)))


@pytest.mark.parametrize("backend", OURS)
def test_fake_tensors_have_shapes_and_gradients_and_leave_nothing_behind(backend: str) -> None:
    """A layout that is first made among them is of use outside."""
    module = BlockSparseBase(pattern="bigbird", density=0.5, block_size=BLOCK, causal=True, backend=backend)
    for tokens in (TOKENS, 56):
        with FakeTensorMode():
            q, k, v = (torch.empty(2, h, tokens, 16, requires_grad=True) for h in (HEADS, 2, 2))
            out = module(q, k, v)
            out.sum().backward()
            assert out.shape == q.shape
            assert v.grad is not None
            assert v.grad.shape == v.shape
    reference = BlockSparseBase(pattern="bigbird", density=0.5, block_size=BLOCK, causal=True, backend="reference")
    torch.testing.assert_close(module(*heads(1, 56)), reference(*heads(1, 56)))


def test_fake_tensors_of_a_gpu_need_none() -> None:
    module = BlockSparseBase(pattern="bigbird", density=0.5, block_size=BLOCK, causal=True)
    with FakeTensorMode():
        out = module(*(torch.empty(2, h, TOKENS, 16, device="cuda", dtype=torch.bfloat16) for h in (HEADS, 2, 2)))
        assert (out.shape, out.device.type) == ((2, HEADS, TOKENS, 16), "cuda")


@pytest.mark.parametrize("backend", OURS)
def test_tensors_without_memory_have_shapes(backend: str) -> None:
    q, k, v = (x.to("meta").requires_grad_() for x in heads())
    out, lse = block_sparse_attention(q, k, v, LAYOUT, return_lse=True, backend=backend)
    out.sum().backward()
    assert (out.shape, out.device.type) == (q.shape, "meta")
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    assert attend(backend)(q, k, v[..., :5]).shape == (2, HEADS, TOKENS, 5)
    assert k.grad is not None
    module = BlockSparseMultihead(32, 2, pattern="bigbird", density=0.5, batch_first=True, device="meta")
    x = torch.empty(2, 40, 32, device="meta")
    assert module(x, x, x, need_weights=False)[0].shape == x.shape


@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_weights_of_tensors_without_numbers_have_shapes(where: str, extra: dict[str, bool]) -> None:
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        module = BlockSparseMultihead(
            32, 2, dropout=0.5, pattern="bigbird", block_size=BLOCK, batch_first=True, **extra
        )
        x = torch.empty(2, TOKENS, 32, requires_grad=True)
        out, weights = module(x, x, x, average_attn_weights=False)
        (out.sum() + weights.sum()).backward()
        assert weights.shape == (2, 2, TOKENS, TOKENS + len(extra))
        assert x.grad is not None


def test_numbers_that_are_not_there_cannot_be_read() -> None:
    with (
        FakeTensorMode(),
        pytest.raises(NotImplementedError, match="tensors with numbers were wanted by"),
    ):
        wanted(*(torch.empty(2, h, TOKENS, 16) for h in (HEADS, 2, 2)))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", OURS)
def test_a_dispatch_mode_sees_the_operator_and_changes_nothing(backend: str) -> None:
    with Seen() as seen:
        found = gradients(attend(backend), *heads())
    assert [name for name in seen.names if "raybsa" in name] == [
        "raybsa.attention.default",
        "raybsa.attention_backward.default",
    ]
    torch.testing.assert_close(found, gradients(wanted, *heads()))


@pytest.mark.parametrize("backend", OURS)
def test_a_wrapper_of_tensors_gets_what_its_parts_get(backend: str) -> None:
    ones, others = heads(1), heads(2)
    out = attend(backend)(*(TwoTensor(a, b) for a, b in zip(ones, others, strict=True)))
    assert type(out) is TwoTensor
    torch.testing.assert_close(out.a, wanted(*ones))
    torch.testing.assert_close(out.b, wanted(*others))


class Named(Tensor):
    """A subclass that changes nothing."""


def test_a_subclass_that_changes_nothing_gets_its_numbers_and_gradients() -> None:
    x = [y.as_subclass(Named).requires_grad_() for y in heads()]
    out = attend("auto")(*x)
    torch.testing.assert_close(out.as_subclass(Tensor), wanted(*heads()))
    out.square().sum().backward()
    torch.testing.assert_close(x[0].grad.as_subclass(Tensor), gradients(wanted, *heads())[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode_first_then_training(backend: str) -> None:
    module = BlockSparseBase(pattern="bigbird", density=0.5, block_size=BLOCK, causal=True, backend=backend)
    with torch.inference_mode():
        first = module(*heads())
    torch.testing.assert_close(first, module(*heads()))
    gradients(module, *heads())


@pytest.mark.parametrize("backend", OURS)
def test_autocast_gives_its_type(backend: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = attend("auto" if backend == "cpp" else backend)(*heads())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted(*heads()), rtol=0.03, atol=0.03)


# ---- randomness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", [None, "aot_eager", "inductor"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_backward_has_the_mask_of_its_forward(reentrant: bool | None, compiler: str | None) -> None:
    """The output is linear in v, so <dL/dv, v> = <w, out> holds for the mask that the forward used alone."""
    if reentrant and compiler:
        pytest.skip("torch's compiler takes no reentrant checkpoint")
    torch.compiler.reset()
    f = attend("auto", dropout_p=0.5)

    def checkpointed(*x: Tensor) -> Tensor:
        return f(*x) if reentrant is None else checkpoint(f, *x, use_reentrant=reentrant)  # type: ignore[return-value]

    function = checkpointed if compiler is None else torch.compile(checkpointed, backend=compiler)
    q, k, v = (x.requires_grad_() for x in heads())
    out = function(q, k, v)
    w = torch.randn_like(out)
    (out * w).sum().backward()
    assert v.grad is not None
    torch.testing.assert_close((v.grad * v).sum(), (w * out).sum(), rtol=1e-4, atol=1e-4)


def test_two_calls_of_one_graph_draw_apart() -> None:
    """As torch's own dropout: a compiler may not take two draws for one."""
    torch.compiler.reset()
    f = attend("auto", dropout_p=0.5)
    one, two = torch.compile(lambda *x: (f(*x), f(*x)), backend="aot_eager", fullgraph=True)(*heads())
    assert not torch.equal(one, two)


@pytest.mark.parametrize("seed", [0, 5, -1, -2, 2**31, 2**63])
def test_a_seed_is_any_integer_and_the_same_compiled(seed: int) -> None:
    torch.compiler.reset()
    f = attend("auto", dropout_p=0.5, seed=seed)
    torch.testing.assert_close(torch.compile(f, backend="aot_eager", fullgraph=True)(*heads()), f(*heads()))
    assert torch.equal(f(*heads()), f(*heads()))
    torch.testing.assert_close(f(*heads()), attend("reference", dropout_p=0.5, seed=seed)(*heads()))


# ---- what a call keeps ----------------------------------------------------------------------------------------------


def layout_of_a_batch() -> BlockLayout:
    return BlockLayout.from_rows([[0], [0, 1], [1, 2]], q_len=TOKENS, kv_len=TOKENS, q_block_size=BLOCK, causal=True)


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_a_layout_may_be_gone_before_the_backward(compiler: str | None) -> None:
    torch.compiler.reset()

    def f(q: Tensor, layout: BlockLayout) -> Tensor:
        return block_sparse_attention(q, q, q, layout)  # type: ignore[return-value]

    function = f if compiler is None else torch.compile(f, backend=compiler)

    def forward(q: Tensor) -> Tensor:
        return function(q, layout_of_a_batch()).square().sum()

    for step in range(5):
        q = heads(step)[0].requires_grad_()
        loss = forward(q)
        gc.collect()
        loss.backward()
        other = q.detach().clone().requires_grad_()
        f(other, layout_of_a_batch()).square().sum().backward()
        torch.testing.assert_close(q.grad, other.grad)


@pytest.mark.parametrize("what", ["segment_ids", "attn_mask", "layout"])
def test_what_is_written_to_before_the_backward_is_told(what: str) -> None:
    layout, mask = layout_of_a_batch(), torch.zeros(TOKENS, TOKENS)
    ids = torch.zeros(2, TOKENS, dtype=torch.int64)
    q = heads()[0].requires_grad_()
    out = block_sparse_attention(q, q, q, layout, attn_mask=mask, segment_ids=(ids, ids))
    {"segment_ids": ids, "attn_mask": mask, "layout": layout.col_indices}[what].add_(0)
    with pytest.raises(RuntimeError, match=r"modified by an inplace|layout's tensors were written to"):
        out.sum().backward()  # type: ignore[union-attr]


def test_a_layout_that_is_written_to_is_another_one() -> None:
    layout, x = layout_of_a_batch(), heads()[0]
    for row in (2, 1):
        layout.col_indices[-1] = row  # then columns of the last row repeat
        if row == 2:
            found = block_sparse_attention(x, x, x, layout)
            torch.testing.assert_close(found, block_sparse_attention(x, x, x, layout_of_a_batch()))
        else:
            with pytest.raises(ValueError, match="ascend strictly within a row"):
                block_sparse_attention(x, x, x, layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("column", [-1, 3, 10**8])
def test_a_column_that_is_not_there_is_refused_before_it_is_read(column: int, backend: str) -> None:
    crow, col = torch.tensor([[0, 1, 2, 3]]), torch.tensor([0, column, 2], dtype=torch.int32)
    for transient in (False, True):
        layout = BlockLayout(crow, col, TOKENS, TOKENS, BLOCK, BLOCK, transient=transient)
        q, k, v = heads()
        with pytest.raises(ValueError, match=r"col_indices must lie in 0\.\.2"):
            block_sparse_attention(q, k, v, layout, backend=backend)


def test_a_scale_that_changes_leaves_nothing_behind() -> None:
    from raybsa.kernels import call

    layout, x = layout_of_a_batch(), heads()[0]
    block_sparse_attention(x, x, x, layout)
    signatures, decisions = len(call._SIGNATURES), len(call.kept_with(layout))
    outs = [block_sparse_attention(x, x, x, layout, scale=0.1 + 0.01 * step, dropout_p=0.0) for step in range(50)]
    assert (len(call._SIGNATURES), len(call.kept_with(layout))) == (signatures, decisions)
    wanted = block_sparse_attention(x, x, x, layout, scale=0.1 + 0.49, backend="reference")
    torch.testing.assert_close(outs[-1], wanted)


# ---- sizes and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [8, 16, 32])
def test_values_of_another_width(width: int, backend: str) -> None:
    q, k, _ = heads()
    v = torch.randn(2, 2, TOKENS, width)
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    mask = LAYOUT.to_dense().repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :TOKENS, :TOKENS].tril()
    dense = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attend(backend)(q, k, v), dense(q, keys, values, mask))
    got = gradients(attend(backend), q, k, v)
    want = gradients(lambda q, k, v: dense(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask), q, k, v)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(attend(backend), backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), dense(q, keys, values, mask))


@pytest.mark.parametrize("shape", [(0, 10), (2, 0)])
def test_nothing_to_attend_is_zeros_with_a_gradient(shape: tuple[int, int]) -> None:
    module = BlockSparseBase(block_size=BLOCK, causal=True)
    q, k, v = (torch.randn(shape[0], h, shape[1], 8, requires_grad=True) for h in (4, 2, 2))
    out = module(q, k, v)
    out.sum().backward()
    assert out.shape == q.shape
    assert k.grad is not None
    queries = torch.randn(2, 4, 5, 8, requires_grad=True)
    out = module(queries, *(torch.randn(2, 2, 0, 8) for _ in range(2)))
    assert torch.equal(out, torch.zeros_like(queries))
    multihead = BlockSparseMultihead(32, 4, batch_first=True, pattern="dense", block_size=BLOCK, add_bias_kv=True)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True, add_bias_kv=True)
    theirs.load_state_dict(multihead.state_dict())
    x, nothing = torch.randn(*shape, 32), torch.randn(shape[0], 0, 32)
    for inputs in ((x, x, x), (x, nothing, nothing)):
        for mine, their in zip(multihead(*inputs), theirs(*inputs), strict=True):
            torch.testing.assert_close(mine, their)


@pytest.mark.parametrize("shape", [(TOKENS,), (1,), (), (1, TOKENS), (TOKENS, 1), (2, 1, 1, TOKENS)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_of_any_shape_has_its_gradient(shape: tuple[int, ...], compiled: bool) -> None:
    torch.compiler.reset()
    found, x = [], heads()

    def loss(backend: str, mask: Tensor) -> Tensor:
        return attend(backend, attn_mask=mask)(*x).square().sum()

    for backend in ("auto", "reference"):
        mask = torch.zeros(shape, requires_grad=True)
        ours = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled and backend == "auto" else loss
        ours(backend, mask).backward()
        found.append(mask.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": nn.Parameter(torch.tensor(0.3))}, TypeError, "scale must be a number, got a tensor"),
        ({"segment_ids": torch.zeros(2, TOKENS).int()}, TypeError, "must be a pair of tensors, .* got Tensor"),
        (
            {"segment_ids": (torch.zeros(2, TOKENS).int(),) * 3},
            TypeError,
            "pair of tensors, .* got 3 of them",
        ),
    ],
)
def test_what_makes_no_call_is_told(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attend("auto", **options)(*heads())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_in_words() -> None:
    parts = [torch.randn(5, 2, 16), torch.randn(7, 2, 16)]
    module = BlockSparseBase(pattern="dense", block_size=BLOCK)
    for layout in (torch.jagged, torch.strided):
        x = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
        with pytest.raises(TypeError, match=r"must be padded, .* got nested tensors"):
            module(x, x, x)
