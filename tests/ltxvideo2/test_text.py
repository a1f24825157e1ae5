"""Captions: the records are those of diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import LTX2Pipeline
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextModel,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextModel,
)

from tuner.errors import CheckpointError
from tuner.interfaces.encoders import Record
from tuner.interfaces.family import Variant
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.loading import build_part
from tuner_ltxvideo2.text import TextEncoder, without_progress
from tuner_ltxvideo2.tiny import TEXT_LENGTH, TinyPaths
from tuner_ltxvideo2.variants import variant_of

CPU = torch.device("cpu")
CAPTIONS = ["  a red ball rolls over green grass \n", "", "rain falls outside the window; soft music"]


def whole_gemma(tiny: TinyPaths) -> Gemma3ForConditionalGeneration | Gemma4UnifiedForConditionalGeneration:
    """The tiny language model inside the class that the pipeline expects, with head and image tower."""
    if AutoConfig.from_pretrained(tiny.text_encoder).model_type == "gemma4_unified_text":
        newer = Gemma4UnifiedTextModel.from_pretrained(tiny.text_encoder, dtype=torch.float32)
        pictures = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 8, "output_proj_dims": 32}
        config = Gemma4UnifiedConfig(text_config=newer.config.to_dict(), vision_config=pictures, audio_config={"audio_embed_dim": 16})
        unified = Gemma4UnifiedForConditionalGeneration(config)
        unified.model.language_model.load_state_dict(newer.state_dict())
        return unified.eval()
    text = Gemma3TextModel.from_pretrained(tiny.text_encoder, dtype=torch.float32)
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4))
    whole.model.language_model.load_state_dict(text.state_dict())
    return whole.eval()


def pipeline_records(tiny: TinyPaths, source: WeightSource, variant: Variant, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    """What diffusers' pipeline makes of `captions`: `encode_prompt`, then the connectors."""
    with without_progress():
        gemma = whole_gemma(tiny)
    pipeline = LTX2Pipeline.__new__(LTX2Pipeline)  # only the two text components are needed; the constructor wants all
    pipeline.__dict__["text_encoder"] = gemma
    pipeline.__dict__["tokenizer"] = AutoTokenizer.from_pretrained(tiny.text_encoder)
    embeds, mask, _, _ = pipeline.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH, device=CPU, dtype=torch.float32
    )
    connectors = build_part(source, "connectors", variant, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        video, audio, all_ones = connectors(embeds, mask, padding_side="left")
    assert bool((all_ones == 1).all())
    return [{"video": v, "audio": a} for v, a in zip(video, audio, strict=True)]


def encoded(encoder: TextEncoder, captions: list[str]) -> list[Record]:
    encoder.load(CPU)
    try:
        return encoder.encode(captions)
    finally:
        encoder.unload()


def test_equal_to_the_pipeline(tiny: TinyPaths, tiny_source: WeightSource, tiny_variant: Variant) -> None:
    records = encoded(TextEncoder(tiny_source, tiny_variant, torch.float32), CAPTIONS)
    for record, expected in zip(records, pipeline_records(tiny, tiny_source, tiny_variant, CAPTIONS), strict=True):
        assert record.tensors.keys() == expected.keys()
        for stream, tensor in record.tensors.items():
            # layer by layer in place of all at once: sums over a layer come in another order, in the last bit of float32
            torch.testing.assert_close(tensor, expected[stream], atol=2e-6, rtol=2e-6)


def test_one_by_one_equals_together(source20: WeightSource) -> None:
    encoder = TextEncoder(source20, variant_of(source20), torch.float32)
    together = encoded(encoder, CAPTIONS)
    for caption, record in zip(CAPTIONS, together, strict=True):
        alone = encoded(encoder, [caption])[0]
        # matrix products of another batch size may round differently
        torch.testing.assert_close(alone.tensors["video"], record.tensors["video"], atol=1e-5, rtol=1e-5)


def test_records_have_the_runs_dtype_and_width(tiny_source: WeightSource, tiny_variant: Variant) -> None:
    record = encoded(TextEncoder(tiny_source, tiny_variant, torch.bfloat16), ["a dog barks"])[0]
    widths = (32, 32) if tiny_variant.name == "2.0" else (192, 160)
    assert [tuple(record.tensors[s].shape) for s in ("video", "audio")] == [(TEXT_LENGTH, width) for width in widths]
    assert {tensor.dtype for tensor in record.tensors.values()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in record.tensors.values())


def test_a_caption_that_is_too_long_says_so(tiny20: TinyPaths, source20: WeightSource) -> None:
    caption = "birds sing " * 60
    length = len(AutoTokenizer.from_pretrained(tiny20.text_encoder)(caption.strip()).input_ids)
    assert length > TEXT_LENGTH
    records = encoded(TextEncoder(source20, variant_of(source20), torch.float32), [caption, "birds sing"])
    assert records[0].facts["truncated_tokens"] == str(length - TEXT_LENGTH)
    assert records[0].facts["tokens"] == str(TEXT_LENGTH)
    assert records[1].facts["truncated_tokens"] == "0"


def test_settings_follow_weights_and_dtype(tiny20: TinyPaths, source20: WeightSource, tmp_path: Path) -> None:
    variant = variant_of(source20)
    plain = TextEncoder(source20, variant, torch.float32).settings()
    assert plain == TextEncoder(source20, variant, torch.float32, tiny20.text_encoder).settings()
    assert plain != TextEncoder(source20, variant, torch.bfloat16).settings()
    model = Gemma3TextModel.from_pretrained(tiny20.text_encoder)
    with without_progress():
        model.norm.weight.data.add_(1)
        model.embed_tokens.weight.data.mul_(2)
        model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny20.text_encoder).save_pretrained(tmp_path)
    assert TextEncoder(source20, variant, torch.float32, tmp_path).settings()["text_encoder"] != plain["text_encoder"]


@pytest.mark.parametrize("kind", ["conditional", "causal", "nested"])
def test_every_saved_layout_gives_the_same_records(kind: str, tiny20: TinyPaths, source20: WeightSource, tmp_path: Path) -> None:
    with without_progress():
        whole = whole_gemma(tiny20)
        if kind == "causal":
            causal = Gemma3ForCausalLM(whole.config.text_config)
            causal.model.load_state_dict(whole.model.language_model.state_dict())
            causal.save_pretrained(tmp_path)
        else:
            whole.save_pretrained(tmp_path / "text_encoder" if kind == "nested" else tmp_path, max_shard_size=40_000)
    AutoTokenizer.from_pretrained(tiny20.text_encoder).save_pretrained(tmp_path / "tokenizer" if kind == "nested" else tmp_path)
    variant = variant_of(source20)
    expected = encoded(TextEncoder(source20, variant, torch.float32), CAPTIONS[:1])[0]
    found = encoded(TextEncoder(source20, variant, torch.float32, tmp_path), CAPTIONS[:1])[0]
    assert torch.equal(found.tensors["video"], expected.tensors["video"])


def test_missing_weights_of_the_text_encoder_are_named(tiny20: TinyPaths, source20: WeightSource, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny20.text_encoder / name).read_bytes())
    tensors = load_file(tiny20.text_encoder / "model.safetensors")
    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        TextEncoder(source20, variant_of(source20), torch.float32, tmp_path).load(CPU)
