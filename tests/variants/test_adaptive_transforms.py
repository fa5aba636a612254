"""A learned pattern under torch's transforms and tracers: it computes the same, or says that it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from raybsa import BlockSparseAdaptive, BlockSparseMultihead
from raybsa.variants.selector import METHODS


class DropIn(nn.Module):
    """The multihead variant over the same q, k and v as the adaptive one."""

    def __init__(self, method: str) -> None:
        super().__init__()
        pattern = {"name": "adaptive", "params": {"method": method}}
        self.attention = BlockSparseMultihead(32, 2, batch_first=True, pattern=pattern, density=0.4, block_size=8)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x, y, z = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
        out: Tensor = self.attention(x, y, z, need_weights=False)[0]
        return out


def adaptive(method: str) -> nn.Module:
    return BlockSparseAdaptive(num_heads=2, head_dim=16, density=0.4, block_size=8, method=method)


def inputs() -> list[Tensor]:
    return [torch.randn(2, 2, 40, 16) for _ in range(3)]


def by_vmap(model: nn.Module, tensors: list[Tensor]) -> Any:
    return torch.func.vmap(model, randomness="different")(*(x[None] for x in tensors))


def by_grad(model: nn.Module, tensors: list[Tensor]) -> Any:
    return torch.func.grad(lambda q: model(q, *tensors[1:]).sum())(tensors[0])


def by_gradient_of_parameters(model: nn.Module, tensors: list[Tensor]) -> Any:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(model, parameters, tuple(tensors))
        return out.sum()

    return torch.func.grad(loss)(dict(model.named_parameters()))


def by_jvp(model: nn.Module, tensors: list[Tensor]) -> Any:
    return torch.func.jvp(model, tuple(tensors), tuple(tensors))


def by_fake_tensors(model: nn.Module, tensors: list[Tensor]) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model(*(mode.from_tensor(x) for x in tensors))


def by_fake_tensors_out_of_their_mode(model: nn.Module, tensors: list[Tensor]) -> Any:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return model(*(mode.from_tensor(x) for x in tensors))


def on_meta(model: nn.Module, tensors: list[Tensor]) -> Any:
    return model.to("meta")(*(x.to("meta") for x in tensors))


def by_make_fx(model: nn.Module, tensors: list[Tensor]) -> Any:
    return make_fx(model)(*tensors)


def by_jit_trace(model: nn.Module, tensors: list[Tensor]) -> Any:
    return torch.jit.trace(model, tuple(tensors), check_trace=False)


def by_export(model: nn.Module, tensors: list[Tensor]) -> Any:
    return torch.export.export(model, tuple(tensors), strict=False)


REFUSED: dict[Callable[[nn.Module, list[Tensor]], Any], str] = {
    by_vmap: "within torch.func's transforms",
    by_grad: "within torch.func's transforms",
    by_gradient_of_parameters: "within torch.func's transforms",
    by_jvp: "within torch.func's transforms",
    by_fake_tensors: "under FakeTensorMode",
    by_fake_tensors_out_of_their_mode: "got a FakeTensor",
    on_meta: "on the meta device",
    by_make_fx: "under FakeTensorMode, make_fx or torch.export",
    by_jit_trace: "torch.jit.trace would keep what follows from this one input",
    by_export: "torch.export",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
@pytest.mark.parametrize("way", REFUSED, ids=lambda way: way.__name__)
@pytest.mark.parametrize("make", [adaptive, DropIn], ids=["adaptive", "multihead"])
@pytest.mark.parametrize("training", [False, True])
def test_what_has_no_numbers_is_refused_in_words_and_leaves_nothing_behind(way, make, training):
    model, tensors = make("distill").train(training), inputs()
    with pytest.raises(NotImplementedError, match=f"needs tensors whose numbers are at hand: .*{REFUSED[way]}"):
        way(model, tensors)
    if way is not on_meta:
        out = model(*tensors)
        assert type(out) is Tensor
        assert out.isfinite().all()


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_a_dtensor_is_refused_by_name(mesh, method):
    given = [distribute_tensor(x, mesh, [Replicate()]) for x in inputs()]
    with pytest.raises(NotImplementedError, match=r"got a DTensor, .* give to_local\(\)"):
        adaptive(method)(*given)


class _Looks(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class _Named(Tensor):
    """A tensor with a name of its own, and nothing else."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [adaptive, DropIn], ids=["adaptive", "multihead"])
def test_functional_calls_modes_that_only_look_and_subclasses_by_name_change_nothing(make, method):
    model, tensors = make(method).eval(), inputs()
    wanted = model(*tensors)
    parameters = dict(model.named_parameters())
    assert torch.equal(torch.func.functional_call(model, parameters, tuple(tensors)), wanted)
    with _Looks():
        assert torch.equal(model(*tensors), wanted)
    assert torch.equal(model(*(x.as_subclass(_Named) for x in tensors)).as_subclass(Tensor), wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("masks", [{}, {"segment_ids": True}], ids=["plain", "segments"])
def test_what_was_first_used_in_inference_can_be_trained(method, density, masks):
    ids = torch.arange(40).expand(2, -1) // 15
    given = {"segment_ids": (ids, ids)} if masks else {}
    model = BlockSparseAdaptive(num_heads=2, head_dim=16, density=density, block_size=8, method=method)
    tensors = [x.requires_grad_() for x in inputs()]
    with torch.inference_mode():
        model.eval()(*tensors, **given)
        model.train()(*tensors, **given)
    (model(*tensors, **given).square().sum() + model.selector_loss()).backward()
    assert all(p.grad is not None for p in model.parameters())
