"""Which module is at work belongs to its call: nothing is left when it ends, however it ends, and none is missed."""

from __future__ import annotations

import asyncio
import copy
import inspect
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from raybsa.spec import AttentionSpec, PatternSpec
from raybsa.variants.selector import BlockSelector
from raybsa.variants.swap import attending, swap_attention
from raybsa.variants.swap_watch import service_of
from tests.threads import THREADS, in_threads

H, D, S = 2, 8, 40
WINDOW = AttentionSpec("base", PatternSpec("sliding_window", {"window": 8}), block_size=8)
WIDER = AttentionSpec("base", PatternSpec("sliding_window", {"window": 24}), block_size=8)
LEARNED = AttentionSpec("adaptive", PatternSpec("adaptive"), density=0.5, block_size=8)
DENSE = AttentionSpec("dense")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not _get_current_function_mode_stack()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.last = nn.Linear(H * D, 3 * H * D), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.last(x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def swapped(attention: AttentionSpec = WINDOW, seed: int = 0, layers: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(*(Attention() for _ in range(layers))).eval()
    swap_attention(model, [attention], lambda: model(X))
    return model


def dense(model: nn.Module, x: Tensor) -> Tensor:
    """What the model would compute if it were not swapped."""
    plain = nn.Sequential(*(Attention() for _ in model))
    plain.load_state_dict(model.state_dict())
    return plain(x)


X = torch.randn(2, S, H * D, generator=torch.Generator().manual_seed(3))


# ---- however a call ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("where", ["in a forward", "before one", "after one"])
def test_whatever_ends_a_call_leaves_nothing_behind(where: str, error: type[BaseException]) -> None:
    model = swapped()
    wanted = model(X)

    def fail(*_: object) -> None:
        raise error("stop")

    inner = model[1].last
    with pytest.MonkeyPatch.context() as patch:
        if where == "in a forward":
            patch.setattr(inner, "forward", fail)
        else:
            register = inner.register_forward_pre_hook if where == "before one" else inner.register_forward_hook
            hook = register(fail)
            patch.setattr(model, "stopped", hook, raising=False)
        with pytest.raises(error):
            model(X)
    assert not _get_current_function_mode_stack()
    inner._forward_pre_hooks.clear()
    inner._forward_hooks.clear()
    q = torch.randn(1, 1, S, D)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), (q @ q.mT / D**0.5).softmax(-1) @ q)
    assert torch.equal(model(X), wanted)


def test_a_model_that_catches_its_part_s_error_goes_on_as_itself() -> None:
    class Careful(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.part(x)
            except RuntimeError:
                return super().forward(x)
            raise AssertionError("the part should have failed")

    model = Careful()
    plain = model(X)
    swap_attention(model, [WINDOW], lambda: model(X))
    assert {one.name for one in attending(copy_of(Careful, model), lambda: None)} == set()
    assert not torch.allclose(model(X), plain, atol=1e-3)


def copy_of(kind: Callable[[], nn.Module], model: nn.Module) -> nn.Module:
    made = kind()
    made.load_state_dict(model.state_dict())
    return made


# ---- calls within calls ------------------------------------------------------------------------------------------


def test_a_module_that_calls_itself_is_at_work_again_when_it_comes_back() -> None:
    class Recursive(Attention):
        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            return super().forward(self(x, depth - 1) if depth else x)

    model = Recursive()
    once = Attention()
    once.load_state_dict(model.state_dict())
    for one in (model, once):
        swap_attention(one, [WINDOW], lambda one=one: one(X))
    assert torch.equal(model(X), once(once(once(X))))


def test_swapped_models_that_call_each_other_attend_each_in_its_own_way() -> None:
    inner, other = swapped(WIDER, seed=1, layers=1), swapped(WINDOW, seed=2, layers=1)

    class Outer(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(other_calls(inner(super().forward(x))))

    def other_calls(x: Tensor) -> Tensor:
        return inner(other(x))

    torch.manual_seed(0)
    outer, alone = Outer(), swapped(WINDOW, seed=0, layers=1)
    outer.load_state_dict(alone[0].state_dict())
    swap_attention(outer, [WINDOW], lambda: outer(X))
    assert torch.equal(outer(X), alone(inner(other(inner(alone(X))))))


def test_what_a_dense_module_of_one_model_calls_is_not_another_s_affair() -> None:
    """A swapped model calls another one, whose attention stays torch's, below a mode of the user's own."""
    inner = nn.Sequential(Attention(), Attention())
    swap_attention(inner, [DENSE, WINDOW], lambda: inner(X))
    wanted = inner(X)

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x[:, None]
            F.scaled_dot_product_attention(q, q, q)
            with torch.device("cpu"):  # a mode of torch's own
                return inner(x)

    outer = Outer()
    swap_attention(outer, [WIDER], lambda: outer(X))
    assert torch.equal(outer(X), wanted)


def test_under_a_mode_of_the_user_s_own_attention_is_still_ours() -> None:
    seen = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    model = swapped()
    wanted = model(X)
    with Counting():
        assert torch.equal(model(X), wanted)
    assert seen
    assert F.scaled_dot_product_attention not in seen


def test_a_function_of_torch_s_that_calls_a_module_of_the_model_finds_it_at_work() -> None:
    """While the mode is asked about that function it is not on torch's stack."""

    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return torch.overrides.handle_torch_function(self._call, (x,), x) if self.training else self.part(x)

        def _call(self, x: Tensor) -> Tensor:
            return self.part(x)

    model = Calling().eval()
    swap_attention(model, [WINDOW], lambda: model(X))
    wanted = model(X)
    assert torch.equal(model.train()(X), wanted)


def test_forward_called_by_itself_is_served_too_and_keeps_its_signature() -> None:
    torch.manual_seed(0)
    model = Attention()
    before = inspect.signature(model.forward)
    swap_attention(model, [WINDOW], lambda: model(X))
    assert torch.equal(model.forward(X), model(X))
    assert inspect.signature(model.forward) == before


def test_a_forward_that_the_user_put_on_one_module_is_watched() -> None:
    model = nn.Sequential(Attention())
    whole = model[0].forward
    model[0].forward = lambda x: 2 * whole(x)  # as accelerate does
    swap_attention(model, [WINDOW], lambda: model(X))
    found = model(X)
    del model[0].forward
    assert torch.equal(found, 2 * model(X))


@pytest.mark.parametrize("reentrant", [False, True])
def test_threads_that_recompute_their_forward_get_the_gradients_of_one(reentrant: bool) -> None:
    model = swapped()

    def gradient(number: int, again: bool = True) -> Tensor:
        x = X.roll(number, 1).requires_grad_()
        out = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        out.square().sum().backward()
        return x.grad

    wanted = [gradient(number, again=False) for number in range(THREADS)]
    assert all(torch.equal(one, other) for one, other in zip(in_threads(gradient), wanted, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_s_own_fork_is_served() -> None:
    model = swapped()
    wanted = model(X)
    futures = [torch.jit.fork(model, X) for _ in range(2)]
    assert all(torch.equal(torch.jit.wait(future), wanted) for future in futures)


# ---- replicas and copies -----------------------------------------------------------------------------------------


def replica(model: nn.Module, scale: float) -> nn.Module:
    """As ``nn.DataParallel`` makes one, which needs a GPU: modules are copied shallowly, with tensors of their own."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, made in copies.items():
        made._modules = {name: child and copies[child] for name, child in module._modules.items()}
        for name, parameter in module._parameters.items():
            setattr(made, name, None if parameter is None else parameter.detach() * scale)
    return copies[model]


@pytest.mark.parametrize("attention", [WINDOW, LEARNED], ids=["fixed", "learned"])
def test_replicas_in_threads_attend_by_their_own_tensors(attention: AttentionSpec) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.TransformerEncoderLayer(H * D, H, 32, 0.0, batch_first=True)).eval()
    swap_attention(model, [attention], lambda: model(X))
    scales = [1 + 0.25 * number for number in range(THREADS)]
    wanted = []
    for scale in scales:
        scaled = copy.deepcopy(model)
        for parameter in scaled.parameters():
            parameter.data *= scale
        wanted.append(scaled(X).detach())
    replicas = [replica(model, scale) for scale in scales]
    found = in_threads(lambda number: replicas[number](X))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_tasks_of_asyncio_run_their_layers_in_turns() -> None:
    """Between the layers of one task run those of others: of the same model, another, and one that is not swapped."""
    window, wider, plain = swapped(WINDOW), swapped(WIDER, seed=1), nn.Sequential(Attention(), Attention())
    models = [window, wider, plain, window]
    wanted = [model(X.roll(number, 1)) for number, model in enumerate(models)]

    async def serve(number: int, model: nn.Sequential) -> Tensor:
        x = X.roll(number, 1)
        for layer in model:
            await asyncio.sleep(0)
            x = layer(x)
        return x

    async def all_of_them() -> list[Tensor]:
        return await asyncio.gather(*(serve(number, model) for number, model in enumerate(models)))

    found = asyncio.run(all_of_them())
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_task_begun_inside_of_a_forward_is_served_as_the_module_that_it_calls() -> None:
    """It inherits the forward's context, and runs when that has ended."""
    later = swapped(WIDER, seed=1)

    class Starting(Attention):
        def forward(self, x: Tensor) -> Tensor:
            tasks.append(asyncio.get_running_loop().create_task(call_later(x)))
            tasks.append(asyncio.get_running_loop().create_task(asyncio.to_thread(later, x)))
            return super().forward(x)

    async def call_later(x: Tensor) -> Tensor:
        return later(x)

    async def all_of_it() -> list[Tensor]:
        swap_attention(model, [WINDOW], lambda: model(X))
        tasks.clear()
        model(X)
        return await asyncio.gather(*tasks)

    tasks: list[asyncio.Task[Tensor]] = []
    model, wanted = Starting(), later(X)
    assert all(torch.equal(one, wanted) for one in asyncio.run(all_of_it()))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {n}": lambda model, n=n: pickle.loads(pickle.dumps(model, n)) for n in (0, 2, pickle.HIGHEST_PROTOCOL)},
    "torch.save": lambda model: saved_and_loaded(model),
}


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("attention", [WINDOW, LEARNED], ids=["fixed", "learned"])
@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_any_kind_is_swapped_as_its_model(kind: str, attention: AttentionSpec) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.TransformerEncoderLayer(H * D, H, 32, 0.0, batch_first=True)).eval()
    plain = model(X)
    undo = swap_attention(model, [attention], lambda: model(X))
    wanted, copied = model(X), COPIES[kind](model)
    part = COPIES[kind](model[0])
    assert not torch.allclose(wanted, plain, atol=1e-3)
    assert torch.equal(copied(X), wanted)
    assert torch.equal(part(X), model[0](X))
    assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
    undo()
    assert torch.equal(model(X), plain)
    if kind != "copy":  # whose parts are the model's own
        assert torch.equal(copied(X), wanted)


LOADS = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_a_saved_model_is_swapped_in_another_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(H * D, H, 32, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    plain = model(X)
    swap_attention(model, [WINDOW, LEARNED], lambda: model(X))
    for name, what in (("model", model), ("x", X)):
        torch.save(what, tmp_path / name)
    command = [sys.executable, "-c", LOADS, *(str(tmp_path / name) for name in ("model", "x", "out"))]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=100)
    found = torch.load(tmp_path / "out")
    assert torch.equal(found, model(X))
    assert not torch.allclose(found, plain, atol=1e-3)


def test_a_learned_source_of_a_copy_is_its_own() -> None:
    model = swapped(LEARNED)
    copied = copy.deepcopy(model)
    (ours, theirs) = ([m for m in one.modules() if isinstance(m, BlockSelector)] for one in (model, copied))
    assert len(ours) == len(theirs) == 2
    assert not set(map(id, ours)) & set(map(id, theirs))
    assert [served_by_child(module) for module in copied] == theirs


def served_by_child(module: nn.Module) -> object:
    """What a call of the module is served by."""
    return service_of(module).settle(module, None, True)[0]


# ---- what would be missed is refused -----------------------------------------------------------------------------


class Later(Attention):
    """A forward that attends when it is awaited, or asked for the next."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        return self.awaited(x) if self.kind == "coroutine" else self.stepwise(x)

    async def awaited(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def stepwise(self, x: Tensor) -> Iterator[Tensor]:
        yield super().forward(x)


@pytest.mark.parametrize("kind", ["coroutine", "generator"])
def test_a_forward_that_attends_later_is_refused_by_name(kind: str) -> None:
    model = nn.ModuleList([Later(kind)])
    with pytest.raises(NotImplementedError, match=f"module '0': a forward that returns what it computed.* {kind}: "):
        attending(model, lambda: model[0](X))


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_by_name_before_and_after() -> None:
    model = nn.Sequential(torch.jit.script(Scripted()))
    with pytest.raises(NotImplementedError, match="module '0': a module in Python was wanted, got TorchScript"):
        attending(model, lambda: model(X[:, None]))
    model = nn.Sequential(Scripted())
    swap_attention(model, [WINDOW], lambda: model(X[:, None]))
    with pytest.raises(NotImplementedError, match=r"stays in Python was wanted, got torch.jit.script"):
        torch.jit.script(model)


def test_an_exported_graph_is_refused_by_name_before_and_after() -> None:
    graph = nn.Sequential(torch.export.export(Scripted(), (X[:, None],)).module())
    with pytest.raises(NotImplementedError, match=r"module '0': .*was wanted, got aten.scaled_dot_product_attention"):
        attending(graph, lambda: graph(X[:, None]))
    model = Scripted()
    swap_attention(model, [WINDOW], lambda: model(X[:, None]))
    with pytest.raises(NotImplementedError, match="an exported graph cannot hold it, it is swapped"):
        torch.export.export(model, (X[:, None],))


def test_a_graph_module_is_served_and_its_copies_and_changes_are_refused_by_name() -> None:
    model = nn.Sequential(torch.fx.symbolic_trace(Scripted()))
    plain = model(X[:, None])
    swap_attention(model, [WINDOW], lambda: model(X[:, None]))
    assert not torch.allclose(model(X[:, None]), plain, atol=1e-3)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(NotImplementedError, match="module '0': it is copied or pickled in a way of its own"):
            copied(model)
    with pytest.raises(NotImplementedError, match="module '0': its graph would be compiled into a call that forgets"):
        model[0].recompile()


@torch.no_grad()
def test_a_compiler_leaves_a_swapped_model_as_it_is() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    models = [swapped(WINDOW), swapped(WIDER, seed=1)]
    for model in models:
        assert torch.equal(torch.compile(model, backend=keep)(X), model(X))
    part = nn.Sequential(nn.Linear(H * D, H * D), models[0], nn.Linear(H * D, H * D))
    assert torch.equal(torch.compile(part, backend=keep)(X), part(X))
    assert not any("dot_product" in str(node.target) for graph in graphs for node in graph.graph.nodes)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch.compiler.disable"):
        torch.compile(models[0], backend=keep, fullgraph=True)(X)


def test_attention_written_out_by_hand_is_refused_in_words() -> None:
    class Manual(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ x.mT, -1) @ x

    model = Manual()
    with pytest.raises(ValueError, match=r"got Manual, which has neither: attention written out as a product and a"):
        swap_attention(model, [WINDOW], lambda: model(X))


# ---- other people's classes --------------------------------------------------------------------------------------


def test_a_family_s_list_of_classes_hears_of_no_class_of_ours() -> None:
    family = []

    class Listed(Attention):
        def __init_subclass__(cls, *, name: str) -> None:
            family.append(name)

    class First(Listed, name="first"):
        pass

    model = First()
    undo = swap_attention(model, [WINDOW], lambda: model(X))
    assert family == ["first"]
    assert isinstance(model, First)
    assert (type(model).__name__, type(model).__module__) == ("First", First.__module__)
    undo()
    assert type(model) is First


def test_modules_of_one_class_stay_of_one_class() -> None:
    model = swapped(layers=3)
    assert len({type(layer) for layer in model}) == 1


def test_a_class_laid_over_ours_is_undone_first_and_nothing_is_half_swapped() -> None:
    model = nn.Sequential(Attention(), nn.TransformerEncoderLayer(H * D, H, 32, 0.0, batch_first=True)).eval()
    plain, classes = model(X), [type(module) for module in model.modules()]
    undo = swap_attention(model, [WINDOW], lambda: model(X))
    found = model(X)
    nn.utils.parametrize.register_parametrization(model[0].qkv, "weight", nn.Identity())
    with pytest.raises(RuntimeError, match=r"module '0.qkv': its class has become ParametrizedLinear since, undo that"):
        undo()
    assert torch.equal(model(X), found)
    nn.utils.parametrize.remove_parametrizations(model[0].qkv, "weight")
    undo()
    assert torch.equal(model(X), plain)
    assert [type(module) for module in model.modules()] == classes


def test_parametrized_and_lazy_modules_are_swapped_copied_and_given_back() -> None:
    model = nn.Sequential(nn.LazyLinear(H * D), Attention())
    with torch.no_grad():
        attending(model, lambda: model(X))  # its sizes are known from here on
    nn.utils.parametrizations.weight_norm(model[1].qkv)
    plain, classes = model(X), [type(module) for module in model.modules()]
    undo = swap_attention(model, [WINDOW], lambda: model(X))
    found = model(X)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert torch.equal(copy.deepcopy(model)(X), found)
    undo()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(X), plain)
