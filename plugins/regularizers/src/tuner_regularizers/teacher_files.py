"""From `crepa_encoder` to a DINOv2: a name, a hub repository, a folder, or a random one made on the spot.

Special here: while a run is planned only its configuration is read, a kilobyte; weights are downloaded and identified when caching
begins. Only safetensors are read, never pickles, and no code comes with a model.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from transformers.utils import logging as transformers_logging

from tuner.config.vocabulary import did_you_mean, nearest
from tuner.errors import CheckpointError, ConfigError, DiskError, HubError
from tuner.model.hub import Repository, fetch, lacks, open_repository, pending
from tuner.model.stored import fingerprint_tensors, read_header, weight_files

KEY: Final = "crepa_encoder"
NAMES: Final = {
    f"dinov2_vit{letter}14{mark}": f"facebook/dinov2-{kind}{size}"
    for mark, kind in (("", ""), ("_reg", "with-registers-"))
    for letter, size in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant"))
}
"""The names of the paper's release -> hub repository."""
TINY: Final = "tiny"
_MODELS: Final[Mapping[str, Any]] = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
_CONFIG: Final = "config.json"
_TRACES: Final = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"})
"""Of a configuration: who wrote it, not what the model is."""


@dataclass(frozen=True)
class TeacherShape:
    """What is known of a teacher before its weights are read."""

    width: int
    """E, channels of a feature."""
    patch: int
    """Pixels of a patch's side."""


class Teacher(ABC):
    """An image encoder whose weights come when they are asked for. Errors name `crepa_encoder`."""

    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The model's configuration. Raises `HubError`, `CheckpointError`."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of configuration and weights, wherever they lie; downloads them. Raises `HubError`, `DiskError`, `CheckpointError`."""

    @abstractmethod
    def open(self) -> nn.Module:
        """The model in float32 on the CPU, frozen. Raises what `fingerprint` does."""

    def downloads(self) -> Sequence[str]:
        """What would be downloaded for its weights, in words."""
        return ()

    def shape(self) -> TeacherShape:
        """Raises what `config` raises, and `CheckpointError` for another kind of model."""
        config = self.config()
        if config.get("model_type") not in _MODELS:
            remedy = f"use one of {', '.join(NAMES)}, or a folder with one"
            raise CheckpointError("is no DINOv2", where=KEY, value=config.get("model_type"), remedy=remedy)
        return TeacherShape(int(config["hidden_size"]), int(config["patch_size"]))


class StoredTeacher(Teacher):
    """One whose weights lie in a folder, in the end."""

    @abstractmethod
    def folder(self) -> Path:
        """Configuration and weights on this disk; downloads them. Raises `HubError`, `DiskError`, `CheckpointError`."""

    @cached_property
    def fingerprint(self) -> str:
        config = {key: value for key, value in self.config().items() if key not in _TRACES}
        with _named():
            tensors = {name: t for file in weight_files(self.folder()) for name, t in read_header(file).tensors.items()}
            return hashlib.sha256((json.dumps(config, sort_keys=True) + fingerprint_tensors(tensors)).encode()).hexdigest()

    def open(self) -> nn.Module:
        kind = _MODELS[self.config()["model_type"]]
        with _quietly():
            try:
                model, told = kind.from_pretrained(
                    self.folder(), local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
                )
            except (OSError, RuntimeError, ValueError, SafetensorError) as error:
                raise CheckpointError(f"the weights cannot be read: {error}", where=KEY, remedy="download them again") from error
        if missing := sorted(told["missing_keys"]):
            raise CheckpointError("weights are missing", where=KEY, value=missing[:8], remedy="download them again")
        return _frozen(model)


class LocalTeacher(StoredTeacher):
    """A folder as transformers saves a model."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def config(self) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = json.loads((self._path / _CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problem = "the folder holds no model" if isinstance(error, OSError) else "its config.json is damaged"
            remedy = "give the folder with config.json and model.safetensors"
            raise CheckpointError(problem, where=KEY, value=str(self._path), remedy=remedy) from error
        with _named():
            weight_files(self._path)
        return found

    def folder(self) -> Path:
        return self._path


class HubTeacher(StoredTeacher):
    """A hub repository at the commit that its revision stands for when the run is planned."""

    def __init__(self, name: str, revision: str = "") -> None:
        self._name = name
        self._revision = revision

    @cached_property
    def _repository(self) -> Repository:
        return open_repository(self._name, self._revision)

    @cached_property
    def _files(self) -> list[str]:
        """Configuration and weights."""
        listed = [file for file in self._repository.files if "/" not in file]
        weights = [file for file in listed if file.startswith("model") and file.endswith((".safetensors", ".safetensors.index.json"))]
        if _CONFIG not in listed or not weights:
            raise lacks(self._repository, _CONFIG if _CONFIG not in listed else "model.safetensors")
        return [_CONFIG, *weights]

    def config(self) -> Mapping[str, Any]:
        return self._config

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        with _named():
            found: Mapping[str, Any] = json.loads((fetch(self._repository, self._files[:1]) / _CONFIG).read_text(encoding="utf-8"))
            return found

    def downloads(self) -> Sequence[str]:
        with _named():
            told = pending(self._repository, self._files)
        return (told,) if told else ()

    def folder(self) -> Path:
        with _named():
            return fetch(self._repository, self._files)


class TinyTeacher(Teacher):
    """Random weights at toy size, made in memory: shows that everything fits together, and teaches nothing."""

    def config(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = tiny_config().to_dict()
        return found

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self.open().state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def open(self) -> nn.Module:
        return tiny_model()


def find_teacher(name: str) -> Teacher:
    """What `crepa_encoder` names; nothing is read yet. Raises `ConfigError` for a name that is none."""
    if name == TINY:
        return TinyTeacher()
    path = Path(name).expanduser()
    if path.is_dir():
        return LocalTeacher(path)
    repository, _, revision = NAMES.get(name, name).partition("@")
    if repository.count("/") == 1 and not repository.startswith(("/", ".", "~")) and not path.exists():
        return HubTeacher(repository, revision)
    if path.exists() or "/" in name:
        problem = "is a file, no folder" if path.exists() else "there is no such folder"
        raise ConfigError(problem, where=KEY, value=name, remedy="give the folder with config.json and model.safetensors")
    known = [*NAMES, TINY]
    remedy = did_you_mean(nearest(name, known)) or f"use one of {', '.join(known)}, a hub repository or a folder"
    raise ConfigError("there is no such image encoder", where=KEY, value=name, remedy=remedy)


def tiny_config(registers: int = 0) -> Any:
    """Of the random teacher: 2 layers of 32 channels, patches of 14 pixels."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 56, "patch_size": 14}
    return Dinov2WithRegistersConfig(**shape, num_register_tokens=registers) if registers else Dinov2Config(**shape)


def tiny_model(seed: int = 0, registers: int = 0) -> nn.Module:
    """A random teacher, float32 on the CPU, frozen. The same seed gives the same weights; no generator is touched."""
    config = tiny_config(registers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _frozen(_MODELS[config.model_type](config))


def write_tiny_teacher(folder: Path, *, seed: int = 0, registers: int = 0) -> Path:
    """Writes `tiny_model` as transformers saves models; returns `folder`. Raises `DiskError`."""
    model: Any = tiny_model(seed, registers)
    try:
        with _quietly():
            model.save_pretrained(folder)
    except OSError as error:
        raise DiskError(f"the tiny image encoder cannot be written: {error.strerror}", where=str(folder)) from error
    return folder


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


@contextmanager
def _named() -> Iterator[None]:
    """Errors inside also name the key."""
    try:
        yield
    except (HubError, CheckpointError, DiskError) as error:
        where = error.where if error.where.startswith(KEY) else f"{KEY}: {error.where}"
        raise type(error)(error.message, where=where, value=error.value, remedy=error.remedy) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps transformers' own progress bars and reports off the terminal: what is wrong becomes an error here."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
