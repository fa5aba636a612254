"""A learned pattern in a model of transformers: padding does not reach the logits, and checkpoints train the gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybsa.variants.hf import register
from raybsa.variants.selector import METHODS, BlockSelector, selector_loss

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'raybsa[hf]'")


def llama(name: str, method: str = "distill") -> Any:
    """Two layers of four heads that share two KV heads, with a selector each; the same weights each time."""
    torch.manual_seed(0)
    options = {"num_kv_heads": 2, "block_size": 16, "causal": True, "density": 0.4, "method": method}
    selectors = nn.ModuleList(BlockSelector(4, 8, **options) for _ in range(2))
    register(selectors, name)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        attn_implementation=name,
    )
    model = transformers.LlamaForCausalLM(config)
    model.selectors = selectors
    return model


def gradients(kind: bool | None) -> dict[str, Tensor]:
    model = llama(f"raybsa-checkpoint-{kind}").train()
    if kind is not None:
        model.gradient_checkpointing_enable({"use_reentrant": kind})
        model.enable_input_require_grads()
    ids = torch.randint(32, (2, 93), generator=torch.Generator().manual_seed(1))
    for step in range(2):
        torch.manual_seed(step)
        (model(input_ids=ids, labels=ids, use_cache=False).loss + 0.5 * selector_loss(model)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the name that models of transformers 4 have too
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit_of_a_gradient(reentrant):
    wanted, found = gradients(None), gradients(reentrant)
    assert any("selectors" in name for name in wanted)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_bit_of_the_other_tokens_logits(method, side):
    model = llama(f"raybsa-padded-{method}", method).eval()
    mask = torch.ones(2, 93, dtype=torch.int64)
    mask[0, slice(0, 39) if side == "left" else slice(54, 93)] = 0
    ids = torch.randint(32, (2, 93), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = (
            model(input_ids=torch.where(mask.bool(), ids, pad), attention_mask=mask, use_cache=False).logits
            for pad in (0, 31)
        )
    assert torch.equal(found[mask.bool()], wanted[mask.bool()])
