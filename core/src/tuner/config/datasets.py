"""The dataset file: a JSON list of entries, checked as a whole so that every problem of every entry is shown at once.

Keys of other tools that this version does not act on are known by name: where they would change what is trained they are an
error with the entry's id. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuner.config.settings import DataSettings
from tuner.errors import ConfigError, DataError

CaptionStrategy = Literal["textfile", "filename", "instanceprompt"]
ResolutionType = Literal["pixel", "pixel_area", "area"]

LATER = "not supported in this version"
OTHER_TYPES = frozenset({"s3", "aws", "csv", "huggingface"})
OTHER_DATASETS = frozenset({"image", "audio", "image_embeds", "eval", "conditioning"})


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VideoOptions(_Section):
    """`video` of an entry. Frames are counted at `frame_rate`, after resampling by presentation time."""

    num_frames: int | None = Field(default=None, ge=1)
    """Frames taken from each clip, from its start; the family's next lower valid count is used. Empty: as many as a clip has, at
    most `tuner.data.manifest.LONGEST`."""
    min_frames: int | None = Field(default=None, ge=1)
    """Shorter clips are skipped. Empty: `num_frames`. Below `num_frames`, shorter clips are used at their own valid length."""
    max_frames: int | None = Field(default=None, ge=1)
    """Longer clips are skipped."""
    frame_rate: float | None = Field(default=None, gt=0)
    """Frames per second that clips are resampled to; the run's `frame_rate` when empty."""
    bucket_strategy: str = "aspect_ratio"
    frame_interval: int | None = Field(default=None, ge=1)
    """Lengths below `num_frames` are rounded down to a multiple of it, so that fewer different lengths remain."""
    is_i2v: bool = False


class AudioOptions(_Section):
    """`audio` of an entry: the sound of its clips, as long as their picture."""

    auto_split: bool = True
    """Whether the clips' sound is trained."""
    audio_only: bool = False
    sample_rate: int | None = Field(default=None, ge=1)
    """Hz; must be what the family's audio encoder takes, to which all sound is resampled."""
    channels: int | None = Field(default=None, ge=1)
    """1: mix to mono, then feed every channel of the encoder. The encoder's own count, or empty: as recorded."""
    duration_interval: float | None = Field(default=None, gt=0)
    """Groups sound-only clips by length; sound that belongs to a picture has the picture's length."""
    min_duration_seconds: float | None = Field(default=None, ge=0)
    """Clips whose sound is shorter are skipped."""
    max_duration_seconds: float | None = Field(default=None, gt=0)
    """Clips whose sound is longer are skipped."""
    truncation_mode: str = "beginning"
    allow_zero_audio: bool = False
    """Clips without a sound track are trained with silence as their sound."""


class _Entry(_Section):
    id: str = Field(min_length=1)
    type: str = "local"
    dataset_type: str = "video"
    disabled: bool = False
    default: bool = False
    cache_dir: Path


class VideoEntry(_Entry):
    """A folder of clips."""

    instance_data_dir: Path
    caption_strategy: CaptionStrategy = "textfile"
    instance_prompt: str = ""
    resolution: float = Field(gt=0)
    resolution_type: ResolutionType
    repeats: int = Field(default=0, ge=0)
    """Additional passes: each clip is seen `repeats` + 1 times an epoch."""
    probability: float = 1.0
    video: VideoOptions = VideoOptions()
    audio: AudioOptions = AudioOptions()
    s2v_datasets: list[str] = Field(default_factory=list)


class TextEntry(_Entry):
    """Where encoded captions are kept."""


DatasetEntry = VideoEntry | TextEntry
_SECTIONS: Mapping[str, type[BaseModel]] = {"video": VideoOptions, "audio": AudioOptions}
_KINDS: Mapping[str, type[VideoEntry] | type[TextEntry]] = {"video": VideoEntry, "text_embeds": TextEntry}


def load_datasets(
    path: Path | None, data_dir: Path | None, settings: DataSettings, placeholders: Mapping[str, str]
) -> list[DatasetEntry]:
    """The enabled entries of the dataset file at `path`, or one video entry for the folder `data_dir`.

    Relative paths are relative to the working directory. `placeholders` (model_family, output_dir) and {id} are filled into
    `cache_dir`. Raises `ConfigError` with all problems together, `DataError` when a folder of clips is missing.
    """
    if (path is None) == (data_dir is None):
        raise ConfigError(
            "exactly one of a dataset file and a folder of clips is needed", where="data_backend_config, data",
            value={"data_backend_config": path and str(path), "data": data_dir and str(data_dir)}, remedy="give one of the two",
        )  # fmt: skip
    raw = _read(path) if path else [{"id": "data", "instance_data_dir": str(data_dir)}]
    entries, problems = _parse_all(raw, settings, placeholders)
    where = str(path) if path else "data"
    if not problems and not any(isinstance(entry, VideoEntry) for entry in entries):
        problems = ["no enabled entry has dataset_type `video`: there is nothing to train on"]
    if problems:
        raise ConfigError("the dataset file cannot be used:\n  " + "\n  ".join(problems), where=where)
    _require_folders(entries, where)
    return entries


def _read(path: Path) -> list[object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("the dataset file does not exist", where="data_backend_config", value=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the dataset file cannot be read: {error}", where="data_backend_config", value=str(path)) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}", where=str(path)) from error
    if not isinstance(content, list):
        raise ConfigError("a dataset file is a JSON list of entries", where=str(path), value=type(content).__name__)
    return content


def _parse_all(raw: Sequence[object], settings: DataSettings, placeholders: Mapping[str, str]) -> tuple[list[DatasetEntry], list[str]]:
    entries: list[DatasetEntry] = []
    problems: list[str] = []
    seen: set[str] = set()
    for number, item in enumerate(raw, 1):
        if not isinstance(item, dict):
            problems.append(f"entry {number}: must be an object with keys (got {item!r})")
            continue
        entry = _given(item)
        name = f"entry {entry['id']!r}" if entry.get("id") else f"entry {number}"
        if _is_true(entry.get("disabled")):
            continue
        if str(entry.get("id")) in seen:
            problems.append(f"{name}: this id is used twice; ids must differ")
        seen.add(str(entry.get("id")))
        parsed, found = _parse(entry, settings, placeholders)
        problems += [f"{name}: {problem}" for problem in found]
        if parsed:
            entries.append(parsed)
    return entries, problems


def _given(value: Mapping[str, object]) -> dict[str, object]:
    """Leaves out null and "", which mean the default, also inside `video` and `audio`."""
    kept = {key: _given(item) if isinstance(item, dict) else item for key, item in value.items()}
    return {key: item for key, item in kept.items() if item is not None and item != ""}


def _is_true(value: object) -> bool:
    return value is True or str(value).lower() in ("true", "1", "yes")


def _parse(
    raw: Mapping[str, object], settings: DataSettings, placeholders: Mapping[str, str]
) -> tuple[DatasetEntry | None, list[str]]:
    kind, storage = str(raw.get("dataset_type", "video")), str(raw.get("type", "local"))
    problems = _known_choice("type", storage, ("local",), OTHER_TYPES) + _known_choice("dataset_type", kind, tuple(_KINDS), OTHER_DATASETS)
    if problems:
        return None, problems
    model = _KINDS[kind]
    raw, unfilled = _filled(raw, settings, placeholders)
    if model is VideoEntry:
        raw = {"resolution": settings.resolution, "resolution_type": settings.resolution_type, **raw}
    try:
        entry = model.model_validate(raw)
    except ValidationError as error:
        return None, unfilled + _explain(error, model)
    return entry, unfilled + (_unsupported(entry) if isinstance(entry, VideoEntry) else [])


def _known_choice(key: str, value: str, supported: Sequence[str], later: frozenset[str]) -> list[str]:
    if value in supported:
        return []
    choices = ", ".join(f"`{name}`" for name in supported)
    if value in later:
        return [f"{key} `{value}` is {LATER}; use {choices}, or set disabled to true"]
    near = get_close_matches(value, [*supported, *later], 1)
    return [f"{key}: unknown value (got {value!r}); " + (f"did you mean `{near[0]}`?" if near else f"known: {choices}")]


def _filled(
    raw: Mapping[str, object], settings: DataSettings, placeholders: Mapping[str, str]
) -> tuple[dict[str, object], list[str]]:
    """Fills the placeholders of `cache_dir` and expands `~`."""
    values = {**placeholders, "id": str(raw.get("id", ""))}
    text = str(raw.get("cache_dir", settings.cache_dir))
    unknown = [name for name in re.findall(r"\{(\w*)\}", text) if name not in values]
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    filled = {**raw, "cache_dir": str(Path(text).expanduser())}
    if isinstance(folder := raw.get("instance_data_dir"), str):
        filled["instance_data_dir"] = str(Path(folder).expanduser())
    known = ", ".join(f"{{{name}}}" for name in sorted(values))
    return filled, [f"cache_dir: unknown placeholder {{{name}}}; known: {known}" for name in unknown]


def _explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each problem: key, what is wrong, value, nearest names."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(_unknown_key(key, model))
        elif problem["type"] == "missing":
            lines.append(f"{key}: is required")
        else:
            lines.append(f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]} (got {problem['input']!r})")
    return lines


def _unknown_key(key: str, model: type[BaseModel]) -> str:
    section, _, name = key.rpartition(".")
    owner = _SECTIONS.get(section, model)
    near = get_close_matches(name, list(owner.model_fields), 3)
    elsewhere = [part for part, other in _SECTIONS.items() if name in other.model_fields]
    if not section and elsewhere and model is VideoEntry:
        return f"{key}: unknown key here; it belongs inside `{elsewhere[0]}`"
    return f"{key}: unknown key" + (f"; did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else "")


def _unsupported(entry: VideoEntry) -> list[str]:
    """Values that are understood but would not be acted on."""
    video, audio = entry.video, entry.audio
    rules = (
        (entry.probability != 1.0, f"probability: {entry.probability} is {LATER}; leave it at 1 and weigh entries by `repeats`"),
        (video.bucket_strategy != "aspect_ratio", f"video.bucket_strategy: `{video.bucket_strategy}` is {LATER}; use `aspect_ratio`"),
        (video.is_i2v, f"video.is_i2v: is {LATER}; first frames are conditioned by the family's own option, for all clips"),
        (audio.audio_only, f"audio.audio_only: is {LATER}; clips need a picture"),
        (audio.truncation_mode != "beginning", f"audio.truncation_mode: `{audio.truncation_mode}` is {LATER}; use `beginning`"),
        (bool(entry.s2v_datasets), f"s2v_datasets: is {LATER}; sound comes from the clips themselves"),
        (entry.caption_strategy == "instanceprompt" and not entry.instance_prompt, "instance_prompt: is required by `instanceprompt`"),
        (video.min_frames is not None and video.max_frames is not None and video.min_frames > video.max_frames,
         f"video.min_frames: {video.min_frames} is more than max_frames ({video.max_frames})"),
    )  # fmt: skip
    return [text for holds, text in rules if holds]


def _require_folders(entries: Sequence[DatasetEntry], where: str) -> None:
    missing = [e for e in entries if isinstance(e, VideoEntry) and not e.instance_data_dir.is_dir()]
    if missing:
        lines = "".join(f"\n  entry {e.id!r}: {e.instance_data_dir}" for e in missing)
        raise DataError(
            f"these folders of clips do not exist:{lines}", where=where,
            remedy="mend instance_data_dir; relative paths start at the working directory",
        )  # fmt: skip
