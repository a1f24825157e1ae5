"""From what the user wrote to files on this disk: existing paths, the tiny model, or a hub repository at a pinned revision.

Special here: of a published repository only the files of the flavour are fetched; it also holds the same weights in other
layouts, several times 40 GB. Every repository is asked before the first byte is downloaded, so that a licence that was not accepted
is told at once.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tuner.errors import CheckpointError, ConfigError
from tuner.model.hub import Repository, fetch, lacks, newest, open_repository, preview
from tuner_ltxvideo2.variants import DEFAULT_FLAVOUR, FLAVOURS, Flavour

_WHERE: Final = "pretrained_model_name_or_path"
_TINY: Final = {"tiny": "2.0", "tiny-2.3": "2.3", "tiny-2.5": "2.5"}
_PARTS: Final = ("connectors", "vae", "audio_vae", "vocoder", "text_encoder", "tokenizer")
_KINDS: Final = (".safetensors", ".json", ".model")
_SUFFIXES: Final = (".safetensors", ".sft")


@dataclass(frozen=True)
class ModelFiles:
    """What a run reads from."""

    weights: Path
    text_encoder: Path | None
    """None: it lies beside the weights, as the source's folder `text_encoder`."""
    description: str
    """For people and model cards: repository and commit, or a file's name."""
    downloads: tuple[str, ...] = ()
    """What a run would download, in words, where `scratch` was given."""


@dataclass(frozen=True)
class _Wanted:
    """Files of a repository, and which of them, or which of its folders, is the one that is asked for."""

    repository: Repository
    files: tuple[str, ...]
    main: str

    def bring(self, scratch: Path | None) -> tuple[Path, str]:
        """Place on this disk, and what would be downloaded in words."""
        if scratch is None:
            return fetch(self.repository, self.files) / self.main, ""
        root, told = preview(self.repository, self.files, scratch / "hub" / self.repository.name.replace("/", "--"))
        return root / self.main, told


def locate_model(
    location: str, revision: str, flavour: str, text_encoder: str, cache_dir: Path, *, scratch: Path | None = None
) -> ModelFiles:
    """Everything that a run needs, on this disk. `text_encoder`: a folder, file or hub repository, or empty for the flavour's own.

    `scratch`: for a plan that is only looked at; nothing large is downloaded, and headers are put there.
    Raises `ConfigError` for an unknown flavour, `CheckpointError` for a path that does not exist, `HubError`.
    """
    known = flavour_of(flavour)
    local = _local_weights(location, flavour, text_encoder, cache_dir)
    remote = None if local else _weights_of(open_repository(location or known.repository, revision), known)
    described = _describe_local(location, local) if local else _describe(remote)
    encoder = _wanted_text_encoder(text_encoder, location, known, local, remote)
    downloads = []
    if remote is not None:
        local, told = remote.bring(scratch)
        downloads.append(told)
    assert local is not None
    if isinstance(encoder, _Wanted):
        encoder, told = encoder.bring(scratch)
        downloads.append(told)
    return ModelFiles(local, encoder, described, tuple(filter(None, downloads)))


def flavour_of(name: str) -> Flavour:
    """The flavour called `name` (the default for ""). Raises `ConfigError` for one that is unknown."""
    known = FLAVOURS.get(name or DEFAULT_FLAVOUR)
    if known is None:
        raise ConfigError("there is no such flavour", where="model_flavour", value=name, remedy=f"use one of {', '.join(FLAVOURS)}")
    return known


def is_distilled(location: str, flavour: str) -> bool:
    """Whether the model samples in few steps: the flavour's word, or without one the name that a path or repository has."""
    return flavour_of(flavour).distilled if flavour or not location else "distilled" in location.lower().replace("distilled-lora", "")


def resolve_location(location: str, revision: str = "", flavour: str = "", cache_dir: Path | None = None) -> Path:
    """The file or folder of the weights: an existing path, else a hub repository, else the flavour's."""
    known = flavour_of(flavour)
    local = _local_weights(location, flavour, "", cache_dir or _user_cache())
    return local or _weights_of(open_repository(location or known.repository, revision), known).bring(None)[0]


def resolve_text_encoder(location: str, revision: str = "") -> Path:
    """The folder or file of a Gemma: existing, or of a hub repository that is one or has one in `text_encoder`."""
    if _is_local(location):
        return _local_text_encoder(location)
    return _text_encoder_of(open_repository(location, revision)).bring(None)[0]


# --- on this disk ------------------------------------------------------------------------------------------------
def _local_weights(location: str, flavour: str, text_encoder: str, cache_dir: Path) -> Path | None:
    """What the user's path names, or the tiny model, written on first use; None: it is on the hub."""
    if not location and flavour in _TINY:
        from tuner_ltxvideo2.tiny import write_tiny

        return write_tiny(cache_dir / "models" / flavour, variant=_TINY[flavour]).checkpoint
    if not location or not (_is_local(location) or "," in location):
        return None
    paths = [Path(part.strip()).expanduser() for part in location.split(",")] if not Path(location).exists() else [Path(location)]
    for path in paths:
        if not path.exists():
            raise CheckpointError("there is no such file or folder", where=_WHERE, value=str(path))
    if len(paths) == 1 and not (paths[0].is_file() and text_encoder.endswith(_SUFFIXES)):
        return paths[0]
    if text_encoder.endswith(_SUFFIXES):
        paths.append(_local_text_encoder(text_encoder))
    return _gathered(paths, cache_dir)


def _gathered(paths: Sequence[Path], cache_dir: Path) -> Path:
    """A folder with links to files that lie in several places, as if they lay in one."""
    files = [path.resolve() for path in paths]
    folder = cache_dir / "models" / ("gathered-" + hashlib.sha256("\n".join(map(str, files)).encode()).hexdigest()[:12])
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        link = folder / file.name
        if not link.is_symlink():
            link.symlink_to(file)
    return folder


def _local_text_encoder(location: str) -> Path:
    path = Path(location).expanduser()
    if not path.is_dir() and not (path.is_file() and path.suffix in _SUFFIXES):
        raise CheckpointError("there is no such folder or .safetensors file", where="text_encoder_path", value=location)
    return path


def _describe_local(location: str, weights: Path) -> str:
    """Names without a private path."""
    return " + ".join(Path(part.strip()).name for part in location.split(",")) if "," in location else weights.name


def _is_local(location: str) -> bool:
    """A path that exists, or that no hub repository (`owner/name`) can be called."""
    if Path(location).expanduser().exists():
        return True
    return location.startswith(("/", ".", "~")) or location.count("/") != 1 or location.endswith(_SUFFIXES)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuner"


# --- on the hub --------------------------------------------------------------------------------------------------
def _wanted_text_encoder(
    text_encoder: str, location: str, known: Flavour, local: Path | None, remote: _Wanted | None
) -> Path | _Wanted | None:
    """Where the text encoder is; None: beside the weights."""
    if text_encoder:
        return _local_text_encoder(text_encoder) if _is_local(text_encoder) else _text_encoder_of(open_repository(text_encoder))
    if local is not None or remote is None or not known.text_encoder or _brings_text_encoder(remote):
        return None
    same = known.text_encoder == remote.repository.name
    return _text_encoder_of(remote.repository if same else open_repository(known.text_encoder))


def _brings_text_encoder(wanted: _Wanted) -> bool:
    return any(file.startswith("text_encoder/") for file in wanted.files)


def _describe(wanted: _Wanted | None) -> str:
    assert wanted is not None
    return f"{wanted.repository.name}@{wanted.repository.commit}" if wanted.repository.commit else wanted.repository.name


def _weights_of(repository: Repository, flavour: Flavour) -> _Wanted:
    """The flavour's files; of a repository in diffusers' layout its folders; else its only checkpoint."""
    listed = [file for file in repository.files if "lora" not in file.lower()]
    fitting = [file for file in listed if flavour.filename and fnmatch.fnmatch(file, flavour.filename)]
    if fitting:
        main = newest(fitting, flavour.filename, repository)
        beside = [
            newest([file for file in listed if fnmatch.fnmatch(file, pattern)], pattern, repository) for pattern in flavour.companions
        ]
        return _Wanted(repository, (main, *beside), main)
    if repository.name == flavour.repository:  # another checkpoint of it would be another model
        raise lacks(repository, flavour.filename)
    if "transformer/config.json" in repository.files:
        folder = flavour.folder if f"{flavour.folder}/config.json" in repository.files else "transformer"
        files = repository.wanted([f"{part}/" for part in (folder, *_PARTS)], _KINDS)
        return _Wanted(repository, tuple(files), "" if folder == "transformer" else folder)
    combined = sorted(file for file in listed if "/" not in file and file.endswith(".safetensors"))
    if len(combined) != 1:
        raise CheckpointError(
            "the repository does not hold exactly one checkpoint, nor the flavour's",
            where=_WHERE,
            value=combined[:8],
            remedy="set model_flavour, or download one and give its path",
        )
    return _Wanted(repository, (combined[0],), combined[0])


def _text_encoder_of(repository: Repository) -> _Wanted:
    """A repository that is a Gemma, or that has one in `text_encoder`."""
    nested = "text_encoder/config.json" in repository.files
    wanted = repository.wanted(("text_encoder/", "tokenizer/") if nested else ("",), _KINDS)
    if any(Path(file).name.startswith("model") for file in wanted):  # some repositories hold the shards under two names
        wanted = [file for file in wanted if not Path(file).name.startswith("diffusion_pytorch_model")]
    return _Wanted(repository, tuple(wanted), "text_encoder" if nested else "")
