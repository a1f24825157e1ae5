"""Names of weights: the published checkpoints' own and diffusers', one to one, in both directions.

Special here: names are compared segment by segment (between dots), never by substring. That makes every rule its own inverse's
inverse: no rule can hit part of another rule's name, which `adaln_single` inside `av_ca_video_scale_shift_adaln_single` would.
Module names (without `.weight`) convert by the same rules.

A part is one of `PARTS`. Original names are relative to the part: the prefix of the combined file is taken off by `split_original`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

PARTS: Final = ("transformer", "connectors", "vae", "audio_vae", "vocoder")
"""Networks that a combined checkpoint holds, in the order in which they are listed to people."""

_CONNECTOR_HEADS: Final = ("video_embeddings_connector", "audio_embeddings_connector")
_PROJECTION_HEAD: Final = "text_embedding_projection"
CONNECTOR_PREFIXES: Final = tuple(f"{head}." for head in _CONNECTOR_HEADS)
PROJECTION_PREFIX: Final = _PROJECTION_HEAD + "."
"""Of the connectors' first layers, which LTX-2.5 publishes in the text encoder's file."""
TRANSFORMER_PREFIX: Final = "model.diffusion_model."
DIFFUSION_DECODER: Final = "vae.decoder.t_embedder.mlp.0.weight"
"""A key that only a video VAE with a diffusion decoder has (2.5); its encoder is the convolutional VAE's."""

# Original segment -> diffusers segment.
_SEGMENTS: Final[Mapping[str, Mapping[str, str]]] = {
    "transformer": {
        "patchify_proj": "proj_in",
        "audio_patchify_proj": "audio_proj_in",
        "adaln_single": "time_embed",
        "audio_adaln_single": "audio_time_embed",
        "prompt_adaln_single": "prompt_adaln",
        "audio_prompt_adaln_single": "audio_prompt_adaln",
        "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
        "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
        "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
        "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
        "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
        "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
        "q_norm": "norm_q",
        "k_norm": "norm_k",
    },
    "connectors": {
        "video_embeddings_connector": "video_connector",
        "audio_embeddings_connector": "audio_connector",
        "transformer_1d_blocks": "transformer_blocks",
        "q_norm": "norm_q",
        "k_norm": "norm_k",
    },
    "vae": {"res_blocks": "resnets"},
    "audio_vae": {},
    "vocoder": {"ups": "upsamplers", "resblocks": "resnets", "conv_pre": "conv_in", "conv_post": "conv_out", "act_post": "act_out"},
}
# Original leading segments -> diffusers leading segments, longest first where one begins another.
_HEADS: Final[Mapping[str, Mapping[str, str]]] = {
    "transformer": {},
    "connectors": {
        "text_embedding_projection.aggregate_embed": "text_proj_in",
        "text_embedding_projection.video_aggregate_embed": "video_text_proj_in",
        "text_embedding_projection.audio_aggregate_embed": "audio_text_proj_in",
    },
    # The published encoder counts blocks and samplers in one list: even places are blocks, odd ones the sampler between them, and
    # the last block is diffusers' mid block. 32x in space and 8x in time always makes four samplers, so the mid block is place 8.
    "vae": {
        "per_channel_statistics.mean-of-means": "latents_mean",
        "per_channel_statistics.std-of-means": "latents_std",
        "encoder.down_blocks.8": "encoder.mid_block",
        **{f"encoder.down_blocks.{2 * i}": f"encoder.down_blocks.{i}" for i in range(4)},
        **{f"encoder.down_blocks.{2 * i + 1}": f"encoder.down_blocks.{i}.downsamplers.0" for i in range(4)},
        "decoder.up_blocks.0": "decoder.mid_block",
        **{f"decoder.up_blocks.{2 * i + 1}": f"decoder.up_blocks.{i}.upsamplers.0" for i in range(4)},
        **{f"decoder.up_blocks.{2 * i + 2}": f"decoder.up_blocks.{i}" for i in range(4)},
    },
    "audio_vae": {
        "per_channel_statistics.mean-of-means": "latents_mean",
        "per_channel_statistics.std-of-means": "latents_std",
    },
    "vocoder": {},
}
_SEGMENTS_BACK: Final = {part: {new: old for old, new in rules.items()} for part, rules in _SEGMENTS.items()}
_HEADS_BACK: Final = {part: {new: old for old, new in rules.items()} for part, rules in _HEADS.items()}
# Statistics that nothing reads: published beside the mean and the deviation that latents are normalised with.
_UNREAD: Final = (
    "per_channel_statistics.channel",
    "per_channel_statistics.mean-of-stds",
    "per_channel_statistics.mean-of-stds_over_std-of-means",
)


def is_unread(key: str) -> bool:
    """Whether a key of a published file belongs to a network that is known, and that nothing here reads.

    `duration_head` (2.5) suggests a length for a prompt; training and sampling are told theirs.
    """
    return key.startswith("duration_head.")


def split_original(key: str) -> tuple[str, str] | None:
    """Part and part-relative name of a key of a combined file; None for a key that belongs to no known part."""
    if key.startswith(TRANSFORMER_PREFIX):
        name = key.removeprefix(TRANSFORMER_PREFIX)
        part = "connectors" if name.split(".", 1)[0] in (*_CONNECTOR_HEADS, _PROJECTION_HEAD) else "transformer"
        return part, name
    head, _, name = key.partition(".")
    if head == _PROJECTION_HEAD:
        return "connectors", key
    return (head, name) if head in ("vae", "audio_vae", "vocoder") and name else None


def join_original(part: str, name: str) -> str:
    """The key in a combined file of the part-relative original `name`: the inverse of `split_original`."""
    if part == "transformer" or (part == "connectors" and not name.startswith(_PROJECTION_HEAD + ".")):
        return TRANSFORMER_PREFIX + name
    return name if part == "connectors" else f"{part}.{name}"


def to_diffusers(part: str, original: str) -> str | None:
    """diffusers' name of a part-relative original name; None for statistics that are known and not used."""
    if part in ("vae", "audio_vae") and original in _UNREAD:
        return None
    name = _replace_segments(_replace_head(original, _HEADS[part]), _SEGMENTS[part])
    return name.replace("downsample.lowpass.", "downsample.") if part == "vocoder" else name


def to_original(part: str, name: str) -> str:
    """The part-relative original name of diffusers' `name`."""
    if part == "vocoder":  # only the low-pass filter of an activation is a module of its own there
        name = name.replace(".downsample.", ".downsample.lowpass.")
    return _replace_segments(_replace_head(name, _HEADS_BACK[part]), _SEGMENTS_BACK[part])


def _replace_head(name: str, rules: Mapping[str, str]) -> str:
    """Replaces the longest rule that `name` begins with, whole segments only."""
    segments = name.split(".")
    for length in range(min(len(segments), 5), 0, -1):
        head = ".".join(segments[:length])
        if head in rules:
            return ".".join([rules[head], *segments[length:]])
    return name


def _replace_segments(name: str, rules: Mapping[str, str]) -> str:
    return ".".join(rules.get(segment, segment) for segment in name.split("."))
