"""The peer that tuner is compared with: a LoRA training step of LTX-2 2.0 as a competent user writes it with diffusers and peft.

The model is built from the 2.0 configuration with random weights, on the device and in bf16, so that nothing is downloaded. Text and
latents lie on the device: neither side of the comparison reads data. Both common ways to hold the adapter are offered: in bf16, and in
fp32 under autocast. Everything else is the libraries' own: `add_adapter`, `enable_gradient_checkpointing`, fused AdamW, clipping to 1.

Dimensions: B samples, S video tokens, L audio tokens, T text tokens.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn

Size = Literal["real", "tiny"]
LoraDtype = Literal["bf16", "fp32"]
StepFunction = Callable[[], Tensor]
"""One optimizer step; returns the loss, on the device and detached."""


@dataclass(frozen=True)
class Shape:
    """What one step works on."""

    name: str
    batch: int
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    frames: int
    text_tokens: int = 1024
    frame_rate: float = 25.0

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent (F, H, W): 8x in time with a causal first frame, 32x in space."""
        return (self.frames - 1) // 8 + 1, self.height // 32, self.width // 32

    @property
    def video_tokens(self) -> int:
        """S."""
        frames, height, width = self.grid
        return frames * height * width

    @property
    def audio_tokens(self) -> int:
        """L: 25 audio latents a second."""
        return max(1, round(25 * self.frames / self.frame_rate))


WORK: dict[Size, dict[str, Shape]] = {
    "real": {"head": Shape("head", 2, 832, 480, 17), "121f": Shape("121f", 1, 768, 512, 121)},
    "tiny": {"head": Shape("head", 2, 128, 96, 9, text_tokens=64), "121f": Shape("121f", 1, 128, 96, 17, text_tokens=64)},
}
RANK = 32
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
# The released 2.0 checkpoint differs from diffusers' defaults in rope_type only.
REAL: dict[str, object] = {"rope_type": "split"}
TINY: dict[str, object] = {
    "rope_type": "split", "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128,
    "audio_num_attention_heads": 4, "audio_attention_head_dim": 16, "audio_cross_attention_dim": 64, "caption_channels": 64,
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters are made in `dtype`: a real-size model in fp32 would not fit beside its bf16 copy."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_model(size: Size, device: torch.device, lora: LoraDtype, checkpointing: bool) -> LTX2VideoTransformer3DModel:
    """The transformer with adapters, in training mode, bf16 but for fp32 adapters."""
    with default_dtype(torch.bfloat16), device:
        model = LTX2VideoTransformer3DModel(**(REAL if size == "real" else TINY))
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights="gaussian"))
    cast_training_params(model, dtype=torch.float32 if lora == "fp32" else torch.bfloat16)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def diffuse(clean: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, C) tokens and (B,) sigma -> the noisy tokens and the velocity eps - x0, both in fp32."""
    noise = torch.randn_like(clean)
    weight = sigma.view(-1, 1, 1)
    return (1 - weight) * clean + weight * noise, noise - clean


class PlainStep:
    """Model, optimizer and one batch; calling it makes one optimizer step."""

    def __init__(self, shape: Shape, checkpointing: bool, device: torch.device, size: Size, lora: LoraDtype) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.device = device
        self.autocast = lora == "fp32"
        self.model = build_model(size, device, lora, checkpointing)
        self.trainable: list[nn.Parameter] = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, fused=device.type == "cuda")
        text = (shape.batch, shape.text_tokens, self.model.config.caption_channels)
        self.video = torch.randn(shape.batch, shape.video_tokens, 128, device=device)
        self.audio = torch.randn(shape.batch, shape.audio_tokens, 128, device=device)
        self.video_text = torch.randn(text, device=device, dtype=torch.bfloat16)
        self.audio_text = torch.randn(text, device=device, dtype=torch.bfloat16)

    def __call__(self) -> Tensor:
        """Forward, backward, clip, step."""
        loss = self.differentiate()
        nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def differentiate(self) -> Tensor:
        """Forward and backward. Loss: mean squared error of both velocities, in fp32."""
        video_sigma, audio_sigma = torch.rand(2, self.shape.batch, device=self.device)
        noisy_video, video_target = diffuse(self.video, video_sigma)
        noisy_audio, audio_target = diffuse(self.audio, audio_sigma)
        frames, height, width = self.shape.grid
        with torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext():
            video, audio = self.model(
                hidden_states=noisy_video.bfloat16(), audio_hidden_states=noisy_audio.bfloat16(),
                encoder_hidden_states=self.video_text, audio_encoder_hidden_states=self.audio_text,
                timestep=video_sigma * 1000, audio_timestep=audio_sigma * 1000,
                num_frames=frames, height=height, width=width, fps=self.shape.frame_rate, audio_num_frames=self.shape.audio_tokens,
                return_dict=False,
            )
        loss = nn.functional.mse_loss(video.float(), video_target) + nn.functional.mse_loss(audio.float(), audio_target)
        loss.backward()  # type: ignore[no-untyped-call]  # torch.Tensor.backward has no annotations
        return loss.detach()


def plain_step_factory(
    shape: Shape, checkpointing: bool, device: torch.device, *, size: Size = "real", lora: LoraDtype = "bf16"
) -> tuple[StepFunction, Callable[[], None]]:
    """The step, and what frees its memory. After the second is called the first must not be."""
    held = [PlainStep(shape, checkpointing, device, size, lora)]

    def step() -> Tensor:
        return held[0]()

    def cleanup() -> None:
        held.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    return step, cleanup
