"""The dataset file: a JSON list of entries, checked as a whole so that every problem of every entry is shown at once.

Keys of other tools that this version does not act on are known by name: where they would change what is trained they are an
error with the entry's id. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from pydantic import BaseModel, ValidationError

from tuner.config.dataset_keys import LATER, sort_out
from tuner.config.entries import (
    KINDS,
    SECTIONS,
    AudioEntry,
    AudioOptions,
    CaptionedEntry,
    CaptionStrategy,
    ConditioningEntry,
    DatasetEntry,
    EvalEntry,
    FolderEntry,
    ImageEmbedsEntry,
    ImageEntry,
    PictureEntry,
    ResolutionType,
    TextEntry,
    TrainedEntry,
    VideoEntry,
    VideoOptions,
)
from tuner.config.json_text import Pairs, parse, plain
from tuner.config.linking import link
from tuner.config.resolve import Settings
from tuner.config.settings import DataSettings, RunSettings
from tuner.errors import ConfigError, DataError

__all__ = [
    "AudioEntry", "AudioOptions", "CaptionStrategy", "CaptionedEntry", "ConditioningEntry", "DatasetEntry", "EvalEntry", "FolderEntry",
    "ImageEmbedsEntry", "ImageEntry", "PictureEntry", "ResolutionType", "TextEntry", "TrainedEntry", "VideoEntry", "VideoOptions",
    "configured_datasets", "load_datasets", "read_entries",
]  # fmt: skip

OTHER_TYPES = frozenset({"s3", "aws", "csv", "huggingface", "webshart", "memory"})
OTHER_DATASETS = frozenset({"conditioning_image_embeds", "caption", "distillation_cache"})


def configured_datasets(settings: Settings, family: str) -> list[DatasetEntry]:
    """The entries of a run: of its dataset file, or one for its folder of clips. `family` fills a placeholder.

    Raises `ConfigError`, `DataError` as `load_datasets` does.
    """
    data = settings.get(DataSettings)
    if not data.data_backend_config and not data.data:
        raise ConfigError("no dataset was given", where="data_backend_config", remedy="add --data FOLDER, or --data_backend_config FILE")
    placeholders = {"model_family": family, "output_dir": settings.get(RunSettings).output_dir}
    file = Path(data.data_backend_config) if data.data_backend_config else None
    return load_datasets(file, Path(data.data) if data.data else None, data, placeholders)


def load_datasets(path: Path | None, data_dir: Path | None, settings: DataSettings, placeholders: Mapping[str, str]) -> list[DatasetEntry]:
    """The enabled entries of the dataset file at `path`, or one video entry for the folder `data_dir`.

    Relative paths are relative to the working directory. `placeholders` (model_family, output_dir) and {id} are filled into
    `cache_dir`. Raises `ConfigError` with all problems together, `DataError` when a folder is missing.
    """
    if (path is None) == (data_dir is None):
        raise ConfigError(
            "exactly one of a dataset file and a folder of clips is needed", where="data_backend_config, data",
            value={"data_backend_config": path and str(path), "data": data_dir and str(data_dir)}, remedy="give one of the two",
        )  # fmt: skip
    raw = read_entries(path) if path else [{"id": "data", "instance_data_dir": str(data_dir)}]
    entries, others, problems = _parse_all(raw, settings, placeholders)
    where = str(path) if path else "data"
    entries, unlinked = link(entries, others)
    problems += unlinked
    if not problems and not any(isinstance(entry, TrainedEntry) for entry in entries):
        problems = ["no enabled entry has dataset_type `video`, `image` or `audio`: there is nothing to train on"]
    if problems:
        raise ConfigError("the dataset file cannot be used:\n  " + "\n  ".join(problems), where=where)
    _require_folders(entries, where)
    return entries


def read_entries(path: Path) -> list[object]:
    """The entries as they stand in the file, unchecked. Raises `ConfigError`."""
    try:
        content = parse(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise ConfigError("the dataset file does not exist", where="data_backend_config", value=str(path)) from None
    except OSError as error:
        raise ConfigError(f"the dataset file cannot be read: {error.strerror}", where="data_backend_config", value=str(path)) from error
    if isinstance(content, Pairs):
        raise ConfigError("a dataset file is a list of entries, this is an object", where=str(path), remedy="put it between [ and ]")
    if not isinstance(content, list):
        raise ConfigError("a dataset file is a JSON list of entries", where=str(path), value=type(content).__name__)
    return [plain(entry, f"{path}: entry {number}") for number, entry in enumerate(content, 1)]


def _parse_all(
    raw: Sequence[object], settings: DataSettings, placeholders: Mapping[str, str]
) -> tuple[list[DatasetEntry], dict[str, str], list[str]]:
    """The entries, the ids of others ("disabled" or "invalid"), and all problems."""
    entries: list[DatasetEntry] = []
    problems: list[str] = []
    seen: set[str] = set()
    others: dict[str, str] = {}
    for number, item in enumerate(raw, 1):
        if not isinstance(item, dict):
            problems.append(f"entry {number}: must be an object with keys (got {item!r})")
            continue
        entry = _given(item)
        name = f"entry {entry['id']!r}" if entry.get("id") else f"entry {number}"
        if _is_true(entry.pop("disable", False)) or _is_true(entry.get("disabled")):
            others[str(entry.get("id"))] = "disabled"
            continue
        if str(entry.get("id")) in seen:
            problems.append(f"{name}: this id is used twice; ids must differ")
        seen.add(str(entry.get("id")))
        parsed, found = _parse(entry, settings, placeholders)
        problems += [f"{name}: {problem}" for problem in found]
        if parsed:
            entries.append(parsed)
        else:
            others[str(entry.get("id"))] = "invalid"
    return entries, others, problems


def _given(value: Mapping[str, object]) -> dict[str, object]:
    """Leaves out null and "", which mean the default, also inside `video` and `audio`."""
    kept = {key: _given(item) if isinstance(item, dict) else item for key, item in value.items()}
    return {key: item for key, item in kept.items() if item is not None and item != ""}


def _is_true(value: object) -> bool:
    return value is True or str(value).lower() in ("true", "1", "yes")


def _parse(given: Mapping[str, object], settings: DataSettings, placeholders: Mapping[str, str]) -> tuple[DatasetEntry | None, list[str]]:
    kind, storage = str(given.get("dataset_type", "video")), str(given.get("type", "local"))
    problems = _known_choice("type", storage, ("local",), OTHER_TYPES) + _known_choice("dataset_type", kind, tuple(KINDS), OTHER_DATASETS)
    if problems:
        return None, problems
    model = KINDS[kind]
    raw, notes, unsupported = sort_out(given, kind)
    raw, unfilled = _filled(raw, model, settings, placeholders)
    if issubclass(model, PictureEntry):
        raw = {"resolution": settings.resolution, "resolution_type": settings.resolution_type, **raw}
    try:
        entry = model.model_validate(raw)
    except ValidationError as error:
        return None, unsupported + unfilled + _explain(error, model)
    own = "cache_dir" in given or "cache_dir_vae" in given
    entry.remember(tuple(f"{entry.id}: {note}" for note in notes), names_cache=own)
    return entry, unsupported + unfilled + _contradictions(entry)


def _known_choice(key: str, value: str, supported: Sequence[str], later: frozenset[str]) -> list[str]:
    if value in supported:
        return []
    choices = ", ".join(f"`{name}`" for name in supported)
    if value in later:
        return [f"{key} `{value}` is {LATER}; use {choices}, or set disabled to true"]
    near = get_close_matches(value, [*supported, *later], 1)
    return [f"{key}: unknown value (got {value!r}); " + (f"did you mean `{near[0]}`?" if near else f"known: {choices}")]


def _filled(
    raw: Mapping[str, object], model: type[DatasetEntry], settings: DataSettings, placeholders: Mapping[str, str]
) -> tuple[dict[str, object], list[str]]:
    """Fills the placeholders of `cache_dir` (for files also spelt `cache_dir_vae`) and expands `~`."""
    values = {**placeholders, "id": str(raw.get("id", ""))}
    filled = dict(raw)
    if issubclass(model, FolderEntry) and "cache_dir_vae" in filled:
        filled = {"cache_dir": filled.pop("cache_dir_vae"), **filled}
    text = str(filled.get("cache_dir", settings.cache_dir))
    unknown = [name for name in re.findall(r"\{(\w*)\}", text) if name not in values]
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    filled["cache_dir"] = str(Path(text).expanduser())
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
        elif problem["type"] == "literal_error":
            lines.append(f"{key}: must be {problem['ctx']['expected']} (got {problem['input']!r}); other values are {LATER}")
        else:
            lines.append(f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]} (got {problem['input']!r})")
    return lines


def _unknown_key(key: str, model: type[BaseModel]) -> str:
    section, _, name = key.rpartition(".")
    owner = SECTIONS.get(section, model)
    near = get_close_matches(name, list(owner.model_fields), 3)
    elsewhere = [part for part, other in SECTIONS.items() if name in other.model_fields and part in model.model_fields]
    if not section and elsewhere:
        return f"{key}: unknown key here; it belongs inside `{elsewhere[0]}`"
    return f"{key}: unknown key" + (f"; did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else "")


def _contradictions(entry: DatasetEntry) -> list[str]:
    """Values that are valid alone but not together."""
    if not isinstance(entry, CaptionedEntry):
        return []
    audio = entry.audio
    least, most = audio.min_duration_seconds, audio.max_duration_seconds
    wants_prompt = entry.caption_strategy == "instanceprompt" or entry.prepend_instance_prompt
    rules = [
        (wants_prompt and not entry.instance_prompt.strip(),
         f"instance_prompt: is required by {'prepend_instance_prompt' if entry.prepend_instance_prompt else '`instanceprompt`'}"),
        (least is not None and most is not None and least > most,
         f"audio.min_duration_seconds: {least} is more than max_duration_seconds ({most})"),
        (audio.audio_only and audio.allow_zero_audio, "audio.allow_zero_audio: silence alone cannot be learned; leave out one of the two"),
        (audio.audio_only and not audio.auto_split, "audio.auto_split: false with audio_only leaves nothing to learn"),
    ]  # fmt: skip
    if isinstance(entry, PictureEntry):
        rules += _picture_contradictions(entry)
    return [text for holds, text in rules if holds]


def _picture_contradictions(entry: PictureEntry) -> list[tuple[bool, str]]:
    video, narrow, wide = entry.video, entry.minimum_aspect_ratio, entry.maximum_aspect_ratio
    pointless = sorted({"video", "audio", "s2v_datasets"} & entry.model_fields_set) if isinstance(entry, ImageEntry) else []
    return [
        (bool(pointless), f"{', '.join(pointless)}: a still picture has no length and no sound"),
        (video.min_frames is not None and video.max_frames is not None and video.min_frames > video.max_frames,
         f"video.min_frames: {video.min_frames} is more than max_frames ({video.max_frames})"),
        (narrow is not None and wide is not None and narrow > wide,
         f"minimum_aspect_ratio: {narrow} is more than maximum_aspect_ratio ({wide})"),
        (entry.audio.audio_only and bool(entry.conditioning_data or entry.s2v_datasets),
         "audio.audio_only: the sound of these clips is trained alone, so conditioning_data and s2v_datasets have nothing to belong to"),
        (bool(entry.s2v_datasets) and not entry.audio.auto_split, "s2v_datasets: audio.auto_split is false: no sound is trained"),
        (bool(entry.conditioning_data) and entry.audio.truncation_mode != "beginning",
         "audio.truncation_mode: with conditioning_data only `beginning`, where a reference and its clip begin together"),
    ]  # fmt: skip


def _require_folders(entries: Sequence[DatasetEntry], where: str) -> None:
    missing = [e for e in entries if isinstance(e, FolderEntry) and not e.instance_data_dir.is_dir()]
    if files := [e.instance_data_dir for e in missing if e.instance_data_dir.exists()]:
        kind = "give a dataset file as data_backend_config" if files[0].suffix == ".json" else "give the folder that it lies in"
        raise DataError("is a file, where a folder is needed", where=where, value=str(files[0]), remedy=kind)
    if missing:
        lines = "".join(f"\n  entry {e.id!r}: {e.instance_data_dir}" for e in missing)
        raise DataError(
            f"these folders do not exist:{lines}", where=where,
            remedy=f"mend {'--data' if where == 'data' else 'instance_data_dir'}; relative paths start at the working directory",
        )  # fmt: skip
