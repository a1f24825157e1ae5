"""From what the user wrote to files on this disk: an existing path, the tiny model, or a hub repository at a pinned revision.

Special here: of a published repository only the one combined file of the flavour is fetched; it also holds the same weights in other
layouts, several times 40 GB.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tuner.errors import CheckpointError, ConfigError, HubError
from tuner_ltxvideo2.variants import DEFAULT_FLAVOUR, FLAVOURS, Flavour

T = TypeVar("T")
_WHERE: Final = "pretrained_model_name_or_path"
_NETWORK_ERRORS: tuple[type[Exception], ...] = (OfflineModeIsEnabled, LocalEntryNotFoundError, OSError, *HfHubHTTPError.__bases__)
"""Whatever HTTP library the hub's client uses, the errors of a connection descend from a base of `HfHubHTTPError`."""
_TINY: Final = {"tiny": "2.0", "tiny-2.3": "2.3"}


@dataclass(frozen=True)
class ModelFiles:
    """What a run reads from."""

    weights: Path
    text_encoder: Path | None
    """None: it lies beside the weights, as the source's folder `text_encoder`."""
    description: str
    """For people and model cards: repository and revision, or a file's name."""


def locate_model(location: str, revision: str, flavour: str, text_encoder: str, cache_dir: Path) -> ModelFiles:
    """Everything that a run needs, on this disk. `text_encoder`: a folder, a hub repository, or empty for the flavour's own.

    Raises `ConfigError` for an unknown or refused flavour, `CheckpointError` for a path that does not exist, `HubError`.
    """
    known = flavour_of(flavour)
    weights = resolve_location(location, revision, flavour, cache_dir)
    description = describe(location, revision, flavour, weights)
    if text_encoder:
        return ModelFiles(weights, resolve_text_encoder(text_encoder), description)
    root = weights if weights.is_dir() else weights.parent
    if (root / "text_encoder").is_dir() or not known.text_encoder or (location and _is_local(location)):
        return ModelFiles(weights, None, description)
    return ModelFiles(weights, resolve_text_encoder(known.text_encoder), description)


def flavour_of(name: str) -> Flavour:
    """The flavour called `name` (the default for ""). Raises `ConfigError` for one that is unknown or not taken."""
    known = FLAVOURS.get(name or DEFAULT_FLAVOUR)
    if known is None:
        raise ConfigError("there is no such flavour", where="model_flavour", value=name, remedy=f"use one of {', '.join(FLAVOURS)}")
    if known.refused:
        usable = ", ".join(key for key, item in FLAVOURS.items() if not item.refused)
        raise ConfigError(f"not taken: {known.refused}", where="model_flavour", value=name, remedy=f"use one of {usable}")
    return known


def resolve_location(location: str, revision: str = "", flavour: str = "", cache_dir: Path | None = None) -> Path:
    """The file or folder of the weights: an existing path, else a hub repository, else the flavour's.

    The tiny flavours are written on first use, into `cache_dir` or, without one, `tuner` in the user's cache folder.
    """
    known = flavour_of(flavour)
    if location and _is_local(location):
        path = Path(location).expanduser()
        if not path.exists():
            raise CheckpointError("there is no such file or folder", where=_WHERE, value=location)
        return path
    if not location and flavour in _TINY:
        from tuner_ltxvideo2.tiny import write_tiny

        return write_tiny((cache_dir or _user_cache()) / "models" / flavour, variant=_TINY[flavour]).checkpoint
    return _fetch_weights(location or known.repository, revision, known)


def resolve_text_encoder(location: str, revision: str = "") -> Path:
    """The folder of a Gemma: existing, or of a hub repository that is one or has one in `text_encoder`."""
    if _is_local(location):
        path = Path(location).expanduser()
        if not path.is_dir():
            raise CheckpointError("there is no such folder", where="text_encoder_path", value=location)
        return path
    files = _ask(location, lambda: HfApi().list_repo_files(location, revision=revision or None))
    nested = "text_encoder/config.json" in files
    folders = ("text_encoder/", "tokenizer/") if nested else ("",)
    wanted = [file for file in files if file.startswith(folders) and file.endswith((".safetensors", ".json", ".model"))]
    if any(Path(file).name.startswith("model") for file in wanted):  # some repositories hold the shards under two names
        wanted = [file for file in wanted if not Path(file).name.startswith("diffusion_pytorch_model")]
    root = Path(_ask(location, lambda: snapshot_download(location, revision=revision or None, allow_patterns=wanted)))
    return root / "text_encoder" if nested else root


def describe(location: str, revision: str, flavour: str, weights: Path) -> str:
    """What people call these weights, without a private path."""
    if (location and _is_local(location)) or (not location and flavour in _TINY):
        return weights.name
    repository = location or flavour_of(flavour).repository
    commit = next((part for above, part in zip(weights.parts, weights.parts[1:], strict=False) if above == "snapshots"), revision)
    return f"{repository}@{commit}" if commit else repository


def _fetch_weights(repository: str, revision: str, flavour: Flavour) -> Path:
    """The flavour's combined file; a repository in diffusers' layout as a whole where it has no such file."""
    files = _ask(repository, lambda: HfApi().list_repo_files(repository, revision=revision or None))
    fitting = [file for file in files if fnmatch.fnmatch(file, flavour.filename) and "lora" not in file]
    combined = sorted(fitting, key=lambda file: Path(file).stem)  # without suffix, so that `x-1.1` comes after `x`
    if not combined:
        combined = sorted(file for file in files if "/" not in file and file.endswith(".safetensors") and "lora" not in file)
        if len(combined) != 1 and "transformer/config.json" in files:
            patterns = [f"{part}/*" for part in ("transformer", "connectors", "vae", "audio_vae", "vocoder", "text_encoder", "tokenizer")]
            return Path(_ask(repository, lambda: snapshot_download(repository, revision=revision or None, allow_patterns=patterns)))
        if len(combined) != 1:
            raise CheckpointError(
                "the repository does not hold exactly one checkpoint",
                where=_WHERE,
                value=combined[:8],
                remedy="download one and give its path",
            )
    return Path(_ask(repository, lambda: hf_hub_download(repository, combined[-1], revision=revision or None)))


def _ask(repository: str, call: Callable[[], T]) -> T:
    """Runs a call to the hub and tells its failures in words."""
    try:
        return call()
    except GatedRepoError as error:
        raise HubError(
            "the repository is open only to those who accepted its licence", where=repository,
            remedy=f"accept it on https://huggingface.co/{repository}, then run `hf auth login`",
        ) from error  # fmt: skip
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise HubError(
            "there is no such repository or revision, or it is private",
            where=repository,
            remedy="check the name; `hf auth login` for a private one",
        ) from error
    except _NETWORK_ERRORS as error:
        raise HubError(
            f"the hub cannot be reached: {type(error).__name__}", where=repository,
            remedy="check the connection, or download the files elsewhere and give their path",
        ) from error  # fmt: skip


def _is_local(location: str) -> bool:
    """A path that exists, or that no hub repository (`owner/name`) can be called."""
    if Path(location).expanduser().exists():
        return True
    return location.startswith(("/", ".", "~")) or location.count("/") != 1 or location.endswith((".safetensors", ".sft"))


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuner"
