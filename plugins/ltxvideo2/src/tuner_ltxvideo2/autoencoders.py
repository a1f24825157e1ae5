"""Arguments of the video VAE, the audio VAE and the vocoder, read off their tensor shapes; the configuration gives the rest.

Notation: a sampler with stride product s (2 time, 4 space, 8 both) turns c channels into c' by a convolution and a rearrangement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeGuard

from tuner.errors import CheckpointError
from tuner_ltxvideo2.headers import Headers, count_of, shape_of

_STRIDES: Final[Mapping[int, str]] = {2: "temporal", 4: "spatial", 8: "spatiotemporal"}


def video_arguments(config: Mapping[str, Any], headers: Headers, version: str) -> dict[str, object]:
    """Arguments of `AutoencoderKLLTX2Video`.

    A decoder of another kind (2.5's diffusion decoder) is left out: `encoder_only`.
    Encoder: a sampler's convolution gives c' / s channels. Decoder: it gives c · s / k channels, and what follows has c / k, where k is
    the factor by which channels shrink. So strides and factors follow from shapes alone. Whether a decoder's sampler adds a shortcut, and
    how pictures are padded, is in the configuration; where it says nothing, 2.0 adds and reflects, 2.3 does neither.
    """
    if config.get("timestep_conditioning"):
        raise CheckpointError(
            "the video decoder is conditioned on a timestep, which this version does not support", where="vae.timestep_conditioning"
        )
    first = version == "2.0"
    patch = int(config.get("patch_size", 4))
    channels = shape_of(headers, "encoder.conv_in.conv.weight")[1] // patch**2
    if config.get("encoder_only"):
        decoder: dict[str, object] = {"encoder_only": True, "out_channels": channels}
    else:
        made = shape_of(headers, "decoder.conv_out.conv.weight")[0] // patch**2
        decoder = {"out_channels": made, **_video_decoder(config, headers, default_residual=first)}
    return {
        "in_channels": channels,
        "latent_channels": shape_of(headers, "latents_mean")[0],
        "patch_size": patch,
        "scaling_factor": float(config.get("scaling_factor", 1.0)),
        "encoder_causal": True,
        "decoder_causal": bool(config.get("causal_decoder", False)),
        "encoder_spatial_padding_mode": str(config.get("encoder_spatial_padding_mode", "zeros")),
        "decoder_spatial_padding_mode": str(
            config.get("decoder_spatial_padding_mode", config.get("spatial_padding_mode", "reflect" if first else "zeros"))
        ),
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
        **_video_encoder(headers),
        **decoder,
    }


def _video_encoder(headers: Headers) -> dict[str, object]:
    """Channels, layers and samplers of the encoder, from the input to the latents."""
    blocks = count_of(headers, "encoder.down_blocks")
    following = [*(f"encoder.down_blocks.{i}" for i in range(1, blocks)), "encoder.mid_block"]
    channels, samplers = [], []
    for i, after in enumerate(following):
        channels.append(shape_of(headers, f"{after}.resnets.0.conv1.conv.weight")[1])
        samplers.append(
            _stride(
                channels[-1], shape_of(headers, f"encoder.down_blocks.{i}.downsamplers.0.conv.conv.weight")[0], f"encoder.down_blocks.{i}"
            )
        )
    layers = [count_of(headers, f"encoder.down_blocks.{i}.resnets") for i in range(blocks)]
    return {
        "block_out_channels": tuple(channels),
        "down_block_types": ("LTX2VideoDownBlock3D",) * blocks,
        "layers_per_block": (*layers, count_of(headers, "encoder.mid_block.resnets")),
        "spatio_temporal_scaling": (True,) * blocks,
        "downsample_type": tuple(samplers),
    }


def _video_decoder(config: Mapping[str, Any], headers: Headers, default_residual: bool) -> dict[str, object]:
    """The same of the decoder. diffusers lists its blocks from the picture inwards, all but the kinds of samplers."""
    blocks = count_of(headers, "decoder.up_blocks")
    channels, factors, samplers = [], [], []
    for i in range(blocks):
        made, given = shape_of(headers, f"decoder.up_blocks.{i}.upsamplers.0.conv.conv.weight")[:2]
        after = shape_of(headers, f"decoder.up_blocks.{i}.resnets.0.conv1.conv.weight")[1]
        factors.append(given // after)
        channels.append(given)
        samplers.append(_stride(made * factors[-1], given, f"decoder.up_blocks.{i}"))
    layers = [count_of(headers, f"decoder.up_blocks.{i}.resnets") for i in range(blocks)]
    residual = _residual(config, blocks, default_residual)
    return {
        "decoder_block_out_channels": tuple(reversed(channels)),
        "decoder_layers_per_block": (*reversed(layers), count_of(headers, "decoder.mid_block.resnets")),
        "decoder_spatio_temporal_scaling": (True,) * blocks,
        "decoder_inject_noise": (False,) * (blocks + 1),
        "upsample_type": tuple(samplers),
        "upsample_factor": tuple(reversed(factors)),
        "upsample_residual": tuple(reversed(residual)),
    }


def _residual(config: Mapping[str, Any], blocks: int, default: bool) -> list[bool]:
    """Whether each sampler of the decoder adds a shortcut, from the latents to the picture.

    The published list runs the other way, from the picture inwards, as it does for the encoder.
    """
    listed = [block for block in config.get("decoder_blocks", ()) if _is_block(block) and block[0].startswith("compress")]
    if len(listed) != blocks:
        return [default] * blocks
    return [bool(block[1].get("residual", False)) if isinstance(block[1], Mapping) else False for block in reversed(listed)]


def _is_block(value: object) -> TypeGuard[list[Any]]:
    """Whether `value` is an item of the published lists: its kind and its settings."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _stride(product: int, divisor: int, where: str) -> str:
    stride = product // divisor
    if stride not in _STRIDES:
        raise CheckpointError("a sampler of the video VAE has an unknown stride", where=where, value=stride)
    return _STRIDES[stride]


def audio_arguments(config: Mapping[str, Any], headers: Headers, version: str) -> dict[str, object]:
    """Arguments of `AutoencoderKLLTX2Audio`."""
    parameters = _deep(config, "model", "params")
    details = _deep(parameters, "ddconfig")
    base = shape_of(headers, "encoder.conv_in.conv.weight")[0]
    levels = count_of(headers, "encoder.down")
    multiples = [shape_of(headers, f"encoder.down.{i}.block.0.conv1.conv.weight")[0] // base for i in range(levels)]
    return {
        "base_channels": base,
        "output_channels": shape_of(headers, "decoder.conv_out.conv.weight")[0],
        "ch_mult": tuple(multiples),
        "num_res_blocks": count_of(headers, "encoder.down.0.block"),
        "attn_resolutions": tuple(details.get("attn_resolutions") or ()) or None,
        "in_channels": shape_of(headers, "encoder.conv_in.conv.weight")[1],
        "resolution": details.get("resolution", 256),
        "latent_channels": shape_of(headers, "decoder.conv_in.conv.weight")[1],
        "norm_type": details.get("norm_type", "pixel"),
        "causality_axis": details.get("causality_axis", "height"),
        "mid_block_add_attention": bool(details.get("mid_block_add_attention", False)),
        "mel_bins": details.get("mel_bins", 64),
        "double_z": bool(details.get("double_z", True)),
        "sample_rate": parameters.get("sampling_rate", 16000),
        "mel_hop_length": _deep(config, "preprocessing", "stft").get("hop_length", 160),
        "is_causal": bool(_deep(config, "preprocessing", "stft").get("causal", True)),
    }


def _deep(config: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """The table at `path`; empty where it is missing."""
    for key in path:
        found = config.get(key)
        config = found if isinstance(found, Mapping) else {}
    return config


# Kernel -> stride of a vocoder's upsampling layers in every release; a checkpoint's own `upsample_rates` come first.
_UPSAMPLE_RATES: Final[Mapping[int, int]] = {16: 6, 15: 5, 12: 6, 11: 5, 8: 2, 4: 2}


def vocoder_arguments(config: Mapping[str, Any], headers: Headers, version: str) -> dict[str, object]:
    """Arguments of `LTX2Vocoder` (2.0, 24 kHz), or of `LTX2VocoderWithBWE` (48 kHz) where there is a bandwidth extension."""
    if "bwe_generator.conv_in.weight" not in headers:
        arguments = _generator(config, headers, "")
        return {**arguments, "output_sampling_rate": 16000 * _product(arguments["upsample_factors"]) // 160}
    extension = _deep(config, "bwe")
    outer = _generator(extension, headers, "bwe_generator.")
    mels, frequencies = shape_of(headers, "mel_stft.mel_basis")
    length = shape_of(headers, "mel_stft.stft_fn.forward_basis")[2]
    if frequencies != length // 2 + 1:
        raise CheckpointError("the vocoder's mel filters do not fit its transform", where="mel_stft.mel_basis", value=frequencies)
    hop, rate = int(extension.get("hop_length", 80)), int(extension.get("input_sampling_rate", 16000))
    return {
        **_generator(_deep(config, "vocoder") or config, headers, "vocoder."),
        **{f"bwe_{key}": value for key, value in outer.items()},
        "filter_length": length,
        "window_length": int(extension.get("win_size", length)),
        "hop_length": hop,
        "num_mel_channels": mels,
        "input_sampling_rate": rate,
        "output_sampling_rate": rate * _product(outer["upsample_factors"]) // hop,
    }


def _generator(config: Mapping[str, Any], headers: Headers, prefix: str) -> dict[str, object]:
    """One waveform generator: channels, kernels and activation from shapes and names; strides from the configuration or by kernel."""
    hidden, channels = shape_of(headers, f"{prefix}conv_in.weight")[:2]
    layers = count_of(headers, f"{prefix}upsamplers")
    kernels = [shape_of(headers, f"{prefix}upsamplers.{i}.weight")[2] for i in range(layers)]
    unknown = [kernel for kernel in kernels if kernel not in _UPSAMPLE_RATES]
    if unknown and "upsample_rates" not in config:
        raise CheckpointError(
            "the vocoder's upsampling is unknown", where=f"{prefix}upsamplers", value=kernels, remedy="use a file with its metadata"
        )
    parallel = count_of(headers, f"{prefix}resnets") // layers
    snake = f"{prefix}act_out.act.alpha" in headers
    biased = f"{prefix}conv_out.bias" in headers
    dilations = [[1, 3, 5][: count_of(headers, f"{prefix}resnets.{i}.convs1")] for i in range(parallel)]
    return {
        "in_channels": channels,
        "hidden_channels": hidden,
        "out_channels": shape_of(headers, f"{prefix}conv_out.weight")[0],
        "upsample_kernel_sizes": kernels,
        "upsample_factors": list(config.get("upsample_rates") or [_UPSAMPLE_RATES[kernel] for kernel in kernels]),
        "resnet_kernel_sizes": [shape_of(headers, f"{prefix}resnets.{i}.convs1.0.weight")[2] for i in range(parallel)],
        "resnet_dilations": list(config.get("resblock_dilation_sizes") or dilations),
        "act_fn": "snakebeta" if snake else "leaky_relu",
        "antialias": f"{prefix}resnets.0.acts1.0.upsample.filter" in headers,
        "antialias_kernel_size": shape_of(headers, f"{prefix}act_out.upsample.filter")[2] if snake else 12,
        # Snake generators end without squashing and without bias; the other kind ends in tanh.
        "final_act_fn": None if snake else "tanh",
        "final_bias": biased,
    }


def _product(factors: object) -> int:
    total = 1
    for factor in factors if isinstance(factors, list) else []:
        total *= int(factor)
    return total


DERIVATIONS: Final[Mapping[str, Callable[[Mapping[str, Any], Headers, str], dict[str, object]]]] = {
    "vae": video_arguments,
    "audio_vae": audio_arguments,
    "vocoder": vocoder_arguments,
}
