"""Which LTX-2 a checkpoint is, and the arguments that diffusers' classes are built with: always the checkpoint's own.

Special here: shapes are trusted before words. What tensor shapes tell (layers, channels, samplers) is read from the headers; the
configuration in the file's metadata gives what shapes cannot tell (heads, rotary layout, multipliers). diffusers' class defaults
are used for nothing that a released checkpoint sets otherwise: they rotate interleaved, released weights are split.

Nothing here imports torch: the flavours are shown by commands that load nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tuner.errors import CheckpointError
from tuner_ltxvideo2.headers import Headers, count_of, shape_of

if TYPE_CHECKING:
    from tuner.interfaces.family import Variant
    from tuner.interfaces.services import WeightSource

FAMILY: Final = "ltxvideo2"


@dataclass(frozen=True)
class Flavour:
    """A published checkpoint."""

    repository: str
    """Hub repository; empty: none is needed."""
    filename: str
    """Pattern (as in a shell) of the file in that repository that holds the transformer."""
    note: str
    """One line for people."""
    distilled: bool = False
    """Made to sample in 8 steps without guidance."""
    text_encoder: str = "Lightricks/LTX-2"
    """Hub repository with folders `text_encoder` and `tokenizer`; empty: `companions` brings it. 2.0 and 2.3 read the same Gemma 3."""
    companions: tuple[str, ...] = ()
    """Patterns of the other files, one of each, where the networks are published in several files; the first that fits is taken."""
    folder: str = ""
    """In a repository in diffusers' layout with several transformers: the folder of this one."""


_LTX25: Final = "Lightricks/LTX-2.5"
# The convolutional decoder is diffusers' own; the diffusion decoder's file holds the same encoder and no decoder that is built here.
_LTX25_FILES: Final = ("vae/*video-vae-conv*.safetensors", "vae/*audio-vae*.safetensors", "text_encoders/gemma4*-bf16.safetensors")

FLAVOURS: Final[Mapping[str, Flavour]] = {
    "dev": Flavour("Lightricks/LTX-2", "ltx-2-19b-dev.safetensors", "LTX-2.0, 19 B, bf16"),
    "dev-fp8": Flavour("Lightricks/LTX-2", "ltx-2-19b-dev-fp8.safetensors", "LTX-2.0, stored in 8 bits: a smaller download"),
    "dev-fp4": Flavour("Lightricks/LTX-2", "ltx-2-19b-dev-fp4.safetensors", "LTX-2.0, stored in 4 bits (NVFP4): the smallest download"),
    "distilled": Flavour("Lightricks/LTX-2", "ltx-2-19b-distilled.safetensors", "LTX-2.0 distilled to 8 steps, bf16", distilled=True),
    "distilled-fp8": Flavour(
        "Lightricks/LTX-2", "ltx-2-19b-distilled-fp8.safetensors", "LTX-2.0 distilled to 8 steps, stored in 8 bits", distilled=True
    ),
    "2.3-dev": Flavour("Lightricks/LTX-2.3", "ltx-2.3-22b-dev.safetensors", "LTX-2.3, bf16"),
    # Republished as -1.1: the last name in order is the newest.
    "2.3-distilled": Flavour(
        "Lightricks/LTX-2.3", "ltx-2.3-22b-distilled*.safetensors", "LTX-2.3 distilled to 8 steps, bf16", distilled=True
    ),
    "2.5-dev": Flavour(
        _LTX25, "diffusion_models/ltx-2.5-22b-dev-transformer-bf16.safetensors", "LTX-2.5, bf16, in four files",
        text_encoder="", companions=_LTX25_FILES, folder="transformer_full",
    ),
    "2.5-distilled": Flavour(
        _LTX25, "diffusion_models/ltx-2.5-22b-distilled-transformer-bf16.safetensors", "LTX-2.5 distilled to 8 steps, bf16, in four files",
        distilled=True, text_encoder="", companions=_LTX25_FILES,
    ),
    "tiny": Flavour("", "", "the same architecture with four small random blocks, written into the cache folder; for trying things out"),
    "tiny-2.3": Flavour("", "", "the small random model in the architecture of 2.3"),
    "tiny-2.5": Flavour("", "", "the small random model in the architecture of 2.5"),
}  # fmt: skip
DEFAULT_FLAVOUR: Final = "dev"

DISTILLED_STEPS: Final = 8


def sampling_defaults(distilled: bool) -> dict[str, float]:
    """Values that take the place of the validation keys' defaults: a distilled model samples in 8 steps without guidance."""
    return {"validation_num_inference_steps": DISTILLED_STEPS, "validation_guidance": 1.0} if distilled else {}


# What the released 2.0 file says; used only for a file without a word about itself whose shapes are exactly those of the release.
_RELEASED: Final[Mapping[str, Any]] = {
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "caption_channels": 3840,
    "rope_type": "split",
    "frequencies_precision": "float64",
    "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000.0,
    "connector_attention_head_dim": 128,
    "connector_num_learnable_registers": 128,
    "connector_positional_embedding_max_pos": [4096],
}


def variant_of(source: WeightSource) -> Variant:
    """The variant of an opened checkpoint. Raises `CheckpointError`."""
    from tuner_ltxvideo2.keys import PARTS

    present = [part for part in source.parts() if part in PARTS]
    return detect(source.metadata(), {part: source.headers(part) for part in present})


def detect(metadata: Mapping[str, object], headers: Mapping[str, Headers]) -> Variant:
    """The variant, from a checkpoint's configuration (part -> config, as stored) and headers (part -> diffusers' name -> header).

    Parts stored in diffusers' layout bring diffusers' own arguments, which are taken as they are.
    Raises `CheckpointError` where neither configuration nor shapes tell enough.
    """
    from tuner.interfaces.family import Variant
    from tuner_ltxvideo2 import autoencoders

    if "transformer" not in headers:
        raise CheckpointError(
            "the checkpoint holds no transformer", value=sorted(headers), remedy="give the file that holds the whole model"
        )
    version = _version(metadata, headers["transformer"])
    original = _table(metadata, "transformer")
    if str(original.get("_class_name", "")) not in _DIFFUSERS_CLASSES:
        original = _released_or(original, headers["transformer"])
    config: dict[str, Mapping[str, object]] = {}
    for part in headers:
        own = _table(metadata, part)
        if str(own.get("_class_name", "")) in _DIFFUSERS_CLASSES:
            config[part] = {key: value for key, value in own.items() if not key.startswith("_")}
        elif part == "transformer":
            config[part] = _transformer(original, headers[part])
        elif part == "connectors":
            config[part] = _connectors(original, headers[part])
        else:
            config[part] = autoencoders.DERIVATIONS[part](own, headers[part], version)
    return Variant(FAMILY, version, config)


_DIFFUSERS_CLASSES: Final = frozenset({
    "LTX2VideoTransformer3DModel", "LTX2TextConnectors", "AutoencoderKLLTX2Video", "AutoencoderKLLTX2Audio",
    "LTX2Vocoder", "LTX2VocoderWithBWE",
})  # fmt: skip


def _table(metadata: Mapping[str, object], part: str) -> Mapping[str, Any]:
    found = metadata.get(part)
    return found if isinstance(found, Mapping) else {}


def _version(metadata: Mapping[str, object], headers: Headers) -> str:
    """The name of the variant: what the metadata says of a version, else what the transformer is made of."""
    config = _table(metadata, "transformer")
    feed_forward = "transformer_blocks.0.ff.net.2"
    newest = (
        str(metadata.get("model_version", "")).startswith("2.5"),
        f"{feed_forward}.weight" in headers and f"{feed_forward}.bias" not in headers,
        config.get("ff_bias") is False,
        KEYFRAMES in headers or bool(config.get("use_keyframes_abs_pos_embedding")),
    )
    if any(newest):
        return "2.5"
    gated = config.get("apply_gated_attention") or config.get("gated_attn") or "transformer_blocks.0.attn1.to_gate_logits.weight" in headers
    return "2.3" if gated or "prompt_adaln.linear.weight" in headers else "2.0"


KEYFRAMES: Final = "keyframes_abs_pos_embedding"
"""What 2.5 adds to tokens that stand for a single frame."""


def check_decoder(variant: Variant) -> None:
    """Raises `CheckpointError` where the video VAE's decoder is not one that pictures can be made with here."""
    if variant.config.get("vae", {}).get("encoder_only"):
        raise CheckpointError(
            "the video VAE's file holds the diffusion decoder, which is not supported: training works, making samples does not",
            where="vae", remedy="put ltx-2.5-video-vae-conv-bf16.safetensors beside it, or set validation_disable",
        )  # fmt: skip


def _released_or(config: Mapping[str, Any], headers: Headers) -> Mapping[str, Any]:
    """`config`, or the released values where the file says nothing and is of exactly the released size."""
    if "num_attention_heads" in config:
        return config
    widths = tuple(shape_of(headers, name)[0] for name in ("proj_in.weight", "audio_proj_in.weight"))
    if widths != (4096, 2048):
        raise CheckpointError(
            "the file has no configuration in its metadata and is not of a released size, so its attention heads are unknown",
            where="metadata 'config'",
            value=f"width {widths[0]} and {widths[1]}",
            remedy="use a file with its metadata, or a folder in the diffusers layout",
        )
    return {**_RELEASED, **config}


def _transformer(config: Mapping[str, Any], headers: Headers) -> dict[str, object]:
    """Arguments of `LTX2VideoTransformer3DModel`."""
    video_max = list(config.get("positional_embedding_max_pos", (20, 2048, 2048)))
    modulated = shape_of(headers, "transformer_blocks.0.scale_shift_table")[0] == 9
    gated = "transformer_blocks.0.attn1.to_gate_logits.weight" in headers
    return {
        "in_channels": shape_of(headers, "proj_in.weight")[1],
        "out_channels": shape_of(headers, "proj_out.weight")[0],
        "num_attention_heads": config["num_attention_heads"],
        "attention_head_dim": config["attention_head_dim"],
        "cross_attention_dim": shape_of(headers, "transformer_blocks.0.attn2.to_k.weight")[1],
        "audio_in_channels": shape_of(headers, "audio_proj_in.weight")[1],
        "audio_out_channels": shape_of(headers, "audio_proj_out.weight")[0],
        "audio_num_attention_heads": config["audio_num_attention_heads"],
        "audio_attention_head_dim": config["audio_attention_head_dim"],
        "audio_cross_attention_dim": shape_of(headers, "transformer_blocks.0.audio_attn2.to_k.weight")[1],
        "num_layers": count_of(headers, "transformer_blocks"),
        "activation_fn": config.get("activation_fn", "gelu-approximate"),
        "norm_elementwise_affine": bool(config.get("norm_elementwise_affine", False)),
        "norm_eps": config.get("norm_eps", 1e-6),
        "caption_channels": config.get("caption_channels", 3840),
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in headers,
        "rope_theta": config.get("positional_embedding_theta", 10000.0),
        "rope_double_precision": config.get("frequencies_precision") == "float64",
        "rope_type": config.get("rope_type", "interleaved"),
        "pos_embed_max_pos": video_max[0],
        "base_height": video_max[1],
        "base_width": video_max[2],
        "audio_pos_embed_max_pos": config.get("audio_positional_embedding_max_pos", (20,))[0],
        "timestep_scale_multiplier": config.get("timestep_scale_multiplier", 1000),
        "cross_attn_timestep_scale_multiplier": config.get("av_ca_timestep_scale_multiplier", 1),
        "gated_attn": gated,
        "audio_gated_attn": gated,
        "ff_bias": "transformer_blocks.0.ff.net.2.bias" in headers,
        "audio_ff_bias": "transformer_blocks.0.audio_ff.net.2.bias" in headers,
        "use_keyframes_abs_pos_embedding": KEYFRAMES in headers,
        "cross_attn_mod": modulated,
        "audio_cross_attn_mod": modulated,
        "use_prompt_adaln_single": not modulated or "prompt_adaln.linear.weight" in headers,
        "use_prompt_embeddings": "caption_projection.linear_1.weight" in headers,
    }


def _connectors(config: Mapping[str, Any], headers: Headers) -> dict[str, object]:
    """Arguments of `LTX2TextConnectors`; its configuration stands in the transformer's."""
    caption = config.get("caption_channels", 3840)
    split = "video_text_proj_in.weight" in headers
    projection = "video_text_proj_in" if split else "text_proj_in"
    arguments: dict[str, object] = {
        "caption_channels": caption,
        "text_proj_in_factor": shape_of(headers, f"{projection}.weight")[1] // caption,
        "connector_rope_base_seq_len": config.get("connector_positional_embedding_max_pos", (4096,))[0],
        "rope_theta": config.get("positional_embedding_theta", 10000.0),
        "rope_double_precision": config.get("frequencies_precision") == "float64",
        "rope_type": config.get("rope_type", "interleaved"),
        "per_modality_projections": split,
        "proj_bias": f"{projection}.bias" in headers,
    }
    if split:
        arguments |= {f"{stream}_hidden_dim": shape_of(headers, f"{stream}_text_proj_in.weight")[0] for stream in ("video", "audio")}
    widths = {s: shape_of(headers, f"{s}_connector.transformer_blocks.0.attn1.to_q.weight")[0] for s in ("video", "audio")}
    head_dim = int(config.get("connector_attention_head_dim", 128))
    # The audio connector has the video connector's number of heads: of the same width (2.0) or narrower (2.3).
    audio_head_dim = int(config.get("audio_connector_attention_head_dim", widths["audio"] * head_dim // widths["video"]))
    for stream, own_head_dim in (("video", head_dim), ("audio", audio_head_dim)):
        registers = headers.get(f"{stream}_connector.learnable_registers")
        arguments |= {
            f"{stream}_connector_num_attention_heads": widths[stream] // own_head_dim,
            f"{stream}_connector_attention_head_dim": own_head_dim,
            f"{stream}_connector_num_layers": count_of(headers, f"{stream}_connector.transformer_blocks"),
            f"{stream}_connector_num_learnable_registers": registers.shape[0] if registers else None,
            f"{stream}_gated_attn": f"{stream}_connector.transformer_blocks.0.attn1.to_gate_logits.weight" in headers,
        }
    return arguments
