"""Transformers models over raybsa: with every block they are SDPA's, with fewer SDPA's under a mask of the layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raybsa import block_sparse_attention
from raybsa.tasks.capture import load_calls
from raybsa.variants.hf import HFAttention, register
from raybsa.variants.selector import BlockSelector
from raybsa.variants.source import FixedPattern

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'raybsa[hf]'")

TOKENS = 93  # no multiple of a block
CODE = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text(), re.DOTALL
)


def fixed(pattern: Any, *, causal: bool = True, density: float | None = None) -> FixedPattern:
    return FixedPattern(pattern, density=density, block_size=16, causal=causal)


WINDOW = {"name": "sliding_window", "params": {"window": 20}}


def llama(implementation: str) -> Any:
    """Two layers of four heads that share two KV heads; the same weights each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # so that attention is not flat
        attn_implementation=implementation,
    )
    return transformers.LlamaForCausalLM(config)


def tokens(length: int = TOKENS) -> Tensor:
    return torch.randint(32, (2, length), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> Tensor:
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, slice(0, 7) if side == "left" else slice(TOKENS - 7, TOKENS)] = 0
    return mask


def assert_same(ours: Any, theirs: Any, ours_asked: dict[str, Any], theirs_asked: dict[str, Any]) -> None:
    """Equal logits and gradients where ``counts`` says that a token does."""
    logits = []
    for model, asked in ((ours, ours_asked), (theirs, theirs_asked)):
        counts = asked.pop("counts")
        logits.append(model(**asked).logits * counts[..., None])
        logits[-1].square().sum().backward()
    assert_close("logits", *logits)
    for (name, found), (_, wanted) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert_close(name, found.grad, wanted.grad)


def assert_close(name: str, found: Tensor, wanted: Tensor) -> None:
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    assert error < 1e-5, f"{name}: relative error {error:.1e}, budget 1e-5"


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_llama_with_every_block_has_the_logits_and_gradients_of_sdpa_padded_or_not(side: str | None) -> None:
    register(fixed("dense"), "raybsa-dense")
    mask = None if side is None else padding(side)
    counts = torch.ones(2, TOKENS) if mask is None else mask.float()
    asked = {"input_ids": tokens(), "attention_mask": mask, "counts": counts}
    assert_same(llama("raybsa-dense"), llama("sdpa"), dict(asked), dict(asked))


def test_packed_sequences_see_only_their_own_as_with_sdpa() -> None:
    register(fixed("dense"), "raybsa-dense")
    positions = torch.cat([torch.arange(20), torch.arange(TOKENS - 20)]).expand(2, -1)
    asked = {"input_ids": tokens(), "position_ids": positions, "use_cache": False, "counts": torch.ones(2, TOKENS)}
    assert_same(llama("raybsa-dense"), llama("sdpa"), dict(asked), dict(asked))


@pytest.mark.parametrize("pattern", ["bigbird", {"name": "random", "params": {"seed": 3}}, WINDOW])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_sparse_llama_equals_sdpa_with_the_layouts_as_its_dense_mask(pattern: Any, side: str | None) -> None:
    """Each sequence has the layout of its own length, from its own first token on."""
    source = fixed(pattern, density=None if pattern is WINDOW else 0.6)
    register(source, "raybsa-sparse")
    keys = torch.ones(2, TOKENS, dtype=torch.int64) if side is None else padding(side)
    mask = torch.zeros(2, 4, TOKENS, TOKENS, dtype=torch.bool)
    for sample, own in enumerate(keys.bool()):
        length = int(own.sum())
        layout = source.layout(length, length, 4, torch.device("cpu"))
        assert layout.density < 0.9
        blocks = layout.to_dense().repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :length, :length]
        first = int(own.int().argmax())
        mask[sample, :, first : first + length, first : first + length] = blocks.tril()
    dense = {"input_ids": tokens(), "attention_mask": mask, "counts": keys}
    ours = {"input_ids": tokens(), "attention_mask": keys, "counts": keys}
    assert_same(llama("raybsa-sparse"), llama("sdpa"), ours, dense)


def test_a_whole_float_mask_of_ones_own_is_added_as_sdpa_adds_it() -> None:
    register(fixed("dense"), "raybsa-dense")
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    bias = torch.randn(2, 4, TOKENS, TOKENS).masked_fill(later, torch.finfo(torch.float32).min)
    asked = {"input_ids": tokens(), "attention_mask": bias, "counts": torch.ones(2, TOKENS)}
    assert_same(llama("raybsa-dense"), llama("sdpa"), dict(asked), dict(asked))


def test_an_encoder_with_padding_equals_sdpa() -> None:
    register(fixed("dense", causal=False), "raybsa-both-ways")
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}

    def bert(name: str) -> Any:
        torch.manual_seed(0)
        config = transformers.BertConfig(num_attention_heads=4, attn_implementation=name, **sizes)
        return transformers.BertModel(config).eval()

    mask = padding("right")
    found, wanted = (bert(name)(tokens(), attention_mask=mask)[0] for name in ("raybsa-both-ways", "sdpa"))
    assert_close("states", found[mask.bool()], wanted[mask.bool()])


def test_each_layer_attends_by_its_own_source() -> None:
    sources = [fixed("random", density=0.4), fixed(WINDOW)]
    attention = HFAttention(sources, by_layer=True, backend="auto")
    q, k, v = torch.randn(2, 4, TOKENS, 8), torch.randn(2, 2, TOKENS, 8), torch.randn(2, 2, TOKENS, 8)
    for layer, source in zip(llama("sdpa").model.layers, sources, strict=True):
        found, _ = attention(layer.self_attn, q, k, v)
        wanted = block_sparse_attention(q, k, v, source.select(q, k)[0], backend="reference")
        assert_close("out", found, wanted.transpose(1, 2))
    layer.self_attn.layer_idx = 2
    with pytest.raises(ValueError, match="2 in all, got a call of layer 2"):
        attention(layer.self_attn, q, k, v)


def test_generation_with_a_cache_is_that_of_sdpa_also_with_padding() -> None:
    register(fixed("dense"), "raybsa-dense")
    asked = {"attention_mask": padding("left"), "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    found, wanted = (llama(name).eval().generate(tokens(), **asked) for name in ("raybsa-dense", "sdpa"))
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("piece", [1, 11, 16])
def test_a_cache_filled_piece_by_piece_ends_with_the_logits_of_the_whole(piece: int) -> None:
    """The window's rows do not depend on the length."""
    register(fixed(WINDOW), "raybsa-window")
    model, ids = llama("raybsa-window").eval(), tokens()
    with torch.inference_mode():
        wanted, cache, found = model(ids).logits, transformers.DynamicCache(config=model.config), []
        for part in (ids[:, :13], *ids[:, 13:].split(piece, 1)):
            found.append(model(part, past_key_values=cache).logits)
    assert_close("logits", torch.cat(found, 1), wanted)


def test_what_would_be_other_mathematics_is_refused() -> None:
    register(fixed("dense"), "raybsa-dense")
    model, ids = llama("raybsa-dense").eval(), tokens()
    prefix = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    with pytest.raises(ValueError, match="shows later keys"):
        model(ids, attention_mask=prefix)
    with pytest.raises(NotImplementedError, match="keys 0 to 120 for queries 0 to 93"):
        model(ids, past_key_values=transformers.StaticCache(config=model.config, max_cache_len=120))
    with pytest.raises(NotImplementedError, match="no softcap"):
        model.model.layers[0].self_attn(
            torch.randn(2, TOKENS, 32), (torch.ones(1, TOKENS, 8), torch.zeros(1, TOKENS, 8)), softcap=30.0
        )
    with pytest.raises(ValueError, match="at least one source"):
        register([])
    room = torch.zeros(1, 1, 3, 50, dtype=torch.bool)
    room[..., :3] = torch.ones(3, 3, dtype=torch.bool).tril()
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 50, 8)
    with pytest.raises(ValueError, match="no cache with room ahead"):
        HFAttention([fixed("dense")], by_layer=False, backend="auto")(model.model.layers[0].self_attn, q, k, k, room)


def test_a_learned_source_does_not_decode_from_a_cache() -> None:
    selector = BlockSelector(4, 8, num_kv_heads=2, block_size=16, causal=True)
    register(selector, "raybsa-one-learned")
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        llama("raybsa-one-learned").eval().generate(tokens(), max_new_tokens=2, pad_token_id=0)


def test_the_document_s_code_runs_and_trains_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = {"model": llama("sdpa"), "input_ids": tokens(), "attention_mask": padding("right")}
    for block in CODE:
        exec(compile(block, "huggingface.md", "exec"), scope)
    model = scope["model"]
    assert len(model.selectors) == 2
    assert all(parameter.grad is not None for parameter in model.parameters())
    calls = load_calls("qkv.pt")
    assert [tuple(call.q.shape) for call in calls] == [(2, 4, TOKENS, 8)] * 2
    assert all(call.causal and call.k.shape[1] == 2 for call in calls)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("side", [None, "left"])
def test_a_compiled_llama_is_one_graph_with_the_same_logits(side: str | None) -> None:
    register(fixed(WINDOW), "raybsa-compiled")
    model, asked = llama("raybsa-compiled"), {"input_ids": tokens(), "use_cache": False}
    if side is not None:
        asked["attention_mask"] = padding(side)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=side is None)
    with torch.no_grad():
        assert_close("logits", compiled(**asked).logits, model(**asked).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_still_refuses_what_its_causal_source_cannot_show() -> None:
    register(fixed(WINDOW), "raybsa-compiled")
    torch.compiler.reset()
    compiled = torch.compile(llama("raybsa-compiled"), backend="aot_eager", fullgraph=True)
    everything = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shows later keys"):
        compiled(input_ids=tokens(), attention_mask=everything, use_cache=False)
