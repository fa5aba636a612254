"""What torch does to a call, by name: how the product goes through it, and what plain calls of the oracle then give.

A transform takes a function of tensors that returns a tuple of tensors, and the case, and gives named tensors.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.fuzzing import inputs, looks_on
from tests.fuzzing.given import Function, Given, Results, gradients, values


def second(given: Given) -> Results:
    """Gradients of the squared gradients."""
    leaves = given.leaves()
    asked = [leaves[i] for i in given.asked]
    if not asked:
        return values(given)
    loss = given.loss(given.f(*leaves))
    if not loss.requires_grad:
        return values(given)
    first = torch.autograd.grad(loss, asked, create_graph=True, materialize_grads=True)
    total = sum(x.square().sum() for x in first)
    found = torch.autograd.grad(total, asked, materialize_grads=True) if total.requires_grad else first
    return {f"second {given.names[i]}": x.detach() for i, x in zip(given.asked, found, strict=True)}


def tangents(given: Given) -> Results:
    """The derivative along cosines."""
    floats = [i for i, x in enumerate(given.xs) if x.is_floating_point()]

    def of_floats(*some: Tensor) -> tuple[Tensor, ...]:
        every = list(given.xs)
        for i, x in zip(floats, some, strict=True):
            every[i] = x
        return given.f(*every)

    along = tuple(given.xs[i].nan_to_num(neginf=0.0).cos() for i in floats)
    found, moved = torch.func.jvp(of_floats, tuple(given.xs[i] for i in floats), along)
    return given.named(found) | {f"tangent {n}": x for n, x in zip(given.outputs, moved, strict=False)}


# ---- many samples ---------------------------------------------------------------------------------------------------


def _mapped(given: Given) -> tuple[list[Tensor], tuple[int | None, ...]]:
    """The tensors, those that the case names as three samples, and vmap's in_dims."""
    word = next((x for x in given.case.extras if x.startswith("mapped=")), "mapped=q").removeprefix("mapped=")
    letters = word if any(name[0] in word for name in given.names) else "q"
    xs = [_three(x) if name[0] in letters else x for x, name in zip(given.xs, given.names, strict=True)]
    return xs, tuple(0 if name[0] in letters else None for name in given.names)


def _three(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return torch.stack([x, x.flip(-1) if x.dim() else x, x])
    return torch.stack([x, 0.5 * x, x.flip(-1) if x.dim() else x])


def _of_sample(given: Given) -> Function:
    """One sample's outputs, and with ``vmap_grad`` its gradients."""
    asked = given.asked
    if given.case.transform != "vmap_grad" or not asked:
        return given.f

    def gradients_of(*xs: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.func.grad(lambda *ys: given.loss(given.f(*ys)), tuple(asked))(*xs)
        return found

    return gradients_of


def by_vmap(given: Given) -> Results:
    xs, dims = _mapped(given)
    found = torch.vmap(_of_sample(given), dims)(*xs)
    return {f"samples {i}": x for i, x in enumerate(found)}


def one_by_one(given: Given) -> Results:
    xs, dims = _mapped(given)
    each = [[x if d is None else x[i] for x, d in zip(xs, dims, strict=True)] for i in range(3)]
    found = [_of_sample(given)(*some) for some in each]
    return {f"samples {i}": torch.stack(x).detach() for i, x in enumerate(zip(*found, strict=True))}


# ---- ways to run ----------------------------------------------------------------------------------------------------


def by_inference(given: Given) -> Results:
    with torch.inference_mode():
        found = given.named(given.f(*given.xs))
    return {name: x.clone() for name, x in found.items()}


def by_checkpoint(given: Given) -> Results:
    reentrant = given.case.transform == "checkpoint_reentrant" and bool(given.asked)
    return gradients(given._replace(f=lambda *xs: checkpoint(given.f, *xs, use_reentrant=reentrant)))


def by_compile(given: Given) -> Results:
    torch.compiler.reset()
    backend = "inductor" if given.case.seed % 50 == 0 else "aot_eager"
    dynamic = (None, True, False)[given.case.seed % 3]
    return gradients(given._replace(f=torch.compile(given.f, backend=backend, dynamic=dynamic)))


def by_make_fx(given: Given) -> Results:
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(given.f, pre_dispatch=given.case.seed % 2 == 0)(*_others(given))
    return values(given._replace(f=traced))


def by_make_fx_of_gradients(given: Given) -> Results:
    from torch.fx.experimental.proxy_tensor import make_fx

    def run(*xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradients(given._replace(xs=xs)).values())

    names = list(gradients(given))
    return dict(zip(names, make_fx(run)(*_others(given))(*given.xs), strict=True))


def by_jit_trace(given: Given) -> Results:
    traced = torch.jit.trace(given.f, tuple(_others(given)), check_trace=False)
    return gradients(given._replace(f=traced))


def _others(given: Given) -> list[Tensor]:
    return [inputs.other_numbers(given.case, x) for x in given.xs]


class _Module(nn.Module):
    def __init__(self, f: Function) -> None:
        super().__init__()
        self.f = f

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return self.f(*xs)


def by_export(given: Given) -> Results:
    strict = given.case.seed % 2 == 0 and given.case.subject != "multihead"  # torch finds no parameters in a function
    with torch.no_grad():
        program = torch.export.export(_Module(given.f), tuple(given.xs), strict=strict)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        return given.named(torch.export.load(buffer).module()(*given.xs))


def by_func_grad(given: Given) -> Results:
    asked = given.asked
    if not asked:
        return values(given)

    def loss(*xs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        found = given.f(*xs)
        return given.loss(found), found

    grads, found = torch.func.grad(loss, tuple(asked), has_aux=True)(*given.xs)
    return given.named(found) | {f"grad {given.names[i]}": x for i, x in zip(asked, grads, strict=True)}


def by_autocast(given: Given) -> Results:
    def cast(*xs: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(xs[0].device.type, torch.bfloat16):
            return given.f(*xs)

    return gradients(given._replace(f=cast))


class Transform(NamedTuple):
    """How the product goes through it, and what the oracle is asked for."""

    run: Callable[[Given], Results]
    wanted: Callable[[Given], Results]


TRANSFORMS: dict[str, Transform] = {
    "plain": Transform(values, values),
    "backward": Transform(gradients, gradients),
    "inference": Transform(by_inference, values),
    "checkpoint": Transform(by_checkpoint, gradients),
    "checkpoint_reentrant": Transform(by_checkpoint, gradients),
    "compile": Transform(by_compile, gradients),
    "make_fx": Transform(by_make_fx, values),
    "make_fx_grad": Transform(by_make_fx_of_gradients, gradients),
    "jit_trace": Transform(by_jit_trace, gradients),
    "export": Transform(by_export, values),
    "func_grad": Transform(by_func_grad, gradients),
    "vmap": Transform(by_vmap, one_by_one),
    "vmap_grad": Transform(by_vmap, one_by_one),
    "jvp": Transform(tangents, tangents),
    "double_backward": Transform(second, second),
    "autocast": Transform(by_autocast, gradients),
    "fake": Transform(looks_on.of_fake, looks_on.blank),
    "meta": Transform(looks_on.of_meta, looks_on.blank),
    "dtensor": Transform(looks_on.by_dtensor, gradients),
    "two_tensor": Transform(looks_on.by_two_tensor, values),
    "pickled": Transform(gradients, gradients),
    "deepcopy": Transform(gradients, gradients),
    "functional_call": Transform(gradients, gradients),
}
