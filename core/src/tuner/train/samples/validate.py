"""From the validation keys to a request, and from what a model generated to a file."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tuner.config.resolve import Settings
from tuner.config.settings import DataSettings, ModelSettings
from tuner.config.validation_settings import ValidationSettings
from tuner.data.media import write_mp4, write_wav
from tuner.errors import ConfigError, DiskError, NumericError
from tuner.interfaces.family import Generated, ModelFamily, SampleRequest
from tuner.train.samples.prompts import prompts


def write_sample(generated: Generated, target: Path) -> Path:
    """Writes picture and sound to `target`, making its folder; sound alone to a .wav of the same name. Returns what was written.

    Raises `DiskError`, and `NumericError` for numbers that are not finite, which no encoder of sound takes.
    """
    sound = () if generated.sound is None else (generated.sound.samples,)
    if not all(bool(tensor.isfinite().all()) for tensor in (*generated.latents.values(), *sound)):
        raise NumericError(
            "the model gave numbers that are not finite, so there is no clip", where="sample",
            remedy="lower learning_rate, or use an earlier checkpoint",
        )  # fmt: skip
    if generated.video is not None:
        write_mp4(target, generated.video, generated.sound)
        return target
    if generated.sound is None:
        raise ConfigError("the model gave neither picture nor sound")
    target = target.with_suffix(".wav")
    write_wav(target, generated.sound)
    return target


def planned_request(family: ModelFamily, settings: Settings, *, sound: bool) -> SampleRequest:
    """The request that the validation keys describe, snapped to what the family can make. Raises `ConfigError`."""
    validation = settings.get(ValidationSettings)
    width, height = parse_resolution(validation.validation_resolution)
    own = _own_defaults(family, settings)
    request = SampleRequest(
        prompt=validation.validation_prompt,
        negative_prompt=validation.validation_negative_prompt,
        width=family.geometry.snap_size(width),
        height=family.geometry.snap_size(height),
        frames=family.geometry.snap_frames(validation.validation_num_video_frames),
        frame_rate=settings.get(DataSettings).frame_rate or family.geometry.default_frame_rate,
        steps=int(own.get("validation_num_inference_steps", validation.validation_num_inference_steps)),
        guidance=own.get("validation_guidance", validation.validation_guidance),
        audio_guidance=validation.validation_audio_guidance,
        seed=validation.validation_seed,
        sound=sound,
    )
    family.check_request(request)
    return request


def _own_defaults(family: ModelFamily, settings: Settings) -> dict[str, float]:
    """The family's values for this model, of the keys that the user left at their defaults."""
    wanted = family.request_defaults(settings.get(ModelSettings))
    return {key: value for key, value in wanted.items() if settings.origin(key) == "default"}


def adjustments(family: ModelFamily, settings: Settings) -> tuple[str, ...]:
    """What `planned_request` changes to a size that the family can make, or to what suits the model, in words."""
    asked = settings.get(ValidationSettings)
    width, height = parse_resolution(asked.validation_resolution)
    request = planned_request(family, settings, sound=False)
    frames = asked.validation_num_video_frames
    changed = [
        f"{key}: {settings.value(key):g} -> {value:g} (what this model samples with; set it to choose another)"
        for key, value in _own_defaults(family, settings).items()
        if settings.value(key) != value
    ]
    if (width, height) != (request.width, request.height):
        step = family.geometry.size_step
        changed.append(f"validation_resolution: {width}x{height} -> {request.width}x{request.height} (sides are multiples of {step})")
    if frames != request.frames:
        changed.append(f"validation_num_video_frames: {frames} -> {request.frames} (valid counts are 1 + k·{family.geometry.frame_step})")
    return tuple(changed)


def check_target(target: Path) -> None:
    """Raises `ConfigError` or `DiskError` for a place that no clip can be written to, before time is spent on making it."""
    if target.is_dir():
        raise ConfigError("is a folder", where="--output", value=str(target), remedy="name the file to write, for example sample.mp4")
    if target.suffix.lower() != ".mp4":
        raise ConfigError("clips are written as .mp4", where="--output", value=str(target), remedy="let the name end in .mp4")
    there = next(folder for folder in target.absolute().parents if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise DiskError("cannot be written", where=str(there), remedy="name another file with --output")


def wants_sample(settings: ValidationSettings) -> bool:
    """Whether samples of `validation_prompt` are made."""
    return bool(settings.validation_prompt) and not settings.validation_disable


def wants_samples(settings: ValidationSettings) -> bool:
    """Whether samples of any kind are asked for. Raises `ConfigError` for a prompt library that cannot be used."""
    return not settings.validation_disable and (settings.validation_using_datasets or bool(prompts(settings)))


def parse_resolution(text: str) -> tuple[int, int]:
    """"768x512" -> (768, 512): width x height; a single number is a square."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) in (1, 2) and all(part.strip().isdigit() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[-1])
    raise ConfigError("write width x height, for example 768x512", where="validation_resolution", value=text)


def default_device() -> torch.device:
    """The first GPU, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
