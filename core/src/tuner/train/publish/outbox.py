"""The outbox of a run: everything that is worth uploading, ready in one folder, whether or when it is uploaded.

    <run>/outbox/<name>/        README.md, weights, samples/: what the repository will hold
    <run>/outbox/outbox.json    where it goes, and where it was last sent

Weights and samples are hard links, which take no space, or copies where the file system has none. Importing this costs no torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from tuner.errors import CheckpointError, DiskError
from tuner.text_files import replace_text

FOLDER: Final = "outbox"
RECORD: Final = "outbox.json"
CARD: Final = "README.md"
SAMPLES: Final = "samples"
PLAYABLE: Final = (".mp4", ".wav")
LONGEST_NAME: Final = 96
"""Characters; the hub's limit."""


@dataclass(frozen=True)
class Outbox:
    """What lies there."""

    run: Path
    """The run folder."""
    name: str
    """Of the repository, without owner."""
    named: str
    """How the card calls the repository now."""
    repository: str = ""
    """`owner/name` to send it to; empty: the token's own namespace."""
    private: bool = True
    base: str = ""
    """Repository of the base model; empty: not known."""
    commit: str = ""
    """Of the base model."""
    sent: Mapping[str, str] | None = None
    """`repository`, `url` and `time` of the last upload."""

    @property
    def folder(self) -> Path:
        """What the repository will hold."""
        return self.run / FOLDER / self.name

    @property
    def card(self) -> Path:
        """The model card."""
        return self.folder / CARD

    def card_text(self) -> str:
        """The model card as it is now. Raises `CheckpointError`."""
        try:
            return self.card.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"the model card cannot be read as UTF-8: {error}", where=str(self.card)) from error

    def save(self) -> None:
        """Writes outbox.json. Raises `DiskError`."""
        facts = {key: value for key, value in asdict(self).items() if key != "run"}
        replace_text(self.run / FOLDER / RECORD, json.dumps(facts, indent=2, ensure_ascii=False) + "\n", remedy="free some space")

    def with_card(self, text: str, named: str) -> Outbox:
        """Replaces the card, which calls the repository `named`. Raises `DiskError`."""
        replace_text(self.card, text, remedy="free some space")
        changed = replace(self, named=named)
        changed.save()
        return changed


def repository_name(text: str) -> str:
    """`text` as the hub allows a repository to be called."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    name = re.sub(r"([-.])[-.]+", r"\1", name)[:LONGEST_NAME].strip("-.")
    return name.removesuffix(".git").strip("-.") or "model"


def fill(outbox: Outbox, card: str, files: Sequence[Path], samples: Sequence[Path]) -> Outbox:
    """Replaces the outbox by `card`, `files` and `samples`, in one go. Raises `DiskError`."""
    making = outbox.folder.with_name(f".{outbox.name}.making")
    try:
        shutil.rmtree(making, ignore_errors=True)
        (making / SAMPLES if samples else making).mkdir(parents=True)
        for file in files:
            _link(file, making / file.name)
        for file in samples:
            _link(file, making / SAMPLES / file.name)
        (making / CARD).write_text(card, encoding="utf-8")
        if outbox.folder.exists():
            shutil.rmtree(outbox.folder)
        making.rename(outbox.folder)
    except OSError as error:
        raise DiskError(
            f"the outbox cannot be filled: {error.strerror}", where=str(error.filename or outbox.folder), remedy="free some space"
        ) from error
    outbox.save()
    return outbox


def read(run: Path) -> Outbox:
    """The outbox of the run folder `run`. Raises `CheckpointError` where there is none, or its files are gone."""
    record = run / FOLDER / RECORD
    try:
        facts = json.loads(record.read_text(encoding="utf-8"))
        outbox = Outbox(run, **facts)
    except FileNotFoundError:
        raise CheckpointError(
            "nothing is ready to be uploaded there", where=str(run), remedy="name the folder (output_dir) of a run that has finished"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{RECORD} cannot be read: {error}", where=str(record), remedy="finish the run once more") from error
    if not outbox.card.is_file():
        raise CheckpointError("the folder to upload is gone, or its README.md", where=str(outbox.folder), remedy="finish the run once more")
    return outbox


def last_samples(run: Path) -> list[Path]:
    """The clip or sound that the last validation made of `validation_prompt`.

    What it made from held-out files shows them, and bears their names; of other prompts the card says nothing.
    """
    steps = {int(path.name[5:]): path for path in run.glob("validation/step_*") if path.name[5:].isdigit()}
    if not steps:
        return []
    return sorted(path for path in steps[max(steps)].iterdir() if path.suffix in PLAYABLE and path.stem == "sample")


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy across file systems and where there are no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
