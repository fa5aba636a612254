"""The subject ``adaptive``: a learned pattern has no single right choice, but properties. What is hidden from a token
changes no bit of its output and no gradient; and the output is attention over the blocks that were chosen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from raybsa import BlockSparseAdaptive
from tests.fuzzing import inputs, layouts, oracle
from tests.fuzzing.case import Case

OPTIONS: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.6},
    "sinks": {"sinks": 1},
    "window": {"window": 2},
    "cap": {"max_blocks": 3},
    "segmented": {"segment_lengths": [32, 64], "dilation_rates": [1, 2]},
}


def faults(case: Case) -> str:
    """What is wrong with a learned module; nothing where it is right."""
    model, xs, masks = make(case), tensors(case), _masks(case)
    return "; ".join(
        x for x in (_hidden_comes_through(case, model, xs, masks), _is_not_attention(case, model, xs, masks)) if x
    )


def make(case: Case) -> BlockSparseAdaptive:
    """The module, its gate far from its start."""
    torch.manual_seed(case.seed)
    options = {"num_kv_heads": case.kv_heads, "density": case.density or 0.35, "block_size": case.q_block}
    options |= {"causal": case.causal, "backend": case.backend, "gate_dim": 8, "scale": case.scale}
    for extra in case.extras[1:]:
        options |= OPTIONS.get(extra, {})
    method = case.extras[0] if case.extras else "mean-pool"
    model = BlockSparseAdaptive(num_heads=case.heads, head_dim=case.head_dim, method=method, **options)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(case.device)


def tensors(case: Case) -> list[Tensor]:
    shapes = [(case.heads, case.q_len), (case.kv_heads, case.kv_len), (case.kv_heads, case.kv_len)]
    found = [inputs.normal(case, (case.batch, h, n, case.head_dim), i) for i, (h, n) in enumerate(shapes)]
    return [x.to(case.device, inputs.dtype_of(case.dtype)).requires_grad_() for x in found]


def _masks(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if case.mask != "none":
        found["attn_mask"] = inputs.mask(case)
    ids = inputs.segment_ids(case)
    if ids is not None:
        found["segment_ids"] = ids
    return found


def _seen(case: Case, masks: dict[str, Any]) -> Tensor:
    """(B, H, Sq, Skv) bool by causality and masks."""
    found = torch.ones(case.batch, case.heads, case.q_len, case.kv_len, dtype=torch.bool)
    found = found.tril() if case.causal else found
    found = found.to(case.device)
    if "attn_mask" in masks:
        mask = masks["attn_mask"]
        found = found & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min)
    if "segment_ids" in masks:
        q_ids, kv_ids = masks["segment_ids"]
        found = found & (q_ids[:, None, :, None] == kv_ids[:, None, None, :])
    return found


def _hidden_comes_through(case: Case, model: BlockSparseAdaptive, xs: list[Tensor], masks: dict[str, Any]) -> str:
    sees, out = _seen(case, masks).any(1), model(*xs, **masks)
    sample, token = case.seed % case.batch, case.seed // 7 % case.q_len
    keys = ~sees[sample, token]
    queries = (
        keys.clone() if case.q_len == case.kv_len else torch.zeros(case.q_len, dtype=torch.bool, device=keys.device)
    )
    if "segment_ids" in masks:
        ids = masks["segment_ids"][0][sample]
        queries |= ids != ids[token]
    queries[token] = False
    hidden = (queries, keys, keys)
    others = [_changed(x, sample, some) for x, some in zip(xs, hidden, strict=True)]
    with torch.no_grad():
        if not torch.equal(model(*others, **masks)[sample, :, token], out[sample, :, token]):
            return f"what is hidden from token {token} of sample {sample} changes its output"
    grads = torch.autograd.grad(out[sample, :, token].square().sum(), xs, allow_unused=True)
    for name, grad, some in zip("qkv", grads, hidden, strict=True):
        if grad is not None and (grad[sample][:, some].any() or not grad.isfinite().all()):
            return f"token {token} of sample {sample} has a gradient by {name} of what is hidden from it"
    return ""


def _changed(x: Tensor, sample: int, tokens: Tensor) -> Tensor:
    """``x`` with these tokens of a sample far off, and all of the other samples'."""
    off = x.detach() + 100 * torch.randn_like(x)
    off[sample] = torch.where(tokens[:, None], off[sample], x.detach()[sample])
    return off


def _is_not_attention(case: Case, model: BlockSparseAdaptive, xs: list[Tensor], masks: dict[str, Any]) -> str:
    if case.has("compressed"):
        return ""
    model.eval()
    with torch.no_grad():
        found = model.source.select(xs[0], xs[1], masks.get("attn_mask"), masks.get("segment_ids"))
        seen, added = layouts.seen(case, found.layout) & _seen(case, masks), None
        if found.block_bias is not None:
            added = layouts.bias_of_tokens(case, found.layout, found.block_bias.double())
        mask = masks.get("attn_mask")
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.double().expand(seen.shape)
            added = mask if added is None else added + mask
        wide = [x.double() for x in xs]
        scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
        wanted, _, _ = oracle.attend(*wide, seen, scale=scale, added=added)
        error = (model(*xs, **masks).double() - wanted).abs().max().item()
    budget = 64 * torch.finfo(inputs.dtype_of(case.dtype)).eps * max(1.0, wanted.abs().max().item())
    return "" if error <= budget else f"the output is off by {error:.3g} from attention over its choice"
