"""BlockSparseAdaptive: what it keeps, what each method's gradient is, and what it may never look at."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybsa import BlockSparseAdaptive, BlockSparseBase, BlockSparseMultihead, block_sparse_attention
from raybsa.selectors import selection
from raybsa.selectors.schedule import Schedule
from raybsa.variants.selector import METHODS, BlockSelector, selector_loss, step_schedules

LEARNED = [method for method in METHODS if method != "mean-pool"]


def make(method: str = "distill", **options: Any) -> BlockSparseAdaptive:
    given = {"density": 0.3, "block_size": 8, "causal": True, "num_kv_heads": 2, "method": method, "gate_dim": 8}
    return BlockSparseAdaptive(None, None, 4, 16, **{**given, **options}).double()


def inputs(tokens: int = 125, batch: int = 2, kv_tokens: int | None = None) -> list[Tensor]:
    shapes = [(4, tokens), (2, kv_tokens or tokens), (2, kv_tokens or tokens)]
    return [torch.randn(batch, heads, n, 16, dtype=torch.float64) for heads, n in shapes]


# ---- what it keeps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "kv_tokens"), [(125, 125), (128, 70), (60, 128)])
def test_the_density_is_exact_and_shared_evenly_by_the_rows_for_any_batch(method, causal, tokens, kv_tokens):
    model = make(method, causal=causal)
    for batch in (1, 3):
        q, k, _ = inputs(tokens, batch, kv_tokens)
        layout = model.source.select(q, k).layout
        layout.validate()
        assert layout.num_groups == batch * 4
        counts, allowed = layout.row_counts, layout.allowed_blocks
        assert (counts.sum(1) == round(0.3 * int(allowed.sum()))).all()
        assert (counts == counts[0]).all()
        assert counts.max() - counts[0][counts[0] < allowed].min() <= 1
        pairs = layout.to_dense().unflatten(0, (batch, 2, 2))
        assert torch.equal(pairs[:, :, 0], pairs[:, :, 1]), "query heads of a KV head share their blocks"


@pytest.mark.parametrize("method", METHODS)
def test_samples_of_a_batch_do_not_influence_each_other(method):
    model = make(method)
    q, k, v = inputs(batch=3)
    together = model(q, k, v)
    for i in range(3):
        alone = model(*(x[i : i + 1] for x in (q, k, v)))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_no_output_depends_on_a_later_token(method):
    model = make(method, density=0.25)
    q, k, v = inputs(96, 1)
    before = model(q, k, v)
    for token in (1, 40, 47, 48, 90):
        changed = [torch.cat([x[:, :, :token], 9 * torch.randn_like(x[:, :, token:])], 2) for x in (q, k, v)]
        torch.testing.assert_close(model(*changed)[:, :, :token], before[:, :, :token], rtol=1e-12, atol=1e-12)


def test_candidates_are_bounded_by_segments_and_rates():
    q, k, _ = inputs(128)
    bounded = BlockSparseAdaptive([32], [1], 4, 16, num_kv_heads=2, density=0.9, block_size=8, causal=True).double()
    rows, columns = bounded.source.select(q, k)[0].to_dense()[0].nonzero().unbind(1)
    assert torch.equal(rows // 4, columns // 4)


def test_without_a_bias_the_output_is_the_attention_over_the_chosen_blocks():
    model = make()
    q, k, v = inputs()
    layout, bias, *_ = model.source.select(q, k)
    assert bias is None
    torch.testing.assert_close(model(q, k, v), block_sparse_attention(q, k, v, layout, backend="reference"))


def test_with_all_blocks_kept_it_is_dense_attention():
    q, k, v = inputs()
    dense = BlockSparseBase(pattern="dense", block_size=8, causal=True)
    torch.testing.assert_close(make(density=1.0)(q, k, v), dense(q, k, v))


def test_a_cap_keeps_fewer_blocks_and_never_more():
    q, k, _ = inputs()
    full = make(density=0.5, method="mean-pool").source.select(q, k).layout
    capped = make(density=0.5, method="mean-pool", top_p=0.3).source.select(q, k).layout
    assert capped.nnz_blocks < full.nnz_blocks
    assert (capped | full).digest() == full.digest()


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("options", [{}, {"density": 1.0}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(method, options, causal):
    model = make(method, causal=causal, **options)
    (model(*inputs()).square().mean() + model.selector_loss()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad).abs().amax(-1).min() > 0, name


@pytest.mark.parametrize("method", ["bias", "compressed"])
def test_the_tasks_gradient_is_exact_for_the_blocks_chosen(method, monkeypatch):
    """Finite differences, with the choice held."""
    model = make(method, density=0.4)
    q, k, v = (x[:, :, :40].requires_grad_() for x in inputs(48, 1))
    frozen = selection.kept_columns(*model.source._compare(q, k), model.source._shape(40, 40, 0.4, q.device))
    monkeypatch.setattr("raybsa.selectors.choice.kept_columns", lambda *_: frozen)
    parameters = list(model.parameters())

    def loss(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        for parameter, value in zip(parameters, given, strict=True):
            parameter.data = value.data
        with torch.no_grad():
            return model(q, k, v).square().sum()

    leaves = [q, k, v, *parameters]
    found = torch.autograd.grad(model(q, k, v).square().sum(), leaves)
    here = [x.detach().clone() for x in leaves]
    for i, gradient in enumerate(found):
        way = torch.randn_like(gradient)
        ends = [[x + (sign * 1e-6 * way if j == i else 0) for j, x in enumerate(here)] for sign in (1, -1)]
        slope = (loss(*ends[0]) - loss(*ends[1])) / 2e-6
        torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-5, atol=1e-6)


def test_distillation_leaves_q_k_and_v_alone():
    model = make()
    q, k, v = (x.requires_grad_() for x in inputs())
    model(q, k, v)
    loss = model.selector_loss()
    assert loss.item() > 0
    assert all(grad is None for grad in torch.autograd.grad(loss, [q, k, v], allow_unused=True))


def test_what_is_distilled_is_zero_where_the_gate_is_the_attentions_own_mass():
    """One token a block, one head and a gate that multiplies q and k as they are: both are one softmax."""
    model = BlockSparseAdaptive(
        None, None, 1, 4, density=1.0, block_size=1, sinks=0, window=1, gate_dim=4, sample_rows=9, sharpness=1.0
    )
    gate = model.double().source.gate
    with torch.no_grad():
        gate.query.zero_()[0, 0, 0] = torch.eye(4) / 2
        gate.key.zero_()[0, 0] = torch.eye(4)
        gate.waves.zero_()
    q, k, v = (torch.randn(2, 1, 9, 4, dtype=torch.float64) for _ in range(3))
    for density in (1.0, 0.6):
        model.source.density = Schedule.constant(density)
        model(q, k, v)
        assert model.selector_loss().item() == pytest.approx(0.0, abs=1e-12)
    with torch.no_grad():
        gate.query.mul_(3)
    model(q, k, v)
    assert model.selector_loss().item() > 1e-3


def test_without_training_there_is_no_selector_loss():
    model = make()
    model.eval()(*inputs())
    assert model.selector_loss().item() == 0.0
    with torch.inference_mode():
        model.train()(*inputs())
    assert model.selector_loss().item() == 0.0
    assert make("bias").selector_loss().item() == 0.0


# ---- schedules and state --------------------------------------------------------------------------------------------


def test_training_is_dense_at_first_and_evaluation_never():
    model = make(warmup=2, anneal=0, density=0.25)
    q, k, v = inputs()
    dense = BlockSparseBase(pattern="dense", block_size=8, causal=True)(q, k, v)
    torch.testing.assert_close(model(q, k, v), dense)
    assert not torch.allclose(model.eval()(q, k, v), dense)
    for _ in range(2):
        model.step()
    assert model.train().source.select(q, k)[0].density < 0.3


def test_parameters_and_schedules_are_saved_and_loaded():
    model, other = make(warmup=3, anneal=4), make(warmup=3, anneal=4)
    for _ in range(5):
        model.step()
    assert {"source.gate.query", "source.density._extra_state"} <= model.state_dict().keys()
    other.load_state_dict(model.state_dict())
    assert other.source.density.value == model.source.density.value < 1.0
    tensors = inputs()
    assert torch.equal(other(*tensors), model(*tensors))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_made_in_the_middle_of_training_computes_the_same(copied, method):
    model, tensors = make(method), inputs()
    tensors[0].requires_grad_()
    (model(*tensors).sum() + model.selector_loss()).backward()
    assert torch.equal(copied(model)(*tensors), model(*tensors))


def test_a_models_selectors_are_found_wherever_they_are():
    model = nn.Sequential(make(warmup=5), nn.Sequential(make("bias")))
    model[0](*inputs())
    assert torch.equal(selector_loss(model), model[0].selector_loss())
    step_schedules(model)
    assert [m.count for m in model.modules() if isinstance(m, Schedule)] == [1, 1, 1, 1]
    assert selector_loss(nn.Linear(2, 2)) == 0.0


# ---- freezing -------------------------------------------------------------------------------------------------------


def test_frozen_it_is_a_pattern_like_any_other(tmp_path):
    model = make(causal=True)
    q, k, v = inputs(120, 3)
    layout = model.freeze(q, k)
    layout.validate()
    assert layout.num_groups == 4
    assert torch.equal(layout.row_counts[0], model.source.select(q, k)[0].row_counts[0])
    spec = model.freeze_to(str(tmp_path / "frozen.parquet"), q, k)
    fixed = BlockSparseBase(pattern=spec.to_dict(), block_size=8, causal=True)
    assert fixed.source.select(q, k)[0].digest() == layout.digest()
    torch.testing.assert_close(fixed(q, k, v), block_sparse_attention(q, k, v, layout))


def test_frozen_on_one_sample_it_keeps_what_that_sample_chose():
    model = make()
    q, k, _ = inputs(batch=1)
    assert model.freeze(q, k).digest() == model.source.select(q, k)[0].digest()


# ---- in other modules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_multihead_module_takes_it_as_its_pattern_and_trains_it(method):
    pattern = {"name": "adaptive", "params": {"method": method}}
    model = BlockSparseMultihead(32, 4, batch_first=True, pattern=pattern, density=0.3, block_size=8, causal=True)
    assert isinstance(model.source, BlockSelector)
    x = torch.randn(2, 70, 32)
    out, weights = model(x, x, x)
    (out.square().mean() + selector_loss(model)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.source.parameters())
    layout = model.source.select(*(model._to_heads(y) for y in model._project(x, x, x)[:2])).layout
    assert weights is not None
    assert layout.density < 0.4


def test_masks_and_segments_reach_attention_and_target():
    model = make()
    q, k, v = inputs(64)
    ids = torch.arange(64).expand(2, -1) // 32
    out = model(q, k, v, segment_ids=(ids, ids))
    later = model(*(x[:, :, 32:] for x in (q, k, v)), segment_ids=(ids[:, 32:], ids[:, 32:]))
    assert out.shape == q.shape
    assert later.shape == q[:, :, 32:].shape
    mask = torch.rand(1, 1, 64, 64) < 0.9
    assert model(q, k, v, attn_mask=mask).isfinite().all()
    assert model.selector_loss().isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_scores_stay_in_float32(dtype):
    model = make().float()
    q, k, v = (x.float() for x in inputs())
    with torch.autocast("cpu", dtype):
        out = model(q, k, v)
        loss = model.selector_loss()
        chosen = model.source.select(q, k).layout
    assert torch.equal(chosen.col_indices, model.source.select(q, k)[0].col_indices)
    assert out.dtype == dtype
    assert loss.dtype == torch.float32
    loss.backward()


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, r"method must be one of \['distill', 'bias', 'compressed', 'mean-pool'\], got 'magic'"),
        ({"density": 0.0}, r"density must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"sample_rows": 0}, "sample_rows must be an integer >= 1, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments_say_what_was_wanted_and_what_came(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_two_lists_go_together_and_heads_are_needed():
    with pytest.raises(ValueError, match="go together, got only segment_lengths"):
        BlockSparseAdaptive([64], None, 4, 16)
    with pytest.raises(ValueError, match="got None and None"):
        BlockSparseAdaptive([64], [1])


def test_tensors_of_other_heads_are_refused():
    q, *_ = inputs()
    with pytest.raises(ValueError, match=r"the selector is for k \(B, 2, S, 16\), got \(2, 4, 125, 16\)"):
        make()(q, q, q)
