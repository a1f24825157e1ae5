"""One entry of a dataset file as answers, and answers put into it: keys that nobody asks about stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TRAINED = ("video", "image", "audio")
_VIDEO = ("num_frames", "min_frames")


def trained_entries(raw: Sequence[object]) -> list[dict[str, Any]]:
    """The entries that clips of a run come from, disabled ones left out."""
    return [e for e in raw if isinstance(e, dict) and e.get("dataset_type", "video") in TRAINED and not e.get("disabled")]


def suggestions(raw: Sequence[object], dataset_id: str = "") -> dict[str, object]:
    """What the entry called `dataset_id` says, or the first one where none is named, by the names of answers; nothing without an entry."""
    entries = [entry for entry in trained_entries(raw) if not dataset_id or entry.get("id") == dataset_id]
    if not entries:
        return {}
    entry, video, audio = entries[0], _section(entries[0], "video"), _section(entries[0], "audio")
    found = {"data": entry.get("instance_data_dir"), "dataset_id": entry.get("id"), "caption_strategy": entry.get("caption_strategy"),
             "instance_prompt": entry.get("instance_prompt"), "allow_zero_audio": audio.get("allow_zero_audio"),
             **{name: video.get(name) for name in _VIDEO}}  # fmt: skip
    return {name: value for name, value in found.items() if value not in (None, "")}


def with_answers(raw: Sequence[object], folder: str, kind: str, answers: Mapping[str, object]) -> list[object]:
    """The file's entries, with the one called `answers["dataset_id"]` changed, or added at the end."""
    name = answers["dataset_id"]
    changed = [_answered(entry, folder, kind, answers) if isinstance(entry, dict) and entry.get("id") == name else entry for entry in raw]
    if not any(isinstance(entry, dict) and entry.get("id") == name for entry in raw):
        changed.append(_answered({"id": name, "type": "local"}, folder, kind, answers))
    return changed


def _answered(entry: Mapping[str, object], folder: str, kind: str, answers: Mapping[str, object]) -> dict[str, object]:
    strategy, prompt = answers["caption_strategy"], answers["instance_prompt"]
    changes: dict[str, object] = {"dataset_type": kind, "instance_data_dir": folder, "caption_strategy": strategy}
    changes["instance_prompt"] = prompt or None
    changes["prepend_instance_prompt"] = True if prompt and strategy != "instanceprompt" else None
    if kind == "video":
        changes["video"] = _changed_section(entry, "video", {name: answers.get(name) for name in _VIDEO})
    if kind == "video" and "allow_zero_audio" in answers:
        changes["audio"] = _changed_section(entry, "audio", {"allow_zero_audio": answers["allow_zero_audio"] or None})
    return _without_nothing({**entry, **changes})


def _changed_section(entry: Mapping[str, object], section: str, changes: Mapping[str, object]) -> dict[str, object] | None:
    return _without_nothing({**_section(entry, section), **changes}) or None


def _without_nothing(content: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in content.items() if value is not None}


def _section(entry: Mapping[str, object], name: str) -> dict[str, Any]:
    found = entry.get(name)
    return dict(found) if isinstance(found, dict) else {}


def name_for(folder: str) -> str:
    """What an entry for a folder is called where nothing else is said."""
    return Path(folder).expanduser().resolve().name or "data"
