"""Families of transformers: served as asked, or refused by name before a first loss; padding changes no sequence.

All of them are tried by ``python -m tests.variants.hf_families``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybsa.spec import AttentionSpec, PatternSpec
from raybsa.variants.hf import register
from raybsa.variants.selector import BlockSelector
from raybsa.variants.source import FixedPattern
from raybsa.variants.swap import swap_attention

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'raybsa[hf]'")

from tests.variants import hf_families  # noqa: E402
from tests.variants.hf_tiny import tiny  # noqa: E402

WINDOW = {"name": "sliding_window", "params": {"window": 12}}
TOKENS, PADDED, NEW = 40, 7, 9


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    hf_families.register_both()
    with hf_families.Counted.counting():
        yield


def config_of(family: str) -> Any:
    return tiny(transformers.models.auto.configuration_auto.CONFIG_MAPPING[family])


def model_of(cls: str, family: str, name: str, **changes: Any) -> Any:
    config = config_of(family)
    for key, value in changes.items():
        setattr(config, key, value)
    model = hf_families.build(getattr(transformers, cls), config, name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize(
    ("cls", "family"),
    [
        ("GPT2LMHeadModel", "gpt2"),
        ("GemmaForCausalLM", "gemma"),
        ("DeepseekV3ForCausalLM", "deepseek_v3"),  # values of another width
        ("BertForMaskedLM", "bert"),
        ("LayoutLMModel", "layoutlm"),  # makes its mask itself, and says nothing of causality
        ("BigBirdPegasusForCausalLM", "bigbird_pegasus"),  # its layers say they are not causal, its mask is
        ("BartForConditionalGeneration", "bart"),
        ("T5ForConditionalGeneration", "t5"),
        ("ViTModel", "vit"),
    ],
)
def test_a_family_computes_over_all_blocks_what_it_does_with_eager_padded_or_not(cls: str, family: str) -> None:
    assert hf_families.verdict(getattr(transformers, cls), config_of(family)) == ("served", "")


@pytest.mark.parametrize(
    ("cls", "family", "why"),
    [
        ("BloomForCausalLM", "bloom", "do not ask"),
        ("XGLMForCausalLM", "xglm", "do not ask"),
        ("CodeGenForCausalLM", "codegen", "do not ask"),
        ("MptForCausalLM", "mpt", "do not ask"),
        ("FalconForCausalLM", "falcon", "do not ask"),
        ("GPTJForCausalLM", "gptj", "do not ask"),
        ("GitForCausalLM", "git", "a table of their own"),
        ("SiglipVisionModel", "siglip_vision_model", r"head.attention \(MultiheadAttention\) attends by itself"),
        ("GptOssForCausalLM", "gpt_oss", r"layers.0.self_attn \(GptOssAttention\): raybsa serves no s_aux"),
        ("Gemma2ForCausalLM", "gemma2", r"layers.0.self_attn \(Gemma2Attention\): raybsa serves no softcap"),
    ],
)
def test_a_family_that_cannot_attend_as_asked_is_refused_by_name_before_its_first_outcome(
    cls: str, family: str, why: str
) -> None:
    def run() -> None:
        hf_families.build(getattr(transformers, cls), config_of(family), "raybsa-all")(input_ids=tokens())

    with pytest.raises(NotImplementedError, match=why):
        run()


def test_a_model_that_cannot_be_set_to_our_name_stays_what_it_was() -> None:
    bloom, siglip = model_of("BloomForCausalLM", "bloom", "eager"), model_of("SiglipModel", "siglip", "sdpa")
    with pytest.raises(NotImplementedError, match=r"BloomForCausalLM: .* does not ask"):
        bloom.set_attn_implementation("raybsa-all")
    with pytest.raises(NotImplementedError, match="MultiheadAttention"):
        siglip.set_attn_implementation("raybsa-all")
    assert bloom.config._attn_implementation == "eager"
    assert siglip.vision_model.config._attn_implementation == siglip.config._attn_implementation == "sdpa"
    siglip.set_attn_implementation({"text_config": "raybsa-all", "vision_config": "sdpa"})
    assert siglip.text_model.config._attn_implementation == "raybsa-all"


class Mixer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(-1, -2), -1) @ x


class Mixing(transformers.LlamaModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mixer = Mixer()
        self.post_init()


def test_a_layer_of_one_s_own_that_attends_by_hand_is_found() -> None:
    with pytest.raises(
        NotImplementedError, match=r"Mixing: .* its mixer \(Mixer\) attends by itself, by softmax and @"
    ):
        hf_families.build(Mixing, config_of("llama"), "raybsa-all")


def test_a_swap_beside_attention_that_is_written_out_is_refused_by_name() -> None:
    model = model_of("BigBirdPegasusModel", "bigbird_pegasus", "eager")
    for layer in model.decoder.layers:
        layer.self_attn.config = model_of("LlamaModel", "llama", "sdpa").config
    with pytest.raises(NotImplementedError, match=r"encoder.layers.0.self_attn.self.: .* would stay dense beside"):
        swap_attention(model, [AttentionSpec(pattern=PatternSpec("dense"))], lambda: model(tokens(), use_cache=False))


def tokens(length: int = TOKENS) -> Tensor:
    return torch.randint(5, 70, (2, length), generator=torch.Generator().manual_seed(1))


def in_padding(ids: Tensor, side: str) -> dict[str, Tensor]:
    """The first sequence alone, and beside it the second one without its last tokens, padded."""
    mask = torch.ones_like(ids)
    mask[1, slice(0, PADDED) if side == "left" else slice(TOKENS - PADDED, TOKENS)] = 0
    own = ids[1, : TOKENS - PADDED]
    rest = torch.zeros(PADDED, dtype=ids.dtype)
    row = torch.cat([rest, own] if side == "left" else [own, rest])
    return {"input_ids": torch.stack([ids[0], row]), "attention_mask": mask}


@pytest.mark.parametrize("pattern", [WINDOW, "bigbird"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("cls", "family", "changes"),
    [
        ("LlamaForCausalLM", "llama", {}),
        ("MistralForCausalLM", "mistral", {"sliding_window": 20}),
        ("BertModel", "bert", {}),
        ("T5EncoderModel", "t5", {}),
    ],
)
def test_a_sequence_in_a_padded_batch_is_what_it_is_alone(
    cls: str, family: str, changes: dict[str, Any], side: str, pattern: Any
) -> None:
    density = 0.5 if pattern == "bigbird" else None
    register(FixedPattern(pattern, density=density, block_size=8, causal=True), "raybsa-padded")
    model, ids = model_of(cls, family, "raybsa-padded", **changes), tokens()
    given = in_padding(ids, side)
    if family != "t5":
        given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found, alone = model(**given)[0], model(ids[1:, : TOKENS - PADDED])[0]
    torch.testing.assert_close(found[1][given["attention_mask"][1].bool()], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_a_padded_batch_are_those_of_its_sequences_alone(side: str) -> None:
    register(FixedPattern("bigbird", density=0.5, block_size=8, causal=True), "raybsa-padded")
    ids = tokens()
    found, wanted = (model_of("LlamaForCausalLM", "llama", "raybsa-padded") for _ in range(2))
    given = in_padding(ids, side)
    counts = given["attention_mask"].bool()
    found(**given, position_ids=(given["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits[counts].sum().backward()
    (wanted(ids[:1]).logits.sum() + wanted(ids[1:, : TOKENS - PADDED]).logits.sum()).backward()
    for ours, theirs in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("cls", "family", "side", "changes"),
    [
        ("LlamaForCausalLM", "llama", "left", {"num_key_value_heads": 2}),
        ("MistralForCausalLM", "mistral", "left", {"sliding_window": 100}),
        ("BartForConditionalGeneration", "bart", "right", {}),  # its own positions count padding
        ("T5ForConditionalGeneration", "t5", "left", {"decoder_start_token_id": 0}),
    ],
)
def test_a_padded_batch_continues_with_a_cache_as_its_sequences_do_without(
    cls: str, family: str, side: str, changes: dict[str, Any]
) -> None:
    register(FixedPattern(WINDOW, block_size=8, causal=True), "raybsa-decoding", cross_attention="dense")
    model, ids = model_of(cls, family, "raybsa-decoding", **changes), tokens()
    rest = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    both = model.generate(**in_padding(ids, side), **rest)[:, -NEW:]
    for row, own in zip(both, (ids[:1], ids[1:, : TOKENS - PADDED]), strict=True):
        alone = model.generate(own, attention_mask=torch.ones_like(own), use_cache=False, **rest)[0, -NEW:]
        assert row.tolist() == alone.tolist()


def test_a_rule_over_one_sequence_does_not_say_what_cross_attention_keeps() -> None:
    register(FixedPattern(WINDOW, block_size=8, causal=True), "raybsa-window")
    model, ids = model_of("BartModel", "bart", "raybsa-window"), tokens()
    for other in (ids, ids[:, :9]):  # as long as the encoder's, and shorter
        with pytest.raises(NotImplementedError, match=r"decoder.layers.0.encoder_attn \(BartAttention\): .*'dense'"):
            model(input_ids=ids, decoder_input_ids=other)
    with pytest.raises(ValueError, match="cross_attention must be None or 'dense', got 'sparse'"):
        register(FixedPattern(WINDOW, causal=True), cross_attention="sparse")


def test_a_learned_source_is_not_made_to_look_both_ways() -> None:
    register(BlockSelector(4, 8, block_size=8, causal=True), "raybsa-learned-one")
    with pytest.raises(ValueError, match="causal=False, so must the source: got True"):
        model_of("BertModel", "bert", "raybsa-learned-one")(tokens())


def test_a_bias_of_positions_gets_the_gradient_that_it_gets_with_eager() -> None:
    start = {"decoder_start_token_id": 0}
    found, wanted = (model_of("T5ForConditionalGeneration", "t5", name, **start) for name in ("raybsa-all", "eager"))
    for model in (found, wanted):
        given = in_padding(tokens(), "left")
        model(**given, labels=tokens(9)).loss.backward()
    for (name, ours), theirs in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_a_model_that_reads_the_mask_itself_is_refused_padding() -> None:
    model = model_of("DogeForCausalLM", "doge", "raybsa-all")
    model(tokens())
    with pytest.raises(NotImplementedError, match="without padding was wanted, as this model itself reads the mask"):
        model(**in_padding(tokens(), "left"))
