"""A small complete family over `MixingModel`: video and sound, cached, trained, saved, resumed, exported and sampled in a second or two.

For tests of plugins, and to be read by authors of families. Nothing is downloaded: weights are made from a seed into the cache folder.

Dimensions: B samples, S video tokens, L audio tokens, C latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from tuner.config.options import Options
from tuner.config.settings import ModelSettings
from tuner.errors import ConfigError
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
    Variant,
)
from tuner.interfaces.memory import Placement
from tuner.interfaces.services import TensorHeader, WeightSource
from tuner.testing import sampling, tokens
from tuner.testing.blocks import MixingModel, call_mixing_block
from tuner.testing.encoders import FRAME_STEP, SAMPLE_RATE, SIZE_STEP, TinySound, TinyText, TinyVideo, decode_sound, decode_video
from tuner.testing.options import TinyOptions
from tuner.testing.weights import CHANNELS, FAMILY, TinySource, to_module, to_published, write_tiny

MOST_TOKENS = 4096
"""Of a generated clip: attention is plain and takes the square of it."""


class TinyFamily(ModelFamily):
    """Streams "video" and "audio"; every clip needs a picture."""

    options_type: ClassVar[type[Options]] = TinyOptions
    geometry: ClassVar[Geometry] = Geometry(FRAME_STEP, SIZE_STEP, SAMPLE_RATE, 1, 25.0)
    stream_names: ClassVar[tuple[str, ...]] = ("video", "audio")
    token_shift: ClassVar[TokenShift] = TokenShift(0.5, 1.15, 16, 4096)

    def __init__(self, options: TinyOptions, context: BuildContext) -> None:
        self.options = options
        self.context = context

    # --- before anything is loaded -------------------------------------------------------------------------------
    def locate(self, settings: ModelSettings, cache_dir: Path) -> Located:
        given = settings.pretrained_model_name_or_path
        if given:
            if not Path(given).is_file():
                raise ConfigError("is no file", where="pretrained_model_name_or_path", value=given, remedy="leave it out: one is made")
            return Located(Path(given), Path(given).name)
        path = write_tiny(cache_dir / FAMILY, blocks=self.options.tiny_blocks, width=self.options.tiny_width)
        return Located(path, path.name)

    def inspect(self, source: WeightSource, streams: Sequence[str]) -> ModelFacts:
        headers = {name: header for name, header in source.headers("transformer").items() if _is_used(name, streams)}
        first = {name.removeprefix("blocks.0."): header for name, header in headers.items() if name.startswith("blocks.0.")}
        layers = {name.removesuffix(".weight"): header.shape for name, header in first.items() if name.endswith(".weight")}
        width = torch.empty((), dtype=self.context.dtype).element_size()
        parameters, blocks = sum(header.count for header in headers.values()), _depth(headers)
        return ModelFacts(
            Variant(FAMILY, "1", {"transformer": {}}), parameters, blocks, sum(h.count for h in first.values()) * width, parameters * width,
            adapter_targets=blocks * len(layers), linear_shapes=tuple((shape[0], shape[1]) for shape in layers.values()),
            linear_names=tuple(layers),
        )  # fmt: skip

    def encoders(
        self, source: WeightSource, streams: Sequence[str], companions: frozenset[str] = frozenset()
    ) -> Sequence[LatentEncoder]:
        if companions:
            raise ConfigError(f"{FAMILY} takes no {' and no '.join(sorted(companions))}", where="datasets", remedy="leave them out")
        return (TinyText(source), TinyVideo(), *((TinySound(),) if "audio" in streams else ()))

    def select_streams(self, available: frozenset[str]) -> tuple[str, ...]:
        """Raises `ConfigError` where there is no picture."""
        if "video" not in available:
            raise ConfigError(f"{FAMILY} learns pictures, and the dataset has none", where="datasets", remedy="add clips")
        return super().select_streams(available if self.options.tiny_audio else available - {"audio"})

    # --- the training model --------------------------------------------------------------------------------------
    def load(
        self, source: WeightSource, streams: Sequence[str], dtype: torch.dtype, device: torch.device, placement: Placement | None = None
    ) -> nn.Module:
        model = self._meta(source, streams, dtype, 0)
        stored = dict(source.tensors("transformer"))
        reading = placement.reading if placement is not None else device
        for index, block in enumerate(model.blocks):
            _fill(block, stored, f"blocks.{index}.", reading)
            if placement is not None:
                placement.received(index, block)
        for name, child in model.named_children():
            if name != "blocks":
                _fill(child, stored, f"{name}.", device)
        return model.eval().requires_grad_(False)

    def empty(self, source: WeightSource, streams: Sequence[str], dtype: torch.dtype, blocks: int = 0) -> nn.Module | None:
        return self._meta(source, streams, dtype, blocks).eval().requires_grad_(False)

    def _meta(self, source: WeightSource, streams: Sequence[str], dtype: torch.dtype, blocks: int) -> MixingModel:
        headers = source.headers("transformer")
        with torch.device("meta"):
            width = headers["proj_in.weight"].shape[0]
            return MixingModel(blocks or _depth(headers), width, CHANNELS, sound="audio" in streams).to(dtype)

    def collate(self, samples: Sequence[Sample], streams: Sequence[str]) -> Batch:
        return tokens.collate(samples, streams)

    def dummy_batch(
        self, model: nn.Module, shape: ClipShape, batch_size: int, streams: Sequence[str], device: torch.device
    ) -> tuple[Batch, Noise]:
        return tokens.dummy_batch(shape, batch_size, streams, self.context.dtype, device)

    def enter(self, model: nn.Module, batch: Batch, noise: Noise) -> BlockState:
        assert isinstance(model, MixingModel)
        given, drawn, dtype = batch.streams["video"], noise.streams["video"], model.proj_in.weight.dtype
        sigma = drawn.sigma[:, None].expand(drawn.noisy.shape[:2])
        if given.conditioned is not None:
            sigma = sigma * ~given.conditioned
        sound, audio, audio_sigma, heard = batch.streams.get("audio"), None, None, None
        if sound is not None:
            audio, audio_sigma = noise.streams["audio"].noisy.to(dtype), noise.streams["audio"].sigma
            heard = tokens.heard(sound)
        state = model.enter(
            drawn.noisy.to(dtype), audio, batch.text["video"].to(dtype), sigma.to(dtype), audio_sigma=audio_sigma, heard=heard
        )
        video = replace(state.streams["video"], grid=given.grid, protected=given.conditioned)
        return BlockState({**state.streams, "video": video}, state.shared)

    def call_block(self, block: nn.Module, state: BlockState) -> BlockState:
        return call_mixing_block(block, state)

    def exit(self, model: nn.Module, state: BlockState) -> Prediction:
        assert isinstance(model, MixingModel)
        return Prediction(model.exit(state))

    def block_set(self, model: nn.Module) -> BlockSet:
        assert isinstance(model, MixingModel)
        return model.block_set()

    # --- adapters ------------------------------------------------------------------------------------------------
    def adapter_targets(self, model: nn.Module, streams: Sequence[str]) -> list[str]:
        return [name for name, module in model.named_modules() if name.startswith("blocks.") and isinstance(module, nn.Linear)]

    def original_name(self, module_name: str) -> str:
        return to_published(module_name)

    def module_name(self, original_name: str) -> str:
        return to_module(original_name)

    # --- sampling ------------------------------------------------------------------------------------------------
    def check_request(self, request: SampleRequest) -> None:
        frames, rows, columns = tokens.video_grid(request.frames, request.height, request.width)
        if frames * rows * columns > MOST_TOKENS:
            raise ConfigError(
                f"{FAMILY} makes clips of at most {MOST_TOKENS} tokens of {SIZE_STEP}x{SIZE_STEP} pixels and {FRAME_STEP} frames",
                where="validation_resolution", value=f"{request.width}x{request.height}, {request.frames} frames", remedy="use 64x64",
            )  # fmt: skip

    @torch.no_grad()
    def sample(
        self, model: nn.Module, source: WeightSource, requests: Sequence[SampleRequest], run_blocks: BlockFunction, streams: Sequence[str]
    ) -> list[Generated]:
        """Euler steps from noise, guided where the request asks for it."""
        prompts = sampling.encode_prompts(source, requests, self.context.device)
        return [self._generate(model, request, prompts, run_blocks, streams) for request in requests]

    def _generate(
        self, model: nn.Module, request: SampleRequest, prompts: Mapping[str, Tensor], run_blocks: BlockFunction, streams: Sequence[str]
    ) -> Generated:
        seconds, device = request.frames / request.frame_rate, next(model.parameters()).device
        wanted = [name for name in streams if name == "video" or request.sound or request.given_sound is not None]
        clip = sampling.start(request, tokens.grids(request.frames, request.height, request.width, seconds, wanted), device)
        text = torch.stack([prompts[prompt] for prompt in request.texts]).to(device)
        for sigma, following in pairwise(torch.linspace(1, 0, request.steps + 1).tolist()):
            batch, noise = clip.inputs(text, sigma, request.frame_rate)
            velocity = self.exit(model, run_blocks.run(self.enter(model, batch, noise))).streams
            clip.advance({name: sampling.guided(values.float(), request.guidance) for name, values in velocity.items()}, following - sigma)
        found = {name: values.cpu() for name, values in clip.latents.items()}
        picture = decode_video(found["video"][0].T.reshape(CHANNELS, *clip.grids["video"]), request.frame_rate)
        return Generated(picture, decode_sound(found["audio"][0], seconds) if "audio" in found else None, found)


def _is_used(name: str, streams: Sequence[str]) -> bool:
    return "audio" in streams or ".audio." not in name


def _depth(headers: Mapping[str, TensorHeader]) -> int:
    return 1 + max(int(name.split(".")[1]) for name in headers if name.startswith("blocks."))


def _fill(module: nn.Module, stored: Mapping[str, Tensor], lead: str, device: torch.device) -> None:
    """Gives a module on the meta device its stored weights, in the dtype it has."""
    state = {name: stored[lead + name].to(device, parameter.dtype) for name, parameter in module.named_parameters()}
    module.load_state_dict(state, assign=True)


def tiny_source(folder: Path, *, blocks: int = 4, width: int = 16) -> WeightSource:
    """The tiny model's file in `folder`, made where it is not there, opened."""
    path = write_tiny(folder, blocks=blocks, width=width)
    return TinySource(path, path.name)
