"""Captions: a text file beside the clip, picture or sound, the file's name, or one prompt for all."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from tuner.config.entries import CaptionedEntry
from tuner.errors import DataError


class CaptionProblem(DataError):
    """A clip whose caption is missing or empty."""

    reason: ClassVar[str] = "no caption"


def read_caption(entry: CaptionedEntry, clip: Path) -> str:
    """The caption of `clip`, stripped; a text file of several lines is one caption. With `filename`, underscores stand for spaces.

    Raises `CaptionProblem`.
    """
    if entry.caption_strategy == "instanceprompt":
        return entry.instance_prompt.strip()
    caption = _from_name(clip) if entry.caption_strategy == "filename" else _read(clip)
    return f"{entry.instance_prompt.strip()} {caption}" if entry.prepend_instance_prompt else caption


def _from_name(clip: Path) -> str:
    caption = " ".join(clip.stem.replace("_", " ").split())
    if any("\ud800" <= character <= "\udfff" for character in caption):  # how Python holds the bytes of such a name
        raise CaptionProblem("its name is not written in UTF-8", where=str(clip))
    return caption


def _read(clip: Path) -> str:
    file = clip.with_suffix(".txt")
    try:
        # Editors on Windows put a byte order mark in front, which is no part of the caption.
        caption = file.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise CaptionProblem(f"{file.name} is missing", where=str(clip)) from None
    except OSError as error:
        raise CaptionProblem(f"{file.name} cannot be read: {error.strerror}", where=str(clip)) from error
    except UnicodeDecodeError as error:
        raise CaptionProblem(f"{file.name} cannot be read as UTF-8: {error}", where=str(clip)) from error
    if not caption:
        raise CaptionProblem(f"{file.name} is empty", where=str(clip))
    return caption
