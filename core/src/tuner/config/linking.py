"""What entries of a dataset file say of each other: conditioning files and sounds of clips, and where records are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

from tuner.config.entries import (
    AudioEntry,
    CaptionedEntry,
    ConditioningEntry,
    DatasetEntry,
    ImageEmbedsEntry,
    PictureEntry,
    TextEntry,
)


def link(entries: Sequence[DatasetEntry], others: Mapping[str, str]) -> tuple[list[DatasetEntry], list[str]]:
    """Resolves the ids that entries name. `others`: ids that are in the file, but "disabled" or "invalid".

    Returns the entries with what others say of them filled in, and all problems.
    """
    known = {entry.id: entry for entry in entries}
    problems = [problem for entry in entries for problem in _unknown_ids(entry, known, others)]
    if problems or "invalid" in others.values():
        return list(entries), problems
    linked = [_with_cache(_with_conditioning(entry, entries), entries) for entry in entries]
    return linked, [problem for entry in linked for problem in _check(entry, linked)]


def text_entry(entries: Sequence[DatasetEntry]) -> TextEntry | None:
    """The entry that keeps the captions: the default one, else the first."""
    return _default([entry for entry in entries if isinstance(entry, TextEntry)])


def is_linked(entry: AudioEntry, entries: Sequence[DatasetEntry]) -> bool:
    """Whether its files are the sound of another entry's clips."""
    return any(entry.id in other.s2v_datasets for other in entries if isinstance(other, PictureEntry))


def trained_alone(entry: AudioEntry, entries: Sequence[DatasetEntry]) -> bool:
    """Whether its sounds are trained on their own."""
    return entry.audio.audio_only or not is_linked(entry, entries)


def _named(entry: DatasetEntry) -> list[tuple[str, str, type[DatasetEntry], str]]:
    """(key, id, what the id must be, its dataset_type) for each id that the entry names."""
    named: list[tuple[str, str, type[DatasetEntry], str]] = []
    if isinstance(entry, PictureEntry):
        named += [("conditioning_data", name, ConditioningEntry, "conditioning") for name in entry.conditioning_data]
        named += [("s2v_datasets", name, AudioEntry, "audio") for name in entry.s2v_datasets]
    if isinstance(entry, CaptionedEntry):
        named += [("image_embeds", name, ImageEmbedsEntry, "image_embeds") for name in [entry.image_embeds] if name]
        named += [("text_embeds", name, TextEntry, "text_embeds") for name in [entry.text_embeds] if name]
    if isinstance(entry, ConditioningEntry) and entry.source_dataset_id:
        named.append(("source_dataset_id", entry.source_dataset_id, PictureEntry, "video, image or eval"))  # type: ignore[arg-type]
    return named


def _unknown_ids(entry: DatasetEntry, known: Mapping[str, DatasetEntry], others: Mapping[str, str]) -> list[str]:
    problems = []
    for key, name, wanted, kind in _named(entry):
        place = f"entry {entry.id!r}: {key}"
        if name in known and not isinstance(known[name], wanted):
            problems.append(f"{place}: {name!r} is an entry of dataset_type `{known[name].dataset_type}`, not {kind}")
        elif name not in known and others.get(name) == "disabled":
            problems.append(f"{place}: {name!r} is disabled")
        elif name not in known and name not in others:
            near = get_close_matches(name, list(known), 1)
            problems.append(f"{place}: there is no entry {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return problems


def _with_conditioning(entry: DatasetEntry, entries: Sequence[DatasetEntry]) -> DatasetEntry:
    """Adds the conditioning entries that name this one as their source."""
    if not isinstance(entry, PictureEntry):
        return entry
    sources = [other.id for other in entries if isinstance(other, ConditioningEntry) and other.source_dataset_id == entry.id]
    both = tuple(dict.fromkeys((*entry.conditioning_data, *sources)))
    return entry if both == entry.conditioning_data else entry.model_copy(update={"conditioning_data": both})


def _with_cache(entry: DatasetEntry, entries: Sequence[DatasetEntry]) -> DatasetEntry:
    """Puts the records of an entry that names no folder where `image_embeds` says."""
    if entry.names_cache or not isinstance(entry, CaptionedEntry):
        return entry
    places = [other for other in entries if isinstance(other, ImageEmbedsEntry)]
    place = next((other for other in places if other.id == entry.image_embeds), None) or _default(places)
    return entry.model_copy(update={"cache_dir": place.cache_dir}) if place else entry


_Keeper = TypeVar("_Keeper", TextEntry, ImageEmbedsEntry)


def _default(entries: Sequence[_Keeper]) -> _Keeper | None:
    return next((entry for entry in entries if entry.default), entries[0] if entries else None)


def _check(entry: DatasetEntry, entries: Sequence[DatasetEntry]) -> list[str]:
    """What does not fit, once all ids are known."""
    pictures = [other for other in entries if isinstance(other, PictureEntry)]
    problems = []
    if isinstance(entry, ConditioningEntry) and not any(entry.id in other.conditioning_data for other in pictures):
        problems.append("no entry names it in `conditioning_data`; add it there, or set disabled to true")
    if isinstance(entry, PictureEntry):
        named = [other for other in entries if isinstance(other, ConditioningEntry) and other.id in entry.conditioning_data]
        for role in ("reference", "mask"):
            same = [other.id for other in named if other.role == role]
            if len(same) > 1:
                problems.append(f"conditioning_data: a clip has one {role} at most (got {same!r})")
    texts = text_entry(entries)
    if isinstance(entry, CaptionedEntry) and entry.text_embeds and texts and entry.text_embeds != texts.id:
        problems.append(f"text_embeds: all captions of a run are kept in one place, here {texts.id!r}; mark the one you want `default`")
    return [f"entry {entry.id!r}: {problem}" for problem in problems]
