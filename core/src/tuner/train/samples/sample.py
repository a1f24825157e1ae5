"""Sampling outside a training run."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from tuner.config.resolve import Settings
from tuner.config.settings import AdapterSettings
from tuner.config.validation_settings import ValidationSettings
from tuner.data.decode import decode_frames, decode_sound
from tuner.errors import ConfigError, DataError, OutOfMemoryError
from tuner.interfaces.encoders import AudioClip, Record, Source, VideoClip
from tuner.interfaces.family import Generated, SampleRequest
from tuner.interfaces.memory import Placement
from tuner.model.adapters import adapted_layers, add_adapters, load_adapter_state
from tuner.model.exhausted import lacking_memory
from tuner.model.runner import BlockRunner
from tuner.plugins.registry import Registry
from tuner.train.plan import ModelPlan
from tuner.train.planning import plan_model
from tuner.train.samples.adapters import locate_adapter
from tuner.train.samples.validate import adjustments, check_target, default_device, planned_request, write_sample
from tuner.train.saving.adapter_files import check_adapter, read_adapter
from tuner.train.saving.results import load_full

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What training left, to be put over the base model."""

    weights: Path | None = None
    """Full weights: the file that full fine-tuning writes, or its run folder."""
    lora: str = ""
    """An adapter file, the run or checkpoint folder that holds one, or `repository:file` of the hub."""
    strength: float = 1.0
    """Scale of the adapter; 0 leaves it out."""


@dataclass(frozen=True)
class GivenFiles:
    """What a clip is made from beside its prompt."""

    first_frame: Path | None = None
    """A picture, or a clip whose first frame is taken."""
    sound: Path | None = None
    """A sound, or a clip whose sound is taken."""


NOTHING_GIVEN = GivenFiles()


def sample(
    registry: Registry, settings: Settings, prompt: str, target: Path, trained: Trained, no_sound: bool, given: GivenFiles = NOTHING_GIVEN
) -> Path:
    """Generates one clip and writes it to `target`. Raises `ConfigError` where that is no place for one, before anything is loaded."""
    check_target(target)
    return write_sample(generate(registry, settings, prompt, trained, no_sound, given), target)


def generate(
    registry: Registry, settings: Settings, prompt: str, trained: Trained, no_sound: bool = False, given: GivenFiles = NOTHING_GIVEN
) -> Generated:
    """One clip of what the validation keys describe. Raises `ConfigError`, `CheckpointError`, `DataError` for a file that is given."""
    if no_sound and given.sound is not None:
        raise ConfigError("a sound is given, and none is wanted", where="--no-sound, --sound", value=str(given.sound))
    if not math.isfinite(trained.strength):
        raise ConfigError("must be a finite number", where="--strength", value=trained.strength)
    if trained.strength != 1 and not trained.lora:
        raise ConfigError("is the scale of an adapter, and none is given", where="--strength", value=trained.strength, remedy="add --lora")
    if trained.lora:  # a mistyped place is told before anything that the run there would have answered
        locate_adapter(trained.lora, "--lora", preview=True)
    plan = plan_model(registry, settings, default_device())
    if trained.weights is not None and "transformer" in plan.memory.quantizers:
        raise ConfigError(
            "full weights are not put over a quantized model", where="base_model_precision", value=plan.memory.precision("transformer"),
            remedy="set it to no_change",
        )  # fmt: skip
    family = plan.family
    family.check_sampling(plan.source)
    streams = tuple(name for name in family.stream_names if not (no_sound and name != "video"))
    request = _request(plan, prompt, sound=not no_sound)
    device = plan.context.device
    request = _with_given(plan, request, streams, given)
    placement = plan.memory.open("transformer", family.inspect(plan.source, streams).blocks, device)
    try:
        model = _trained_model(plan, streams, trained, placement)
        blocks = family.block_set(model)
        runner = BlockRunner(blocks, family.call_block, session=placement.attach(blocks))
        return family.sample(model, plan.source, [request], runner, streams)[0]
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not (lacking := lacking_memory(error)):
            raise
        raise OutOfMemoryError(
            f"not enough {lacking} memory for a clip of {request.width}x{request.height} and {request.frames} frames", where="sampling",
            remedy="lower validation_resolution or validation_num_video_frames, or see `tuner plan` for where weights take less",
        ) from error  # fmt: skip
    finally:
        placement.close()


def _request(plan: ModelPlan, prompt: str, *, sound: bool) -> SampleRequest:
    validation = plan.settings.get(ValidationSettings)
    if not (prompt or validation.validation_prompt):
        raise ConfigError("nothing to generate", where="--prompt", remedy='add --prompt "..."')
    for notice in adjustments(plan.family, plan.settings):
        log.info(notice)
    request = planned_request(plan.family, plan.settings, sound=sound)
    return replace(request, prompt=prompt or request.prompt)


def _with_given(plan: ModelPlan, request: SampleRequest, streams: Sequence[str], given: GivenFiles) -> SampleRequest:
    """Encodes what is given, at the request's size and length, before the model is loaded."""
    nothing = Record({})
    first = nothing if given.first_frame is not None else None
    plan.family.check_request(replace(request, first_frame=first, given_sound=nothing if given.sound is not None else None))
    if given.first_frame is not None:
        pixels = decode_frames(_existing(given.first_frame, "--first-frame"), 1, request.frame_rate, (request.width, request.height))
        clip = VideoClip(torch.from_numpy(pixels), request.frame_rate)
        request = replace(request, first_frame=_encoded(plan, streams, "video", clip))
    if given.sound is not None:
        rate, channels = plan.family.geometry.sample_rate, plan.family.geometry.audio_channels
        sound = decode_sound(_existing(given.sound, "--sound"), request.frames / request.frame_rate, rate, channels)
        if sound is None:
            raise DataError("holds no sound", where="--sound", value=str(given.sound))
        request = replace(request, given_sound=_encoded(plan, streams, "audio", AudioClip(torch.from_numpy(sound[0]), rate, sound[1])))
    return request


def _existing(path: Path, where: str) -> Path:
    if not path.is_file():
        raise ConfigError("there is no such file", where=where, value=str(path))
    return path


def _encoded(plan: ModelPlan, streams: Sequence[str], reads: str, source: Source) -> Record:
    encoders = plan.family.encoders(plan.source, streams)
    encoder = next((encoder for encoder in encoders if encoder.reads == reads and encoder.of == "clip"), None)
    if encoder is None:
        raise ConfigError(f"{plan.family_name} takes none of it", where="--first-frame" if reads == "video" else "--sound")
    try:
        encoder.load(plan.context.device)
        return encoder.encode([source])[0]
    finally:
        encoder.unload()


def _trained_model(plan: ModelPlan, streams: Sequence[str], trained: Trained, placement: Placement) -> nn.Module:
    """The base model with `trained` over it, in evaluation mode. An adapter is checked before the model is loaded."""
    headers = plan.source.headers("transformer")
    adapter = None
    if trained.lora and trained.strength:
        found = locate_adapter(trained.lora, "--lora")
        assert found is not None
        adapter = read_adapter(plan.registry, found)
        check_adapter(adapter, headers, trained.lora)
    model = plan.family.load(plan.source, streams, plan.context.dtype, plan.context.device, placement)
    model.requires_grad_(False)
    if trained.weights is not None:
        load_full(plan.family, model, headers, trained.weights)
    if adapter is not None:
        loaded = {name for name, _ in model.named_modules()}  # without sound its layers are not there
        weights = {name: (a, b * trained.strength) for name, (a, b) in adapter.weights.items() if name in loaded}
        adapter = replace(adapter, weights=weights)
    if adapter is not None and adapter.weights:
        add_adapters(model, tuple(adapter.weights), AdapterSettings(lora_rank=adapter.rank, lora_alpha=adapter.alpha), 0)
        load_adapter_state(model, adapter)
        for layer in adapted_layers(model).values():  # of layers that live in host memory they were made there
            for matrices in (layer.lora_A, layer.lora_B):
                matrices.to(plan.context.device)
    return model.eval()
