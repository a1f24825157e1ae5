"""LTX-2 as the core sees it: what a checkpoint holds, which encoders feed it, its forward pass, its LoRA targets, its samples.

Special here: nothing is computed in this file. It names the streams and hands each question to the module that answers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from tuner.config.options import Options
from tuner.config.settings import ModelSettings
from tuner.errors import CheckpointError, ConfigError
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
from tuner.interfaces.services import CardFacts, TensorHeader, WeightSource
from tuner_ltxvideo2 import conditioning, hub, inputs, keys, loading, sampling, sides, transformer
from tuner_ltxvideo2.audio_latents import AudioDecoder, AudioLatentEncoder
from tuner_ltxvideo2.block import call_block
from tuner_ltxvideo2.card import card_facts
from tuner_ltxvideo2.companions import MaskEncoder, ReferenceEncoder, file_facts
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.text import MAX_TOKENS, TextEncoder
from tuner_ltxvideo2.variants import check_decoder, sampling_defaults, variant_of
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
    caption_tokens: ClassVar[int] = MAX_TOKENS

    def __init__(self, options: LTX2Options, context: BuildContext, text_encoder: Path | None = None) -> None:
        """`text_encoder`: its folder, where it does not lie beside the weights; `locate` sets it too."""
        self.options = options
        self.context = context
        self.text_encoder = text_encoder
        self.distilled = False
        """Whether the model was made for few steps; `locate` sets it."""
        self._conditioning = conditioning.Conditioning.of(options)
        self._tables = transformer.RotaryTables()

    # --- before anything is loaded -------------------------------------------------------------------------------
    def locate(self, settings: ModelSettings, cache_dir: Path) -> Located:
        return self._locate(settings, cache_dir, None)

    def preview(self, settings: ModelSettings, scratch: Path) -> Located:
        """Headers of weights that would be downloaded are put into `scratch`."""
        return self._locate(settings, scratch, scratch)

    def _locate(self, settings: ModelSettings, cache_dir: Path, scratch: Path | None) -> Located:
        location, flavour = settings.pretrained_model_name_or_path, settings.model_flavour
        files = hub.locate_model(location, settings.revision, flavour, settings.text_encoder_path, cache_dir, scratch=scratch)
        self.text_encoder = files.text_encoder
        self.distilled = hub.is_distilled(location, flavour)
        return Located(files.weights, files.description, files.downloads)

    def inspect(self, source: WeightSource, streams: Sequence[str]) -> ModelFacts:
        variant = variant_of(source)
        skip = sides.skip_for(streams)
        headers = {name: header for name, header in source.headers("transformer").items() if not skip(name)}
        width = torch.empty((), dtype=self.context.dtype).element_size()
        counts = block_counts(headers)
        parameters = sum(header.count for header in headers.values())
        layers = linear_layers(headers, max(counts, key=lambda index: counts[index]))
        return ModelFacts(
            variant, parameters, blocks=len(counts), block_bytes=max(counts.values()) * width, bytes=parameters * width,
            adapter_targets=len(target_names(headers, streams, self.learned_streams(streams))),
            linear_shapes=tuple(layers.values()), linear_names=tuple(layers),
        )

    def encoders(
        self, source: WeightSource, streams: Sequence[str], companions: frozenset[str] = frozenset()
    ) -> Sequence[LatentEncoder]:
        variant = variant_of(source)
        wanted: list[LatentEncoder] = [TextEncoder(source, variant, self.context.dtype, self.text_encoder, self.context.memory)]
        if "video" in streams:
            wanted.append(VideoLatentEncoder(source, variant, self._convolution_dtype(), self.options, self.context.memory))
        if "audio" in streams:
            wanted.append(AudioLatentEncoder(source, variant, self._convolution_dtype(), self.context.memory))
        if "video" in self.learned_streams(streams):
            if "reference" in companions:
                wanted.append(ReferenceEncoder(source, variant, self._convolution_dtype(), self.options, self.context.memory))
            if "mask" in companions:
                wanted.append(MaskEncoder())
        return wanted

    def _convolution_dtype(self) -> torch.dtype:
        """Of the VAEs and the vocoder: the run's, but float32 on a CPU, whose bfloat16 convolutions take minutes a clip."""
        return torch.float32 if self.context.device.type == "cpu" else self.context.dtype

    def select_streams(self, available: frozenset[str]) -> tuple[str, ...]:
        """Sound is left out where `train_audio` is off or no clip has any.

        Raises `ConfigError` where nothing is left to learn, or nothing to give.
        """
        streams = super().select_streams(available if self.options.train_audio else available - {"audio"})
        given = self.options.given_stream
        if given != "none" and given not in streams:
            why = "train_audio is off" if given in available else f"no item of the dataset has {given}"
            raise ConfigError(f"there is nothing to give: {why}", where="given_stream", value=given)
        if not self.learned_streams(streams):
            where, value = ("train_audio", False) if given == "none" else ("given_stream", given)
            has = " and ".join(sorted(available))
            raise ConfigError(f"the dataset has {has} alone, so nothing is learned", where=where, value=value)
        return streams

    def learned_streams(self, streams: Sequence[str]) -> tuple[str, ...]:
        """All but `given_stream`."""
        return tuple(name for name in streams if name != self.options.given_stream)

    def stream_weights(self) -> Mapping[str, float]:
        return {"audio": self.options.audio_loss_weight}

    def notices(self) -> Sequence[str]:
        return conditioning.notices(self.options)

    def file_facts(self, companions: Mapping[str, Sequence[tuple[ClipShape, ClipShape]]]) -> Mapping[str, str]:
        """`reference_downscale_factor` where the clips have references, all of them so much smaller."""
        return file_facts(companions)

    def card_facts(self, settings: ModelSettings, given: frozenset[str]) -> CardFacts:
        return card_facts(settings, self.options, given)

    # --- the training model --------------------------------------------------------------------------------------
    def load(
        self, source: WeightSource, streams: Sequence[str], dtype: torch.dtype, device: torch.device, placement: Placement | None = None
    ) -> nn.Module:
        """Frozen and in evaluation mode; modules that `streams` do not need are neither read nor there."""
        return loading.build_part(
            source, "transformer", variant_of(source), dtype=dtype, device=device, placement=placement,
            prepare=lambda model: sides.drop_unused(model, streams),
        )

    def empty(self, source: WeightSource, streams: Sequence[str], dtype: torch.dtype, blocks: int = 0) -> nn.Module | None:
        variant = variant_of(source)
        config = {**variant.config["transformer"], **({"num_layers": blocks} if blocks else {})}
        model = loading.empty_part("transformer", replace(variant, config={"transformer": config}))
        sides.drop_unused(model, streams)
        return nn.Module.to(model, dtype).eval().requires_grad_(False)  # diffusers' own `to` warns of every change of dtype

    def collate(self, samples: Sequence[Sample], streams: Sequence[str]) -> Batch:
        given = self.options.given_stream
        return inputs.collate(samples, streams, seed=self.context.seed, rules=self._conditioning, given=given)

    def collate_fixed(self, samples: Sequence[Sample], streams: Sequence[str]) -> Batch:
        """Without the conditioning that is drawn: a mask, a reference or the first frame of `is_i2v` stay given."""
        return inputs.collate(samples, streams, given=self.options.given_stream)

    def dummy_batch(
        self, model: nn.Module, shape: ClipShape, batch_size: int, streams: Sequence[str], device: torch.device
    ) -> tuple[Batch, Noise]:
        widths = sides.text_widths(model, streams)
        text = {name: (MAX_TOKENS, widths[name]) for name in streams}
        return inputs.dummy_batch(shape, batch_size, text, self.context.dtype, device, self.options.given_stream)

    def enter(self, model: nn.Module, batch: Batch, noise: Noise) -> BlockState:
        return transformer.enter(model, batch, noise, self._tables)

    def call_block(self, block: nn.Module, state: BlockState) -> BlockState:
        return call_block(block, state)

    def exit(self, model: nn.Module, state: BlockState) -> Prediction:
        return transformer.exit(model, state)

    def block_set(self, model: nn.Module) -> BlockSet:
        return BlockSet.of(model, sides.transformer_blocks(model), sides.widths(model))

    # --- adapters ------------------------------------------------------------------------------------------------
    def adapter_targets(self, model: nn.Module, streams: Sequence[str]) -> list[str]:
        return target_names([name for name, _ in model.named_parameters()], streams, self.learned_streams(streams))

    def original_name(self, module_name: str) -> str:
        return keys.to_original("transformer", module_name)

    def module_name(self, original_name: str) -> str:
        name = keys.to_diffusers("transformer", original_name)
        if name is None:
            raise CheckpointError("no module of the transformer has this name", value=original_name)
        return name

    # --- sampling ------------------------------------------------------------------------------------------------
    def check_sampling(self, source: WeightSource) -> None:
        check_decoder(variant_of(source))

    def request_defaults(self, settings: ModelSettings) -> Mapping[str, float]:
        """A distilled model samples in 8 steps without guidance."""
        return sampling_defaults(hub.is_distilled(settings.pretrained_model_name_or_path, settings.model_flavour))

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
        given = [sampling.given_tokens(request, streams) for request in requests]

        def text_encoder() -> TextEncoder:
            return TextEncoder(source, variant, dtype, self.text_encoder, self.context.memory)

        prompts = sampling.encode_prompts(text_encoder, requests, device)

        def predict(batch: Batch, noise: Noise) -> Prediction:
            return self.exit(model, run_blocks.run(self.enter(model, batch, noise)))

        was_training = model.training
        model.eval()  # no dropout in adapters
        try:
            latents = []
            for request, prompt, known in zip(requests, prompts, given, strict=True):
                start = sampling.Start.of(request, streams, known)
                latents.append(sampling.denoise(predict, request, prompt, start, self.token_shift, device, distilled=self.distilled))
        finally:
            model.train(was_training)
        convolutions, memory = self._convolution_dtype(), self.context.memory
        decoders = VideoDecoder(source, variant, convolutions, self.options, memory), AudioDecoder(source, variant, convolutions, memory)
        return sampling.decode(requests, latents, *decoders, device)


def target_names(parameters: Iterable[str], streams: Sequence[str], learned: Sequence[str] | None = None) -> list[str]:
    """Names of the linear layers that LoRA trains by default, given a model's parameter names: only modules of `streams`.

    With both streams 1,152 in the attentions of 48 blocks; where sound is trained, 96 more in its feed-forwards and 2 (2.3) or 4 (2.0)
    outside the blocks: 1,252 for LTX-2.0. Where one stream is given (`learned` names the other; None: all of `streams`) only the learned
    stream's own modules and the cross-modal attention that reads the given one into it: the given stream then runs as in the base model.
    """
    skip = sides.skip_for(streams)
    modules = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight") and not skip(name)]
    return [module for module in modules if _is_target(module) and _is_learned(module, frozenset(streams if learned is None else learned))]


def _is_target(module: str) -> bool:
    if not module.startswith(sides.BLOCKS + "."):
        return module in AUDIO_TARGETS
    inside = module.split(".", 2)[2]
    return module.endswith(ATTENTION_TARGETS) or inside.startswith("audio_ff.")


def _is_learned(module: str, learned: frozenset[str]) -> bool:
    """Whether the module works on the learned streams alone, or reads another one into them."""
    into = [f".{side.cross_attention}." for side in sides.SIDES if side.name in learned]
    return sides.streams_of(module) <= learned or any(name in module for name in into)


def linear_layers(headers: Mapping[str, TensorHeader], block: str) -> dict[str, tuple[int, int]]:
    """Name inside the block -> (out, in) of its linear layers, in order: its only weights with two dimensions."""
    lead, end = f"{sides.BLOCKS}.{block}.", ".weight"
    weights = {name: header.shape for name, header in headers.items() if name.startswith(lead) and name.endswith(end)}
    return {name[len(lead) : -len(end)]: (shape[0], shape[1]) for name, shape in weights.items() if len(shape) == 2}


def block_counts(headers: Mapping[str, TensorHeader]) -> dict[str, int]:
    """Number of parameters of each block, by its index."""
    counts: dict[str, int] = {}
    for name, header in headers.items():
        if name.startswith(sides.BLOCKS + "."):
            index = name.split(".")[1]
            counts[index] = counts.get(index, 0) + header.count
    return counts
