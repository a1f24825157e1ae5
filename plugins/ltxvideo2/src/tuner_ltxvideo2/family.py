"""LTX-2 as the core sees it: what a checkpoint holds, which encoders feed it, its forward pass, its LoRA targets, its samples.

Special here: nothing is computed in this file. It names the streams and hands each question to the module that answers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from tuner.config.options import Options
from tuner.config.settings import ModelSettings
from tuner.errors import CheckpointError
from tuner.interfaces.blocks import BlockSet, BlockState
from tuner.interfaces.encoders import LatentEncoder
from tuner.interfaces.family import (
    Batch,
    BlockFunction,
    BuildContext,
    ClipShape,
    Generated,
    Geometry,
    Located,
    ModelFacts,
    ModelFamily,
    Noise,
    Prediction,
    Sample,
    SampleRequest,
    TokenShift,
)
from tuner.interfaces.memory import Placement
from tuner.interfaces.services import TensorHeader, WeightSource
from tuner_ltxvideo2 import hub, inputs, keys, loading, sampling, transformer
from tuner_ltxvideo2.audio_latents import AudioDecoder, AudioLatentEncoder
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.text import MAX_TOKENS, TextEncoder
from tuner_ltxvideo2.variants import variant_of
from tuner_ltxvideo2.video_latents import VideoDecoder, VideoLatentEncoder

ATTENTION_TARGETS = (".to_q", ".to_k", ".to_v", ".to_out.0")
"""LoRA targets in every attention of every block: 1,152 of them in the 48 blocks with both streams."""
AUDIO_TARGETS = ("audio_proj_in", "audio_proj_out", "audio_caption_projection.linear_1", "audio_caption_projection.linear_2")
"""Further targets where sound is trained, beside each block's `audio_ff`: what the base model knows least of a new voice."""


class LTX2Family(ModelFamily):
    """LTX-2.0 and 2.3: video and sound, trained together or alone."""

    name: ClassVar[str] = "ltxvideo2"
    options_type: ClassVar[type[Options]] = LTX2Options
    geometry: ClassVar[Geometry] = Geometry(frame_step=8, size_step=32, sample_rate=16000, audio_channels=2, default_frame_rate=25.0)
    stream_names: ClassVar[tuple[str, ...]] = ("video", "audio")
    token_shift: ClassVar[TokenShift] = TokenShift(0.95, 2.05, 1024, 4096)

    def __init__(self, options: LTX2Options, context: BuildContext, text_encoder: Path | None = None) -> None:
        """`text_encoder`: its folder, where it does not lie beside the weights; `locate` sets it too."""
        self.options = options
        self.context = context
        self.text_encoder = text_encoder
        self._tables = transformer.RotaryTables()

    # --- before anything is loaded -------------------------------------------------------------------------------
    def locate(self, settings: ModelSettings, cache_dir: Path) -> Located:
        files = hub.locate_model(
            settings.pretrained_model_name_or_path, settings.revision, settings.model_flavour, settings.text_encoder_path, cache_dir
        )
        self.text_encoder = files.text_encoder
        return Located(files.weights, files.description)

    def inspect(self, source: WeightSource, streams: Sequence[str]) -> ModelFacts:
        variant = variant_of(source)
        skip = transformer.skip_for(streams)
        headers = {name: header for name, header in source.headers("transformer").items() if not skip(name)}
        width = torch.empty((), dtype=self.context.dtype).element_size()
        counts = block_counts(headers)
        parameters = sum(header.count for header in headers.values())
        return ModelFacts(
            variant, parameters, blocks=len(counts), block_bytes=max(counts.values()) * width, bytes=parameters * width,
            adapter_targets=len(target_names(headers, streams)),
        )

    def encoders(
        self, source: WeightSource, streams: Sequence[str], companions: frozenset[str] = frozenset()
    ) -> Sequence[LatentEncoder]:
        variant = variant_of(source)
        wanted: list[LatentEncoder] = [TextEncoder(source, variant, self.context.dtype, self.text_encoder)]
        if "video" in streams:
            wanted.append(VideoLatentEncoder(source, variant, self._convolution_dtype(), self.options))
        if "audio" in streams:
            wanted.append(AudioLatentEncoder(source, variant, self._convolution_dtype()))
        return wanted

    def _convolution_dtype(self) -> torch.dtype:
        """Of the VAEs and the vocoder: the run's, but float32 on a CPU, whose bfloat16 convolutions take minutes a clip."""
        return torch.float32 if self.context.device.type == "cpu" else self.context.dtype

    def select_streams(self, available: frozenset[str]) -> tuple[str, ...]:
        """Sound is left out where `train_audio` is off or no clip has any."""
        return super().select_streams(available if self.options.train_audio else available - {"audio"})

    def stream_weights(self) -> Mapping[str, float]:
        return {"audio": self.options.audio_loss_weight}

    # --- the training model --------------------------------------------------------------------------------------
    def load(
        self, source: WeightSource, streams: Sequence[str], dtype: torch.dtype, device: torch.device, placement: Placement | None = None
    ) -> nn.Module:
        """Frozen and in evaluation mode; modules that `streams` do not need are neither read nor there."""
        return loading.build_part(
            source, "transformer", variant_of(source), dtype=dtype, device=device, placement=placement,
            prepare=lambda model: transformer.drop_unused(model, streams),
        )

    def collate(self, samples: Sequence[Sample], streams: Sequence[str]) -> Batch:
        return inputs.collate(samples, streams, seed=self.context.seed, i2v_probability=self.options.i2v_conditioning_probability)

    def dummy_batch(
        self, model: nn.Module, shape: ClipShape, batch_size: int, streams: Sequence[str], device: torch.device
    ) -> tuple[Batch, Noise]:
        widths = transformer.text_widths(model, streams)
        return inputs.dummy_batch(shape, batch_size, {name: (MAX_TOKENS, widths[name]) for name in streams}, self.context.dtype, device)

    def enter(self, model: nn.Module, batch: Batch, noise: Noise) -> BlockState:
        return transformer.enter(model, batch, noise, self._tables)

    def call_block(self, block: nn.Module, state: BlockState) -> BlockState:
        return transformer.call_block(block, state)

    def exit(self, model: nn.Module, state: BlockState) -> Prediction:
        return transformer.exit(model, state)

    def block_set(self, model: nn.Module) -> BlockSet:
        return BlockSet.of(model, transformer.transformer_blocks(model))

    # --- adapters ------------------------------------------------------------------------------------------------
    def adapter_targets(self, model: nn.Module, streams: Sequence[str]) -> list[str]:
        return target_names([name for name, _ in model.named_parameters()], streams)

    def original_name(self, module_name: str) -> str:
        return keys.to_original("transformer", module_name)

    def module_name(self, original_name: str) -> str:
        name = keys.to_diffusers("transformer", original_name)
        if name is None:
            raise CheckpointError("no module of the transformer has this name", value=original_name)
        return name

    # --- sampling ------------------------------------------------------------------------------------------------
    def check_request(self, request: SampleRequest) -> None:
        """At least two latents a side: the decoder reflects at the border."""
        sampling.check_request(request, self.geometry)

    def sample(
        self,
        model: nn.Module,
        source: WeightSource,
        requests: Sequence[SampleRequest],
        run_blocks: BlockFunction,
        streams: Sequence[str],
    ) -> list[Generated]:
        """Sound is generated where it is asked for and `model` has the audio stream."""
        for request in requests:
            sampling.check_request(request, self.geometry)
        variant, dtype, device = variant_of(source), self.context.dtype, next(model.parameters()).device
        prompts = sampling.encode_prompts(TextEncoder(source, variant, dtype, self.text_encoder), requests, device)

        def predict(batch: Batch, noise: Noise) -> Prediction:
            return self.exit(model, run_blocks.run(self.enter(model, batch, noise)))

        was_training = model.training
        model.eval()  # no dropout in adapters
        try:
            latents = []
            for request, prompt in zip(requests, prompts, strict=True):
                grids = sampling.grids_for(request, streams)
                noise = sampling.initial_noise(request.seed, grids)
                latents.append(sampling.denoise(predict, request, prompt, noise, grids, self.token_shift, device))
        finally:
            model.train(was_training)
        decoders = VideoDecoder(source, variant, self._convolution_dtype()), AudioDecoder(source, variant, self._convolution_dtype())
        return sampling.decode(requests, latents, *decoders, device)


def target_names(parameters: Iterable[str], streams: Sequence[str]) -> list[str]:
    """Names of the linear layers that LoRA trains by default, given a model's parameter names: only modules of `streams`.

    With both streams 1,152 in the attentions of 48 blocks; where sound is trained, 96 more in its feed-forwards and 2 (2.3) or 4 (2.0)
    outside the blocks: 1,252 for LTX-2.0.
    """
    skip = transformer.skip_for(streams)
    modules = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight") and not skip(name)]
    return [module for module in modules if _is_target(module)]


def _is_target(module: str) -> bool:
    if not module.startswith(transformer.BLOCKS + "."):
        return module in AUDIO_TARGETS
    inside = module.split(".", 2)[2]
    return module.endswith(ATTENTION_TARGETS) or inside.startswith("audio_ff.")


def block_counts(headers: Mapping[str, TensorHeader]) -> dict[str, int]:
    """Number of parameters of each block, by its index."""
    counts: dict[str, int] = {}
    for name, header in headers.items():
        if name.startswith(transformer.BLOCKS + "."):
            index = name.split(".")[1]
            counts[index] = counts.get(index, 0) + header.count
    return counts
