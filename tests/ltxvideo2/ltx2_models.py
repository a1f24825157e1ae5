"""Small transformers and batches for the tests of the forward pass: diffusers' own class, real module names, random weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import LTX2VideoTransformer3DModel
from torch import Tensor

from tuner.interfaces.family import Batch, Noise, Sample, StreamBatch, StreamNoise

CAPTION = 40
GRID = (3, 2, 4)
LENGTH = 7
TEXT = 6
RATES = (25.0, 24.0)
SMALLER = (GRID[0], GRID[1] // 2, GRID[2] // 2)
R = SMALLER[0] * SMALLER[1] * SMALLER[2]
"""Grid of a reference clip at half size, and its tokens."""

NEW = {
    "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False, "perturbed_attn": True,
}  # fmt: skip


def transformer(generation: str = "2.0", rope_type: str = "split", layers: int = 2, **changes: object) -> LTX2VideoTransformer3DModel:
    """A model with every tensor random (its own initialisation leaves tables near zero), in fp32."""
    settings: dict[str, object] = {
        "num_attention_heads": 4, "attention_head_dim": 16, "cross_attention_dim": 64,
        "audio_num_attention_heads": 4, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 32,
        "num_layers": layers, "caption_channels": CAPTION, "rope_type": rope_type, "cross_attn_timestep_scale_multiplier": 700,
    }  # fmt: skip
    settings |= NEW if generation != "2.0" else {}
    settings |= {"ff_bias": False, "use_keyframes_abs_pos_embedding": True} if generation == "2.5" else {}
    model = LTX2VideoTransformer3DModel(**(settings | changes)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 1.0 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.requires_grad_(False)


def text_widths(model: LTX2VideoTransformer3DModel) -> dict[str, int]:
    """Channels of the encoded captions per stream."""
    if model.config.use_prompt_embeddings:
        return dict.fromkeys(("video", "audio"), int(model.config.caption_channels))
    return {"video": 64, "audio": 32}


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch_and_noise(
    model: LTX2VideoTransformer3DModel,
    sigmas: dict[str, tuple[float, ...]],
    *,
    grid: tuple[int, int, int] = GRID,
    length: int = LENGTH,
    rates: tuple[float, ...] = RATES,
    conditioned: Tensor | None = None,
    loss_mask: Tensor | None = None,
    present: Tensor | None = None,
) -> tuple[Batch, Noise]:
    """A batch of two samples with the streams that `sigmas` names."""
    count = len(rates)
    tokens = {"video": grid[0] * grid[1] * grid[2], "audio": length}
    grids = {"video": grid, "audio": (length, 1, 1)}
    streams: dict[str, StreamBatch] = {}
    noises: dict[str, StreamNoise] = {}
    for index, name in enumerate(sigmas):
        latents, eps = (normal(count, tokens[name], 128, seed=10 * index + part) for part in (1, 2))
        sigma = torch.tensor(sigmas[name])
        weight = sigma[:, None, None].expand(count, tokens[name], 1)
        if name == "video" and conditioned is not None:
            weight = torch.where(conditioned[..., None], 0.0, weight)
        streams[name] = StreamBatch(
            latents, grids[name],
            loss_mask=loss_mask if name == "audio" else None,
            present=present if name == "audio" else None,
            conditioned=conditioned if name == "video" else None,
        )
        noises[name] = StreamNoise(sigma, (1 - weight) * latents + weight * eps, eps - latents, eps)
    text = {name: normal(count, TEXT, width, seed=50) for name, width in text_widths(model).items() if name in sigmas}
    samples = tuple(
        Sample(key=f"s{i}", dataset="d", draw=i, epoch=0, frame_rate=rate, frames=17, height=64, width=128, records={})
        for i, rate in enumerate(rates)
    )
    return Batch(samples, streams, text, tuple(rates)), Noise(noises)


def with_reference(batch: Batch, noise: Noise) -> tuple[Batch, Noise]:
    """The tokens of a clip at half size behind the picture's."""
    stream, drawn = batch.streams["video"], noise.streams["video"]
    tokens = normal(2, R, 128, seed=77)
    own = torch.zeros(stream.latents.shape[:2], dtype=torch.bool) if stream.conditioned is None else stream.conditioned
    conditioned = torch.cat([own, torch.ones(2, R, dtype=torch.bool)], dim=1)
    longer = replace(
        stream, latents=torch.cat([stream.latents, tokens], dim=1), conditioned=conditioned, extra_grid=SMALLER
    )
    noisy, target, eps = (torch.cat(pair, dim=1) for pair in ((drawn.noisy, tokens), (drawn.target, tokens), (drawn.noise, tokens)))
    drawn = replace(drawn, noisy=noisy, target=target, noise=eps)
    return replace(batch, streams={**batch.streams, "video": longer}), Noise({**noise.streams, "video": drawn})
