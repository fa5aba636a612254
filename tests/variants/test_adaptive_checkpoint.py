"""Checkpoints, DDP and copies of a learned pattern: its gate trains as if they were not there, or an error says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from raybsa import BlockSparseAdaptive, BlockSparseDistributed
from raybsa.comm import Communicator
from raybsa.variants.selector import METHODS, selector_loss
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # reentrant's

KINDS = [None, False, True]  # use_reentrant; None: no checkpoint
NAMES = ["plain", "non-reentrant", "reentrant"]


class Layer(nn.Module):
    """Projections, attention and a residual, under a checkpoint of its own or none."""

    def __init__(self, attention: nn.Module, reentrant: bool | None, **options: Any) -> None:
        super().__init__()
        self.project, self.attention = nn.Linear(32, 96), attention
        self.reentrant, self.options = reentrant, options

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.compute(x)
        return checkpoint(self.compute, x, use_reentrant=self.reentrant, **self.options)

    def compute(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.project(x).chunk(3, -1))
        return x + self.attention(q, k, v).transpose(1, 2).flatten(2)


def model(reentrant: bool | None, layers: int = 3, **options: Any) -> nn.Sequential:
    """The same weights for every kind of checkpoint."""
    torch.manual_seed(1)
    given = {"density": 0.4, "block_size": 8, "causal": True, "sample_rows": 3, "dropout": 0.1}
    return nn.Sequential(
        *(Layer(BlockSparseAdaptive(num_heads=2, head_dim=16, **given), reentrant, **options) for _ in range(layers))
    )


def tokens(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 60, 32, generator=generator).requires_grad_()


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def assert_same(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value is not None, name
        assert torch.equal(value, got[name] if got[name] is not None else torch.zeros(())), name


def one_step(net: nn.Module) -> None:
    (net(tokens()).square().mean() + 0.1 * selector_loss(net)).backward()


def scaled(net: nn.Module) -> None:
    (1024 * (net(tokens()).square().mean() + selector_loss(net))).backward()


def looked_at_twice(net: nn.Module) -> None:
    out = net(tokens())
    shown = selector_loss(net)
    (out.square().mean() + selector_loss(net) + 0.5 * shown).backward()
    assert shown.item() > 0


def summed_on_the_way(net: nn.Module) -> None:
    x, total = tokens(), 0.0
    for layer in net:
        x = layer(x)
        total = total + layer.attention.selector_loss()
    (x.square().mean() + total).backward()


def judged_in_between(net: nn.Module) -> None:
    for step in range(2):
        loss = net(tokens(step)).square().mean() + selector_loss(net)
        with torch.no_grad():  # in training mode, as a careless evaluation is
            net(tokens(7))
            selector_loss(net).item()
        loss.backward()


def two_forwards_before_one_backward(net: nn.Module) -> None:
    losses = [net(tokens(seed)).square().mean() + selector_loss(net) for seed in range(2)]
    (losses[0] + 3 * losses[1]).backward()


def two_forwards_and_two_backwards(net: nn.Module) -> None:
    losses = [net(tokens(seed)).square().mean() + selector_loss(net) for seed in range(2)]
    losses[0].backward()
    losses[1].backward()


def seeded_alike(net: nn.Module) -> None:
    losses = []
    for seed in range(2):
        torch.manual_seed(3)
        losses.append(net(tokens(seed)).square().mean() + (seed + 1) * selector_loss(net))
    sum(losses).backward()


def one_layer_twice(net: nn.Module) -> None:
    first = net[0](tokens())
    total = net[0].attention.selector_loss()
    out = net[1:](net[0](first))
    (out.square().mean() + total + selector_loss(net)).backward()


def the_loss_first(net: nn.Module) -> None:
    out = net(tokens())
    selector_loss(net).backward(retain_graph=True)
    out.square().mean().backward()


STORIES = [
    one_step,
    scaled,
    looked_at_twice,
    summed_on_the_way,
    judged_in_between,
    two_forwards_before_one_backward,
    two_forwards_and_two_backwards,
    seeded_alike,
    one_layer_twice,
    the_loss_first,
]


@pytest.mark.parametrize("reentrant", [False, True], ids=NAMES[1:])
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_gradients_are_bit_for_bit_those_without_a_checkpoint(story: Callable[[nn.Module], None], reentrant: bool):
    found = []
    for kind in (None, reentrant):
        net = model(kind)
        torch.manual_seed(2)
        story(net)
        found.append(gradients(net))
    assert_same(found[1], found[0])
    assert all(found[0][name].abs().max() > 0 for name in found[0] if "gate" in name)


@pytest.mark.parametrize("outer", [False, True], ids=NAMES[1:])
@pytest.mark.parametrize("inner", [False, True], ids=NAMES[1:])
def test_checkpoints_within_checkpoints_change_nothing(outer, inner):
    plain, nested = model(None), model(inner)
    for net in (plain, nested):
        torch.manual_seed(2)
        x = tokens()
        out = net(x) if net is plain else checkpoint(net, x, use_reentrant=outer)
        (out.square().mean() + selector_loss(net)).backward()
    assert_same(gradients(nested), gradients(plain))


@pytest.mark.parametrize("reentrant", KINDS, ids=NAMES)
def test_the_loss_is_that_of_the_last_forward_before_and_after_backward(reentrant):
    net, plain = model(reentrant), model(None)
    values = []
    for each in (plain, net):
        torch.manual_seed(2)
        out = each(tokens())
        before = selector_loss(each).item()
        (out.square().mean() + selector_loss(each)).backward()
        values += [before, selector_loss(each).item()]
    assert values[0] > 0
    assert values == [values[0]] * 4
    net.eval()(tokens())
    assert selector_loss(net).item() == 0.0


@pytest.mark.parametrize("reentrant", KINDS, ids=NAMES)
def test_a_loss_that_nobody_adds_trains_no_gate(reentrant):
    net = model(reentrant)
    net(tokens()).square().mean().backward()
    for name, gradient in gradients(net).items():
        assert (gradient is None) == ("gate" in name), name


def test_a_forward_without_gradients_tells_its_loss_and_gives_the_gate_none():
    net = model(None)
    torch.manual_seed(2)
    net(tokens())
    wanted = selector_loss(net).item()
    with torch.no_grad():
        torch.manual_seed(2)
        for layer in net:
            layer.attention.source.passes.count = 0
        net(tokens())
        assert not selector_loss(net).requires_grad
        assert selector_loss(net).item() == wanted
    selector_loss(net).backward()
    assert all(gradient is None for gradient in gradients(net).values())


def test_a_loss_that_comes_after_the_recomputation_is_an_error_and_not_lost():
    net = model(True)
    out = net(tokens())
    loss = selector_loss(net)
    out.square().mean().backward()
    with pytest.raises(RuntimeError, match="must be part of the loss of the same backward as the output"):
        loss.backward()


def test_a_checkpoint_that_does_not_restore_the_generator_is_an_error():
    net = model(True, preserve_rng_state=False)
    loss = net(tokens()).square().mean() + selector_loss(net)
    with pytest.raises(RuntimeError, match="preserve_rng_state=True"):
        loss.backward()


def test_a_layer_that_runs_without_gradients_gets_none_and_lets_the_others_train():
    net = model(None, 2)
    x = tokens()
    with torch.no_grad():
        x = net[0](x)
    (net[1](x).square().mean() + selector_loss(net)).backward()
    assert net[0].attention.source.gate.key.grad is None
    assert net[1].attention.source.gate.key.grad.abs().max() > 0


def test_the_output_may_be_written_to_as_any_other():
    net = BlockSparseAdaptive(num_heads=2, head_dim=16, block_size=8)
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    out = net(q, k, v)
    torch.testing.assert_close(out.mul_(2), 2 * net.eval()(q, k, v))


# ---- over processes and devices -------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified:UserWarning")
@pytest.mark.parametrize(
    ("options", "reentrant"),
    [(options, kind) for options in ({}, {"static_graph": True}) for kind in KINDS]
    + [({"find_unused_parameters": True}, kind) for kind in KINDS[:2]],  # DDP takes no reentrant checkpoint there
)
def test_ddp_trains_the_gate(process_group, options, reentrant):
    wanted, net = model(None), model(reentrant)
    wrapped = DistributedDataParallel(net, **options)
    for each, call in ((wanted, wanted), (net, wrapped)):
        for step in range(3):
            torch.manual_seed(step)
            (call(tokens(step)).square().mean() + selector_loss(each)).backward()
    assert_same(gradients(net), gradients(wanted))


def test_ddp_bears_a_loss_that_nobody_adds(process_group):
    net = model(None)
    wrapped = DistributedDataParallel(net, find_unused_parameters=True)
    for _ in range(2):
        wrapped(tokens()).square().mean().backward()


def test_copies_of_data_parallel_are_refused_in_training_and_serve_in_evaluation():
    source = BlockSparseAdaptive(num_heads=2, head_dim=16, block_size=8).source
    replica = source._replicate_for_data_parallel()
    replica._modules = dict(source._modules)
    q = torch.randn(1, 2, 40, 16)
    with pytest.raises(NotImplementedError, match=r"DataParallel trains copies .* selector_loss is lost"):
        replica.select(q, q)
    replica.training = False
    source.eval()
    assert replica.select(q, q).layout.digest() == source.select(q, q).layout.digest()


def test_ranks_of_a_ring_train_under_a_reentrant_checkpoint():
    pattern = {"name": "adaptive", "params": {"sample_rows": 3}}
    torch.manual_seed(0)
    given = BlockSparseDistributed(pattern=pattern, density=0.4, block_size=8, causal=True, num_heads=2, head_dim=16)
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(1, 2, 90, 16, generator=generator) for _ in range(3)]

    def work(communicator: Communicator, reentrant: bool | None) -> list[Tensor]:
        module = copy.deepcopy(given).bind(communicator)
        parts = [module.shard(x).requires_grad_() for x in whole]
        # Ranks are threads of one process here, which share a generator; processes have one each.
        module.source.passes._ticket = lambda: 5
        out = module(*parts) if reentrant is None else checkpoint(module, *parts, use_reentrant=reentrant)
        (out.square().sum() + 0.3 * module.source.selector_loss()).backward()
        return [x.grad for x in (*parts, *module.parameters())]

    wanted = run_ranks(2, lambda communicator: work(communicator, None))
    for reentrant in (False, True):
        for got, want in zip(run_ranks(2, lambda c, kind=reentrant: work(c, kind)), wanted, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


# ---- one selector, many threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_threads_that_share_a_selector_get_what_each_would_get_alone(method):
    net = BlockSparseAdaptive(num_heads=2, head_dim=16, block_size=8, density=0.3, method=method).eval()
    inputs = [[torch.randn(1, 2, 30 + 9 * i, 16) for _ in range(3)] for i in range(6)] * 4

    def serve(given: list[Tensor]) -> Tensor:
        with torch.inference_mode():
            return net(*given).clone()

    wanted = [serve(given) for given in inputs]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(serve, inputs))
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
