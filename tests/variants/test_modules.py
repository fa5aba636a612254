"""The variants as nn.Modules: copies, files, threads, processes and mixed precision."""

import copy
import io
import pickle
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from raybsa.variants.base import BlockSparseBase
from raybsa.variants.multihead import BlockSparseMultihead


def multihead(**options) -> BlockSparseMultihead:
    return BlockSparseMultihead(
        16, 4, batch_first=True, pattern="bigbird", density=0.5, block_size=8, causal=True, **options
    )


def call(module: nn.Module, batch: int = 2) -> torch.Tensor:
    """The output on a fixed input of the module's kind."""
    generator = torch.Generator().manual_seed(7)
    if isinstance(module, BlockSparseBase):
        q, k, v = torch.randn(3, batch, 4, 40, 8, generator=generator).unbind()
        return module(q, k, v)
    x = torch.randn(batch, 40, 16, generator=generator)
    return module(x, x, x, need_weights=False)[0]


MODULES = {
    "base": lambda: BlockSparseBase([16, 32], [1, 2], block_size=8),
    "multihead": multihead,
}


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch_save": saved_and_loaded,
}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_a_copy_computes_the_same_and_stands_alone(make, copied, used):
    module = make()
    if used:
        call(module)
    other = copied(module)
    assert torch.equal(call(other), call(module))
    assert repr(other) == repr(module)
    assert other.source is not module.source


def test_a_used_module_pickles_to_the_size_of_a_fresh_one():
    module = MODULES["base"]()
    fresh = len(pickle.dumps(module))
    module(*torch.randn(3, 1, 4, 4096, 8).unbind())
    assert len(pickle.dumps(module)) == fresh


def test_the_state_dict_loads_with_weights_only():
    module, file = multihead(), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = multihead()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(call(other), call(module))


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_data_parallel_gives_what_the_module_gives(make):
    module = make()
    wanted = call(module)
    if isinstance(module, BlockSparseBase):
        got = nn.DataParallel(module)(*torch.randn(3, 2, 4, 40, 8, generator=torch.Generator().manual_seed(7)).unbind())
    else:
        x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(7))
        got = nn.DataParallel(module)(x, x, x, need_weights=False)[0]
    assert torch.equal(got, wanted)


def replica(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes for one device: plain tensors in the place of parameters."""
    made = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        made._modules[name] = replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            made._parameters[name] = None
        else:
            setattr(made, name, parameter.clone())
    return made


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_replicas_in_threads_share_one_layout_and_agree(make, monkeypatch):
    module, outputs = make(), []
    builds, build = [], type(module.source.rule).layout
    monkeypatch.setattr(type(module.source.rule), "layout", lambda *a, **k: builds.append(1) or build(*a, **k))
    threads = [
        threading.Thread(target=lambda made: outputs.append(call(made).detach()), args=(replica(module),))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(outputs) == 4
    assert len(builds) == 1
    wanted = call(module)
    for got in outputs:
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    try:
        torch.manual_seed(0)
        module = multihead()
        x = torch.randn(4, 40, 16)[2 * rank : 2 * rank + 2]
        parallel = DistributedDataParallel(module)
        parallel(x, x, x, need_weights=False)[0].square().mean().backward()
        torch.save({name: p.grad for name, p in module.named_parameters()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.timeout(60)
def test_two_ddp_processes_give_the_gradients_of_one(tmp_path):
    torch.manual_seed(0)
    module = multihead()
    x = torch.randn(4, 40, 16)
    module(x, x, x, need_weights=False)[0].square().mean().backward()
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    for rank in range(2):
        grads = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(
                grads[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_multihead_under_autocast_stays_close_to_float32_and_trains():
    module = multihead(add_bias_kv=True)
    wanted = call(module)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(module)
        assert got.dtype == torch.bfloat16
        x = torch.randn(2, 40, 16)
        weights = module(x, x, x)[1]
    torch.testing.assert_close(got.float(), wanted, rtol=0.0, atol=0.02)
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(2, 40), rtol=0.0, atol=0.02)
    got.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_checkpointing_draws_the_same_dropout_again(extras, reentrant):
    module = multihead(dropout=0.4, add_bias_kv=extras, add_zero_attn=extras)
    x = torch.randn(2, 40, 16, requires_grad=True)
    results = []
    for run in (module, lambda *a, **k: checkpoint(module, *a, use_reentrant=reentrant, **k)):
        module.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        out = run(x, x, x, None, False)[0]
        out.square().sum().backward()
        results.append([out.detach(), x.grad.clone(), *(p.grad.clone() for p in module.parameters())])
    for again, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-6)


def test_a_scaled_step_equals_a_plain_one_and_one_with_inf_is_skipped():
    modules = [multihead() for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    plain, scaled = (torch.optim.SGD(m.parameters(), lr=0.1) for m in modules)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    call(modules[0]).square().sum().backward()
    plain.step()
    scaler.scale(call(modules[1]).square().sum()).backward()
    scaler.step(scaled)
    scaler.update()
    for got, wanted in zip(modules[1].parameters(), modules[0].parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    before = [p.detach().clone() for p in modules[1].parameters()]
    scaled.zero_grad()
    (scaler.scale(call(modules[1]).sum()) * float("inf")).backward()
    scaler.step(scaled)
    assert all(torch.equal(p, b) for p, b in zip(modules[1].parameters(), before, strict=True))
