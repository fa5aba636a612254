"""A learned selection on a GPU: the CPU's choice, and nothing read back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from raybsa import BlockSparseAdaptive
from raybsa.variants.selector import METHODS

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the GPU raises."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def make(method: str, tokens: int, dtype: torch.dtype) -> tuple[BlockSparseAdaptive, list[torch.Tensor]]:
    model = BlockSparseAdaptive(None, None, 8, 64, num_kv_heads=4, density=0.1, causal=True, method=method)
    shapes = [(2, heads, tokens, 64) for heads in (8, 4, 4)]
    return model, [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")  # torch's, once a process
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [2048, 2000])
def test_a_forward_makes_the_host_wait_for_nothing(method, tokens, no_sync):
    model, inputs = make(method, tokens, torch.bfloat16)
    model, inputs = model.cuda().eval(), [x.cuda() for x in inputs]
    with torch.no_grad():
        wanted = model(*inputs)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        found = [model(*inputs) for _ in range(2)]
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, wanted) for x in found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_choice_is_the_cpus(method, causal):
    model, (q, k, _) = make(method, 2000, torch.float32)
    model.eval()
    on_cpu = model.source.select(q, k).layout
    on_gpu = model.cuda().source.select(q.cuda(), k.cuda()).layout
    kept, wanted = on_gpu.to("cpu").to_dense(), on_cpu.to_dense()
    assert torch.equal(on_gpu.row_counts.cpu(), on_cpu.row_counts)
    assert (kept != wanted).sum() <= 1e-3 * wanted.sum(), "only near ties may fall otherwise"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("as_mask", [False, True], ids=["segments", "mask"])
def test_under_masks_the_choice_is_the_cpus_and_nothing_hidden_comes_through(method, causal, as_mask):
    _, tensors = make(method, 2000, torch.float32)
    model = BlockSparseAdaptive(None, None, 8, 64, num_kv_heads=4, density=0.1, causal=causal, method=method).eval()
    ids = (torch.arange(2000) >= 777).int().expand(2, -1)
    same = (ids[:, :, None] == ids[:, None])[:, None]
    on_cpu = model.source.select(*tensors[:2], *((same, None) if as_mask else (None, (ids, ids)))).layout.to_dense()
    model, tensors, ids, same = model.cuda(), [x.cuda() for x in tensors], ids.cuda(), same.cuda()
    masks = {"attn_mask": same} if as_mask else {"segment_ids": (ids, ids)}
    kept = model.source.select(*tensors[:2], **masks).layout.to("cpu").to_dense()
    assert (kept != on_cpu).sum() <= 1e-3 * on_cpu.sum(), "only near ties may fall otherwise"
    others = [x + 100 * torch.randn_like(x) * (ids == 0)[:, None, :, None] for x in tensors]
    with torch.no_grad():
        assert torch.equal(model(*tensors, **masks)[:, :, 777:], model(*others, **masks)[:, :, 777:])


@pytest.mark.parametrize("method", [method for method in METHODS if method != "mean-pool"])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_gradients_are_the_cpus(method, density):
    model, inputs = make(method, 512, torch.float32)
    model.source.density.start = model.source.density.end = density
    grads = {}
    for device in ("cpu", "cuda"):
        model.zero_grad()
        model.to(device)
        model.source.passes.count = 0
        (model(*(x.to(device) for x in inputs)).square().mean() + model.selector_loss()).backward()
        grads[device] = [p.grad.cpu().clone() for p in model.parameters()]
    for got, want in zip(grads["cuda"], grads["cpu"], strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))


def test_a_compiled_model_computes_the_same():
    model, inputs = make("distill", 1024, torch.bfloat16)
    model, inputs = model.cuda().eval(), [x.cuda() for x in inputs]
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(*inputs), model(*inputs), rtol=2e-2, atol=2e-2)
