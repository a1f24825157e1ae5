"""Names: one to one on every key of the tiny and the real models, and the same as diffusers' own conversion where it has one."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ltx2_audio_vae_to_diffusers,
    convert_ltx2_transformer_to_diffusers,
    convert_ltx2_vae_to_diffusers,
)

from ltxvideo2.ltx2_published import modules
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.keys import PARTS, join_original, split_original, to_diffusers, to_original

PAIRS = {
    "transformer": {
        "patchify_proj.weight": "proj_in.weight",
        "adaln_single.emb.timestep_embedder.linear_1.bias": "time_embed.emb.timestep_embedder.linear_1.bias",
        "av_ca_a2v_gate_adaln_single.linear.weight": "av_cross_attn_video_a2v_gate.linear.weight",
        "transformer_blocks.3.audio_attn2.k_norm.weight": "transformer_blocks.3.audio_attn2.norm_k.weight",
        "transformer_blocks.3.scale_shift_table_a2v_ca_audio": "transformer_blocks.3.audio_a2v_cross_attn_scale_shift_table",
        "transformer_blocks.0.attn1.to_out.0": "transformer_blocks.0.attn1.to_out.0",
    },
    "connectors": {
        "text_embedding_projection.aggregate_embed.weight": "text_proj_in.weight",
        "text_embedding_projection.audio_aggregate_embed.bias": "audio_text_proj_in.bias",
        "video_embeddings_connector.transformer_1d_blocks.1.attn1.q_norm.bias": "video_connector.transformer_blocks.1.attn1.norm_q.bias",
    },
    "vae": {
        "encoder.down_blocks.8.res_blocks.1.conv1.conv.weight": "encoder.mid_block.resnets.1.conv1.conv.weight",
        "encoder.down_blocks.3.conv.conv.bias": "encoder.down_blocks.1.downsamplers.0.conv.conv.bias",
        "decoder.up_blocks.7.conv.conv.weight": "decoder.up_blocks.3.upsamplers.0.conv.conv.weight",
        "decoder.up_blocks.0.res_blocks.4.conv2.conv.weight": "decoder.mid_block.resnets.4.conv2.conv.weight",
        "per_channel_statistics.std-of-means": "latents_std",
    },
    "vocoder": {
        "vocoder.ups.2.weight": "vocoder.upsamplers.2.weight",
        "vocoder.resblocks.0.acts1.1.downsample.lowpass.filter": "vocoder.resnets.0.acts1.1.downsample.filter",
        "bwe_generator.act_post.act.alpha": "bwe_generator.act_out.act.alpha",
        "conv_post.bias": "conv_out.bias",
    },
}


@pytest.mark.parametrize(("part", "original"), [(part, original) for part, pairs in PAIRS.items() for original in pairs])
def test_known_pairs(part: str, original: str) -> None:
    assert to_diffusers(part, original) == PAIRS[part][original]
    assert to_original(part, PAIRS[part][original]) == original


def assert_one_to_one(part: str, names: list[str]) -> None:
    originals = [to_original(part, name) for name in names]
    assert len(set(originals)) == len(names)
    assert [to_diffusers(part, original) for original in originals] == names
    assert [split_original(join_original(part, original)) for original in originals] == [(part, original) for original in originals]


@pytest.mark.parametrize("release", ["2.0", "2.3", "2.5"])
@pytest.mark.parametrize("part", PARTS)
def test_one_to_one_at_real_size(release: str, part: str) -> None:
    module = modules(release)[part]
    assert_one_to_one(part, list(module.state_dict()))
    # modules convert by the same rules
    if part == "transformer":
        assert_one_to_one(part, [name for name, _ in module.named_modules() if name])


def test_one_to_one_on_the_tiny_model(tiny_source: WeightSource) -> None:
    for part in tiny_source.parts():
        assert_one_to_one(part, list(tiny_source.headers(part)))


@pytest.mark.parametrize(
    ("part", "convert"),
    [
        ("transformer", convert_ltx2_transformer_to_diffusers),
        ("vae", convert_ltx2_vae_to_diffusers),
        ("audio_vae", convert_ltx2_audio_vae_to_diffusers),
    ],
)
def test_same_as_diffusers_own_conversion_of_2_0(part: str, convert: object) -> None:
    names = list(modules("2.0")[part].state_dict())
    # each tensor carries its place, so that a swap of two names would show
    originals = {join_original(part, to_original(part, name)): torch.tensor(index) for index, name in enumerate(names)}
    converted = convert(originals)  # type: ignore[operator]
    assert {name: int(value) for name, value in converted.items()} == {name: index for index, name in enumerate(names)}


def test_unread_statistics_are_known() -> None:
    for part in ("vae", "audio_vae"):
        for name in ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means"):
            assert to_diffusers(part, f"per_channel_statistics.{name}") is None


def test_foreign_keys_belong_to_no_part() -> None:
    assert split_original("first_stage_model.encoder.conv_in.weight") is None
    assert split_original("vae") is None
