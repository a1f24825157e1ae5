"""The tiny flavour: LTX-2's own architecture at toy size, random from a seed, in the published file layout.

Special here: everything that a run reads is real, only small. Names, prefixes and the configuration in the metadata are those of a
published file; the text encoder is a Gemma with a tokenizer trained on the spot; the latents' statistics are measured on made
clips, so that normalised latents have about unit variance. Video latents keep 128 channels, packed sound 128 features.

Weights are stored in bfloat16 as in the published files, statistics in float32.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import Gemma3TextConfig, Gemma4UnifiedTextConfig, PreTrainedTokenizerFast
from transformers.audio_utils import mel_filter_bank

from tuner.errors import ConfigError, DiskError
from tuner.interfaces.family import Variant
from tuner_ltxvideo2.audio_latents import log_mel, pack
from tuner_ltxvideo2.keys import PARTS, join_original, to_original
from tuner_ltxvideo2.loading import make_part
from tuner_ltxvideo2.text import without_progress
from tuner_ltxvideo2.text_files import gemma_model
from tuner_ltxvideo2.variants import FAMILY, KEYFRAMES

BLOCKS: Final = 4
TEXT_LENGTH: Final = 64
REGISTERS: Final = 32
_WIDTH: Final = 32
"""Of the text encoder."""
_HEADS: Final = 4
_VIDEO_HEAD: Final = 48
_AUDIO_HEAD: Final = 40
"""Channels of a head. Streams are wider than the 128 channels of a latent: the velocity of noise is of full rank, and a narrower model
could never learn it. The widths differ, as they do in the released model, so that no layer fits the other stream by chance."""
_VIDEO: Final = _HEADS * _VIDEO_HEAD
_AUDIO: Final = _HEADS * _AUDIO_HEAD
_GEMMA_LAYERS: Final = 2


@dataclass(frozen=True)
class TinyPaths:
    """What `write_tiny` wrote."""

    checkpoint: Path
    """One combined .safetensors file."""
    text_encoder: Path
    """Folder with model and tokenizer."""


def write_tiny(folder: Path, *, variant: str = "2.0", seed: int = 0) -> TinyPaths:
    """Writes the tiny checkpoint and its text encoder into `folder`; leaves a complete one there as it is.

    `variant`: "2.0", "2.3" or "2.5". The same seed gives the same weights. Raises `ConfigError` for another variant,
    `DiskError` where the folder cannot be written.
    """
    if variant not in ("2.0", "2.3", "2.5"):
        raise ConfigError("the tiny model comes as 2.0, 2.3 and 2.5", value=variant)
    name = f"ltxvideo2-tiny-{variant}-seed{seed}"
    paths = TinyPaths(folder / f"{name}.safetensors", folder / "text_encoder")
    if paths.checkpoint.is_file() and (paths.text_encoder / "tokenizer.json").is_file():
        return paths
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _write_text_encoder(paths.text_encoder, variant)
            modules = {part: _random_part(part, Variant(FAMILY, variant, _arguments(variant))) for part in PARTS}
            _set_statistics(modules["vae"], modules["audio_vae"])
        _write_checkpoint(paths.checkpoint, modules, _configuration(variant), f"{variant}.0")
    except (OSError, SafetensorError) as error:
        raise DiskError(
            f"the tiny model cannot be written: {error}", where=str(folder), remedy="free 20 MB, or set another cache_dir"
        ) from error
    return paths


# --- what it is built of -----------------------------------------------------------------------------------------
def _arguments(variant: str) -> dict[str, Mapping[str, object]]:
    """Arguments of diffusers' classes per part."""
    newer, newest = variant != "2.0", variant == "2.5"
    return {
        "transformer": {
            "in_channels": 128, "out_channels": 128, "num_attention_heads": _HEADS, "attention_head_dim": _VIDEO_HEAD,
            "cross_attention_dim": _VIDEO, "audio_in_channels": 128, "audio_out_channels": 128, "audio_num_attention_heads": _HEADS,
            "audio_attention_head_dim": _AUDIO_HEAD, "audio_cross_attention_dim": _AUDIO,
            "num_layers": BLOCKS, "caption_channels": _WIDTH, "rope_type": "split", "rope_double_precision": True,
            "cross_attn_timestep_scale_multiplier": 1000.0, "gated_attn": newer, "audio_gated_attn": newer,
            "cross_attn_mod": newer, "audio_cross_attn_mod": newer, "use_prompt_embeddings": not newer,
            "ff_bias": not newest, "use_keyframes_abs_pos_embedding": newest,
        },
        "connectors": {
            "caption_channels": _WIDTH, "text_proj_in_factor": _GEMMA_LAYERS + 1, "rope_type": "split", "rope_double_precision": True,
            "connector_rope_base_seq_len": 4096, "per_modality_projections": newer, "proj_bias": newer,
            "video_hidden_dim": _VIDEO, "audio_hidden_dim": _AUDIO, "video_gated_attn": newer, "audio_gated_attn": newer,
            "video_connector_num_attention_heads": _HEADS if newer else 2,
            "video_connector_attention_head_dim": _VIDEO_HEAD if newer else 16,
            "video_connector_num_layers": 1, "video_connector_num_learnable_registers": REGISTERS,
            "audio_connector_num_attention_heads": _HEADS if newer else 2,
            "audio_connector_attention_head_dim": _AUDIO_HEAD if newer else 16,
            "audio_connector_num_layers": 1, "audio_connector_num_learnable_registers": REGISTERS,
        },
        "vae": _video_arguments(newer),
        "audio_vae": {"base_channels": 16, "ch_mult": (1, 2, 4), "num_res_blocks": 1, "latent_channels": 8, "mel_bins": 64},
        "vocoder": _vocoder_arguments(newer),
    }  # fmt: skip


def _video_arguments(newer: bool) -> dict[str, object]:
    decoder: dict[str, object] = {
        "decoder_block_out_channels": (16, 32, 32, 64) if newer else (16, 32, 64),
        "decoder_layers_per_block": (1,) * (5 if newer else 4),
        "decoder_spatio_temporal_scaling": (True,) * (4 if newer else 3),
        "decoder_inject_noise": (False,) * (5 if newer else 4),
        "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial") if newer else ("spatiotemporal",) * 3,
        "upsample_factor": (2, 2, 1, 2) if newer else (2, 2, 2),
        "upsample_residual": (False,) * 4 if newer else (True,) * 3,
        "decoder_spatial_padding_mode": "zeros" if newer else "reflect",
    }
    return {
        "latent_channels": 128, "block_out_channels": (32, 32, 32, 32), "layers_per_block": (1, 1, 1, 1, 1), "decoder_causal": False,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "spatial_compression_ratio": 32, "temporal_compression_ratio": 8, **decoder,
    }  # fmt: skip


def _vocoder_arguments(newer: bool) -> dict[str, object]:
    if not newer:
        return {"hidden_channels": 64, "resnet_kernel_sizes": [3, 7], "resnet_dilations": [[1, 3, 5], [1, 3, 5]]}
    small: dict[str, object] = {"resnet_kernel_sizes": [3], "resnet_dilations": [[1]]}
    return {"hidden_channels": 128, "bwe_hidden_channels": 64, **small, **{f"bwe_{key}": value for key, value in small.items()}}


def _configuration(variant: str) -> dict[str, object]:
    """The configuration as published files carry it in their metadata: of another shape than diffusers' arguments."""
    newer = variant != "2.0"
    transformer: dict[str, object] = {
        "_class_name": "AVTransformer3DModel", "activation_fn": "gelu-approximate", "attention_bias": True, "dropout": 0.0,
        "norm_elementwise_affine": False, "norm_eps": 1e-06, "qk_norm": "rms_norm", "standardization_norm": "rms_norm",
        "positional_embedding_type": "rope", "positional_embedding_theta": 10000.0, "positional_embedding_max_pos": [20, 2048, 2048],
        "timestep_scale_multiplier": 1000, "av_ca_timestep_scale_multiplier": 1000.0, "causal_temporal_positioning": True,
        "use_audio_video_cross_attention": True, "audio_positional_embedding_max_pos": [20], "av_cross_ada_norm": True,
        "use_embeddings_connector": True, "connector_positional_embedding_max_pos": [4096],
        "connector_num_learnable_registers": REGISTERS, "connector_norm_output": True, "use_middle_indices_grid": True,
        "rope_type": "split", "frequencies_precision": "float64", "num_attention_heads": _HEADS, "attention_head_dim": _VIDEO_HEAD,
        "in_channels": 128, "out_channels": 128, "cross_attention_dim": _VIDEO, "audio_num_attention_heads": _HEADS,
        "audio_attention_head_dim": _AUDIO_HEAD, "audio_in_channels": 128, "audio_out_channels": 128,
        "audio_cross_attention_dim": _AUDIO, "caption_channels": _WIDTH,
        "num_layers": BLOCKS, "connector_num_attention_heads": 2, "connector_attention_head_dim": 16, "connector_num_layers": 1,
    }  # fmt: skip
    if newer:
        transformer |= {
            "apply_gated_attention": True, "cross_attention_adaln": True, "connector_apply_gated_attention": True,
            "caption_proj_before_connector": True, "caption_projection_first_linear": False, "caption_proj_input_norm": False,
            "caption_projection_second_linear": False, "connector_num_attention_heads": _HEADS, "connector_attention_head_dim": _VIDEO_HEAD,
            "audio_connector_num_attention_heads": _HEADS, "audio_connector_attention_head_dim": _AUDIO_HEAD,
        }  # fmt: skip
    if variant == "2.5":
        transformer |= {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
    samplers = ("compress_space_res", "compress_time_res", "compress_all_res", "compress_all_res")
    blocks: list[object] = [["res_x", {"num_layers": 1}]]
    for sampler in samplers:
        blocks += [[sampler, {"multiplier": 1}], ["res_x", {"num_layers": 1}]]
    vae = {
        "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128, "patch_size": 4,
        "norm_layer": "pixel_norm", "latent_log_var": "uniform", "encoder_blocks": blocks, "encoder_spatial_padding_mode": "zeros",
        "spatial_padding_mode": "zeros" if newer else "reflect", "causal_decoder": False, "timestep_conditioning": False,
        "scaling_factor": 1.0,
    }  # fmt: skip
    details = {
        "ch": 16, "out_ch": 2, "ch_mult": [1, 2, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "in_channels": 2,
        "resolution": 256, "z_channels": 8, "double_z": True, "mel_bins": 64, "norm_type": "pixel", "causality_axis": "height",
        "mid_block_add_attention": False,
    }  # fmt: skip
    audio = {
        "model": {"params": {"ddconfig": details, "sampling_rate": 16000}},
        "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True}},
    }
    return {"transformer": transformer, "vae": vae, "audio_vae": audio, "vocoder": {}}


# --- weights -----------------------------------------------------------------------------------------------------
def _random_part(part: str, variant: Variant) -> nn.Module:
    """The module with its classes' own random initialization, and filters where weights are no free numbers."""
    made = make_part(part, variant)
    if "mel_stft.mel_basis" in made.state_dict():
        _set_transform(made)
    if KEYFRAMES in dict(made.named_parameters()):  # zero as initialized, which would do nothing
        torch.nn.init.normal_(made.get_parameter(KEYFRAMES), std=0.02)
    return made.eval().requires_grad_(False)


def _set_transform(vocoder: Any) -> None:
    """The bandwidth extension's fixed transform: a windowed DFT as convolution kernels (real parts, then imaginary), and mel filters."""
    length = vocoder.config.filter_length
    angle = 2 * torch.pi * torch.outer(torch.arange(length // 2 + 1), torch.arange(length)) / length
    basis = torch.cat([angle.cos(), -angle.sin()]) * torch.hann_window(length)
    vocoder.mel_stft.stft_fn.forward_basis.copy_(basis[:, None])
    vocoder.mel_stft.stft_fn.inverse_basis.copy_(basis[:, None] / length)
    bank = mel_filter_bank(length // 2 + 1, vocoder.config.num_mel_channels, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    vocoder.mel_stft.mel_basis.copy_(torch.from_numpy(bank).float().T)


@torch.no_grad()
def _set_statistics(vae: Any, audio_vae: Any) -> None:
    """Mean and deviation per channel, measured over made clips and sounds."""
    video = torch.cat([vae.encode(clip).latent_dist.mode() for clip in _made_clips()])
    _copy_statistics(vae, video.movedim(1, -1).flatten(0, -2))
    sound = pack(audio_vae.encode(log_mel(_made_sounds())[:, :, :97]).latent_dist.mode())
    _copy_statistics(audio_vae, sound.flatten(0, 1))


def _copy_statistics(vae: Any, rows: Tensor) -> None:
    """`rows` (n, channels): latents as encoded."""
    vae.latents_mean.copy_(rows.mean(dim=0))
    vae.latents_std.copy_(rows.std(dim=0).clamp(min=1e-3))


def _made_clips() -> list[Tensor]:
    """Moving gradients, stripes and noise (1, 3, 9, 64, 64) in [-1, 1]: what typical pictures are made of."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    time = torch.linspace(0, 1, 9)[:, None, None]
    clips = []
    for index in range(6):
        turn = torch.tensor(0.7 * index)
        phase = rows * turn.cos() + columns * turn.sin() + time
        waves = torch.stack([torch.sin(phase * (1 + index + channel)) for channel in range(3)])
        noise = torch.nn.functional.interpolate(
            torch.randn(3, 9, 6 * 2 ** (index % 3), 6 * 2 ** (index % 3)), size=(64, 64), mode="bilinear"
        )
        clips.append((0.7 * waves + 0.4 * noise).clamp(-1, 1)[None])
    return clips


def _made_sounds() -> Tensor:
    """(4, 2, 16000): tones that swell, and noise."""
    time = torch.arange(16000) / 16000
    tones = torch.stack(
        [torch.sin(2 * torch.pi * pitch * time) * torch.sin(torch.pi * time * (1 + i)) for i, pitch in enumerate((110, 440, 1760, 0))]
    )
    sounds = 0.4 * tones + torch.tensor([0.001, 0.01, 0.05, 0.2])[:, None] * torch.randn(4, 16000)
    return torch.stack([sounds, 0.8 * sounds + 0.01 * torch.randn(4, 16000)], dim=1)


def _write_checkpoint(path: Path, modules: Mapping[str, nn.Module], config: Mapping[str, object], version: str) -> None:
    """All parts in the published names, in one file; complete or not there at all."""
    tensors: dict[str, Tensor] = {}
    for part, module in modules.items():
        for name, tensor in module.state_dict().items():
            kept = tensor if name in ("latents_mean", "latents_std") else tensor.to(torch.bfloat16)
            tensors[join_original(part, to_original(part, name))] = kept.contiguous()
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    os.close(descriptor)
    try:
        save_file(tensors, temporary, metadata={"model_version": version, "config": json.dumps(config)})
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


# --- text encoder ------------------------------------------------------------------------------------------------
_SENTENCES: Final = (
    "a red ball rolls slowly over green grass while birds sing in the distance",
    "two people talk at a wooden table; rain falls outside the window",
    "the camera moves along a river at sunset, water splashes, a dog barks",
    "a close view of hands playing the piano, soft music, warm light",
)


def _write_text_encoder(folder: Path, variant: str) -> None:
    """A Gemma 3 (2.5: Gemma 4) language model of two layers with its own tokenizer."""
    tokenizer = _tokenizer()
    common = {
        "vocab_size": len(tokenizer), "hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "num_hidden_layers": _GEMMA_LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": TEXT_LENGTH,
        "sliding_window": TEXT_LENGTH, "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    if variant == "2.5":  # as published: layers of full attention have larger heads, and keys for values
        config: Gemma3TextConfig | Gemma4UnifiedTextConfig = Gemma4UnifiedTextConfig(
            **common, global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True
        )
    else:
        config = Gemma3TextConfig(**common, query_pre_attn_scalar=16)
    with without_progress():
        model = gemma_model(config)
        for layer in model.layers if variant == "2.5" else ():
            layer.layer_scalar.fill_(0.5)
        model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pairs trained on four sentences: any text can be encoded; a caption begins with <bos>, as Gemma's do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_SENTENCES, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(core),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=TEXT_LENGTH,
        padding_side="left",
    )
