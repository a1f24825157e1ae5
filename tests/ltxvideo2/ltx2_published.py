"""The published models at real size: arguments of diffusers' classes as they were released, and the metadata of the original files.

Facts about the releases, written out independently of the code that derives them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import nn

from tuner.interfaces.family import Variant
from tuner.interfaces.services import TensorHeader
from tuner_ltxvideo2.loading import empty_part

_ROPE = {"rope_type": "split", "rope_double_precision": True, "rope_theta": 10000.0}

TRANSFORMER_20: dict[str, object] = {
    "in_channels": 128, "out_channels": 128, "num_attention_heads": 32, "attention_head_dim": 128, "cross_attention_dim": 4096,
    "audio_in_channels": 128, "audio_out_channels": 128, "audio_num_attention_heads": 32, "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048, "num_layers": 48, "caption_channels": 3840, "norm_eps": 1e-6, "pos_embed_max_pos": 20,
    "base_height": 2048, "base_width": 2048, "audio_pos_embed_max_pos": 20, "timestep_scale_multiplier": 1000,
    "cross_attn_timestep_scale_multiplier": 1000, "use_prompt_embeddings": True, "gated_attn": False, "cross_attn_mod": False,
    "audio_gated_attn": False, "audio_cross_attn_mod": False, **_ROPE,
}  # fmt: skip
TRANSFORMER_23 = TRANSFORMER_20 | {
    "use_prompt_embeddings": False, "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
}  # fmt: skip
TRANSFORMER_25 = TRANSFORMER_23 | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
CONNECTORS_20: dict[str, object] = {
    "caption_channels": 3840, "text_proj_in_factor": 49, "connector_rope_base_seq_len": 4096, "per_modality_projections": False,
    "proj_bias": False, "causal_temporal_positioning": False, **_ROPE,
    **{f"{s}_connector_num_attention_heads": 30 for s in ("video", "audio")},
    **{f"{s}_connector_attention_head_dim": 128 for s in ("video", "audio")},
    **{f"{s}_connector_num_layers": 2 for s in ("video", "audio")},
    **{f"{s}_connector_num_learnable_registers": 128 for s in ("video", "audio")},
    **{f"{s}_gated_attn": False for s in ("video", "audio")},
}  # fmt: skip
CONNECTORS_23 = CONNECTORS_20 | {
    "video_connector_num_attention_heads": 32, "audio_connector_num_attention_heads": 32, "audio_connector_attention_head_dim": 64,
    "video_connector_num_layers": 8, "audio_connector_num_layers": 8, "video_gated_attn": True, "audio_gated_attn": True,
    "per_modality_projections": True, "video_hidden_dim": 4096, "audio_hidden_dim": 2048, "proj_bias": True,
}  # fmt: skip
_VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 128, "patch_size": 4, "encoder_causal": True, "decoder_causal": False,
    "encoder_spatial_padding_mode": "zeros", "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "spatio_temporal_scaling": (True,) * 4, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8, "scaling_factor": 1.0,
}  # fmt: skip
VAE_20: dict[str, object] = _VAE | {
    "block_out_channels": (256, 512, 1024, 2048), "layers_per_block": (4, 6, 6, 2, 2), "decoder_block_out_channels": (256, 512, 1024),
    "decoder_layers_per_block": (5, 5, 5, 5), "decoder_spatio_temporal_scaling": (True,) * 3, "decoder_inject_noise": (False,) * 4,
    "upsample_type": ("spatiotemporal",) * 3, "upsample_residual": (True,) * 3, "upsample_factor": (2, 2, 2),
    "decoder_spatial_padding_mode": "reflect",
}  # fmt: skip
VAE_23: dict[str, object] = _VAE | {
    "block_out_channels": (256, 512, 1024, 1024), "layers_per_block": (4, 6, 4, 2, 2), "decoder_block_out_channels": (256, 512, 512, 1024),
    "decoder_layers_per_block": (4, 6, 4, 2, 2), "decoder_spatio_temporal_scaling": (True,) * 4, "decoder_inject_noise": (False,) * 5,
    "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"), "upsample_residual": (False,) * 4,
    "upsample_factor": (2, 2, 1, 2), "decoder_spatial_padding_mode": "zeros",
}  # fmt: skip
AUDIO_VAE: dict[str, object] = {
    "base_channels": 128, "output_channels": 2, "ch_mult": (1, 2, 4), "num_res_blocks": 2, "attn_resolutions": None, "in_channels": 2,
    "resolution": 256, "latent_channels": 8, "norm_type": "pixel", "causality_axis": "height", "mid_block_add_attention": False,
    "sample_rate": 16000, "mel_hop_length": 160, "is_causal": True, "mel_bins": 64, "double_z": True,
}  # fmt: skip
_DILATIONS = [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
VOCODER_20: dict[str, object] = {
    "in_channels": 128, "hidden_channels": 1024, "out_channels": 2, "upsample_kernel_sizes": [16, 15, 8, 4, 4],
    "upsample_factors": [6, 5, 2, 2, 2], "resnet_kernel_sizes": [3, 7, 11], "resnet_dilations": _DILATIONS, "act_fn": "leaky_relu",
    "antialias": False, "final_act_fn": "tanh", "final_bias": True, "output_sampling_rate": 24000,
}  # fmt: skip
_SNAKE = {
    "in_channels": 128, "out_channels": 2, "resnet_kernel_sizes": [3, 7, 11], "resnet_dilations": _DILATIONS, "act_fn": "snakebeta",
    "antialias": True, "antialias_kernel_size": 12, "final_act_fn": None, "final_bias": False,
}  # fmt: skip
VOCODER_23: dict[str, object] = {
    **_SNAKE, "hidden_channels": 1536, "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4], "upsample_factors": [5, 2, 2, 2, 2, 2],
    **{f"bwe_{key}": value for key, value in _SNAKE.items()}, "bwe_hidden_channels": 512,
    "bwe_upsample_kernel_sizes": [12, 11, 4, 4, 4], "bwe_upsample_factors": [6, 5, 2, 2, 2], "filter_length": 512, "hop_length": 80,
    "window_length": 512, "num_mel_channels": 64, "input_sampling_rate": 16000, "output_sampling_rate": 48000,
}  # fmt: skip

RELEASES: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "2.0": {"transformer": TRANSFORMER_20, "connectors": CONNECTORS_20, "vae": VAE_20, "audio_vae": AUDIO_VAE, "vocoder": VOCODER_20},
    "2.3": {"transformer": TRANSFORMER_23, "connectors": CONNECTORS_23, "vae": VAE_23, "audio_vae": AUDIO_VAE, "vocoder": VOCODER_23},
    "2.5": {"transformer": TRANSFORMER_25, "connectors": CONNECTORS_23, "vae": VAE_23, "audio_vae": AUDIO_VAE, "vocoder": VOCODER_23},
}

METADATA_TRANSFORMER: Mapping[str, object] = {
    "_class_name": "AVTransformer3DModel", "activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False,
    "norm_eps": 1e-06, "qk_norm": "rms_norm", "positional_embedding_theta": 10000.0, "positional_embedding_max_pos": [20, 2048, 2048],
    "timestep_scale_multiplier": 1000, "av_ca_timestep_scale_multiplier": 1000.0, "audio_positional_embedding_max_pos": [20],
    "connector_positional_embedding_max_pos": [4096], "connector_num_learnable_registers": 128, "rope_type": "split",
    "frequencies_precision": "float64", "num_attention_heads": 32, "attention_head_dim": 128, "in_channels": 128, "out_channels": 128,
    "cross_attention_dim": 4096, "audio_num_attention_heads": 32, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 2048,
    "caption_channels": 3840, "num_layers": 48, "connector_num_attention_heads": 30, "connector_attention_head_dim": 128,
    "connector_num_layers": 2,
}  # fmt: skip
METADATA_23 = {
    "apply_gated_attention": True, "cross_attention_adaln": True, "connector_apply_gated_attention": True,
    "caption_proj_before_connector": True, "connector_num_attention_heads": 32, "audio_connector_num_attention_heads": 32,
    "audio_connector_attention_head_dim": 64, "connector_num_layers": 8,
}  # fmt: skip
METADATA_25 = {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
METADATA_AUDIO_VAE = {
    "model": {
        "params": {
            "ddconfig": {"attn_resolutions": [], "resolution": 256, "norm_type": "pixel", "causality_axis": "height", "mel_bins": 64},
            "sampling_rate": 16000,
        }
    },
    "preprocessing": {"stft": {"hop_length": 160, "causal": True}},
}


def metadata(release: str) -> dict[str, object]:
    """What the original file says about itself: nothing about the vocoder nor about the video VAE's decoder."""
    vae: dict[str, object] = {"patch_size": 4, "encoder_spatial_padding_mode": "zeros", "causal_decoder": False, "scaling_factor": 1.0}
    if release == "2.0":
        vae["spatial_padding_mode"] = "reflect"
    transformer = dict(METADATA_TRANSFORMER) | (METADATA_23 if release != "2.0" else {}) | (METADATA_25 if release == "2.5" else {})
    return {"model_version": f"{release}.0", "transformer": transformer, "vae": vae, "audio_vae": METADATA_AUDIO_VAE, "vocoder": {}}


@functools.cache
def modules(release: str) -> Mapping[str, nn.Module]:
    """The released networks on the meta device."""
    variant = Variant("ltxvideo2", release, RELEASES[release])
    return {part: empty_part(part, variant) for part in RELEASES[release]}


def headers(release: str) -> dict[str, dict[str, TensorHeader]]:
    """Part -> name -> header, as a file of the release would give them; the caller may change them."""
    return {part: dict(named) for part, named in _headers(release).items()}


@functools.cache
def _headers(release: str) -> Mapping[str, Mapping[str, TensorHeader]]:
    return {
        part: {name: TensorHeader(tuple(tensor.shape), "BF16") for name, tensor in module.state_dict().items()}
        for part, module in modules(release).items()
    }
