"""What torch does with functions, done to ours: it gives the reference's numbers in float64, or is refused in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from raybsa import BlockLayout, block_sparse_attention, patterns

Attend = Callable[..., Tensor]
BACKENDS = ["auto", "blocked", "reference"]
TOKENS, BLOCK, HEADS = 40, 16, 4
LAYOUT = patterns.build("random").layout(TOKENS, num_heads=HEADS, q_block_size=BLOCK, causal=True, density=0.7)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler itself


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, TOKENS, 16, generator=generator, dtype=torch.float64) for h in (HEADS, 2, 2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def options(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    if kind == "plain":
        return {}
    generator, ids = torch.Generator().manual_seed(2), (torch.arange(TOKENS) // 30).expand(2, -1).contiguous()
    bias = torch.randn(LAYOUT.nnz_blocks, generator=generator, dtype=torch.float64)
    mask = torch.randn(TOKENS, TOKENS, generator=generator, dtype=torch.float64)
    return {"block_bias": bias.to(dtype), "attn_mask": mask.to(dtype), "segment_ids": (ids, ids)}


def attend(backend: str, kind: str, dtype: torch.dtype) -> Attend:
    given = options(kind, dtype)
    return lambda q, k, v: block_sparse_attention(q, k, v, LAYOUT, backend=backend, **given)  # type: ignore[return-value]


def loss(f: Attend) -> Attend:
    return lambda *x: f(*x).square().sum()


def along_two_numbers(f: Attend, q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A function of two numbers, for whole matrices of derivatives."""
    return lambda z: f(q * (1 + z[0]), k + z[1], v), torch.zeros(2, dtype=q.dtype)


def twice(f: Attend, *x: Tensor) -> Sequence[Tensor]:
    leaves = [y.clone().requires_grad_() for y in x]
    first = torch.autograd.grad(loss(f)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(y.square().sum() for y in first), leaves)


def dual(f: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(q, q.cos()), k, v)).tangent


def stacked(q: Tensor) -> Tensor:
    return torch.stack([q, 0.5 * q, q + 1])


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, *x: grad(loss(f), (0, 1, 2))(*x),
    "grad of grad": lambda f, q, k, v: grad(lambda q: grad(loss(f))(q, k, v).square().sum())(q),
    "double backward": twice,
    "vmap": lambda f, q, k, v: vmap(f, (0, None, None))(stacked(q), k, v),
    "vmap of grad": lambda f, q, k, v: vmap(grad(loss(f), (0, 1, 2)), (0, None, None))(stacked(q), k, v),
    "vmap of vmap": lambda f, q, k, v: vmap(vmap(f, (0, None, None)), (0, None, 0))(stacked(q)[None], k, v[None]),
    "jvp": lambda f, q, k, v: jvp(f, (q, k, v), (q.cos(), k.cos(), v.cos())),
    "a dual tensor": dual,
    "jacrev": lambda f, *x: jacrev(along_two_numbers(lambda *y: f(*y).sum((0, 1, 2)), *x)[0])(torch.zeros(2).to(x[0])),
    "jacfwd": lambda f, *x: jacfwd(along_two_numbers(f, *x)[0])(along_two_numbers(f, *x)[1]),
    "hessian": lambda f, *x: hessian(along_two_numbers(loss(f), *x)[0])(along_two_numbers(f, *x)[1]),
}


@pytest.mark.parametrize("kind", ["plain", "rich"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_the_reference_s_numbers(name: str, backend: str, kind: str) -> None:
    wanted = TRANSFORMS[name](attend("reference", kind, torch.float64), *inputs(torch.float64))
    got = TRANSFORMS[name](attend(backend, kind, torch.float32), *inputs())
    assert_equal(got, wanted)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_in_float64_to_the_last_digits(name: str) -> None:
    wanted, got = (TRANSFORMS[name](attend(b, "rich", torch.float64), *inputs(torch.float64)) for b in BACKENDS[:0:-1])
    assert_equal(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout_of", ["one group", "heads", "samples and heads"])
def test_samples_with_masks_biases_and_layouts_of_their_own(layout_of: str) -> None:
    groups = {"one group": 1, "heads": HEADS, "samples and heads": 2 * HEADS}[layout_of]
    dense = torch.rand(groups, 3, 3, generator=torch.Generator().manual_seed(4)) < 0.7
    layout = BlockLayout.from_dense(dense, q_len=TOKENS, kv_len=TOKENS, q_block_size=BLOCK, causal=True)
    q, k, v = inputs(torch.float64)
    many = 3
    masks = torch.randn(many, 2, 1, TOKENS, TOKENS, dtype=torch.float64)
    biases = torch.randn(many, layout.nnz_blocks, dtype=torch.float64)

    def f(backend: str) -> Callable[..., Tensor]:
        def one(q: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
            return block_sparse_attention(q, k, v, layout, attn_mask=mask, block_bias=bias, backend=backend).cos().sum()

        return grad(one, (0, 1, 2))

    got = vmap(f("auto"))(stacked(q), masks, biases)
    wanted = [f("reference")(*each) for each in zip(stacked(q), masks, biases, strict=True)]
    assert_equal(got, tuple(torch.stack(x) for x in zip(*wanted, strict=True)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mapped", [False, True])
def test_samples_under_a_mask_that_is_one_number(mapped: bool) -> None:
    q, k, v = inputs(torch.float64)
    mask = torch.tensor([0.0, -float("inf"), 1.0], dtype=torch.float64) if mapped else torch.tensor(0.5)

    def f(q: Tensor, mask: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, LAYOUT, attn_mask=mask)  # type: ignore[return-value]

    masks = list(mask) if mapped else [mask] * 3
    wanted = [block_sparse_attention(x, k, v, LAYOUT, attn_mask=m) for x, m in zip(stacked(q), masks, strict=True)]
    assert_equal(vmap(f, (0, 0 if mapped else None))(stacked(q), mask), torch.stack(wanted), rtol=1e-9, atol=1e-9)


def test_samples_drop_apart_or_alike_as_vmap_is_asked() -> None:
    q, k, v = inputs()
    many = q.expand(3, *q.shape)

    def dropped(q: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, LAYOUT, dropout_p=0.5)  # type: ignore[return-value]

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(dropped)(many)
    apart, alike = (vmap(dropped, randomness=how)(many) for how in ("different", "same"))
    assert torch.equal(alike[0], alike[1])
    assert not torch.equal(apart[0], apart[1])


def test_the_gradient_of_dropout_is_of_the_mask_that_was_drawn() -> None:
    """The output is linear in v, so <dL/dv, v> = <w, out> holds for the mask that the forward used alone."""
    q, k, v = inputs(torch.float64)
    w = torch.randn_like(q)

    def weighted(v: Tensor) -> tuple[Tensor, Tensor]:
        out = block_sparse_attention(q, k, v, LAYOUT, dropout_p=0.5)
        return (out * w).sum(), (out * w).sum()  # type: ignore[operator]

    found, value = grad(weighted, has_aux=True)(v)
    torch.testing.assert_close((found * v).sum(), value)


@pytest.mark.parametrize("name", ["vmap of grad", "jvp"])
def test_a_compiler_around_a_transform_leaves_it_as_it_is(name: str) -> None:
    torch.compiler.reset()
    x = inputs()
    found = torch.compile(lambda *x: TRANSFORMS[name](attend("auto", "plain", torch.float32), *x), backend="aot_eager")
    assert_equal(found(*x), TRANSFORMS[name](attend("reference", "plain", torch.float32), *x))


def test_a_library_s_backend_is_refused_under_a_transform() -> None:
    with pytest.raises(NotImplementedError, match="backend 'flex' serves ordinary tensors"):
        vmap(attend("flex", "plain", torch.float32), (0, None, None))(stacked(inputs()[0]), *inputs()[1:])


def test_an_unknown_backend_is_named_as_such_under_a_transform() -> None:
    with pytest.raises(ValueError, match="unknown backend 'fastest'"):
        vmap(attend("fastest", "plain", torch.float32), (0, None, None))(stacked(inputs()[0]), *inputs()[1:])


def assert_equal(got: Any, wanted: Any, rtol: float = 1e-3, atol: float = 1e-3) -> None:
    flat_got, flat_wanted = (torch.utils._pytree.tree_leaves(x) for x in (got, wanted))
    assert len(flat_got) == len(flat_wanted)
    for a, b in zip(flat_got, flat_wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)
