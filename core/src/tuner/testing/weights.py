"""The tiny family's weights: one safetensors file, made from a seed, in names of its own as published checkpoints have them.

Published names say `layers.3.query` where the model says `blocks.3.to_q`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuner.errors import CheckpointError
from tuner.interfaces.services import Loader, TensorHeader, WeightSource
from tuner.tensor_files import write_tensors
from tuner.testing.blocks import MixingModel

FAMILY = "tiny-mixing"
CHANNELS = 6
"""Of a latent token of either stream, and of a caption's."""
TEXT_PART = "text_encoder"
BYTES = 256
_WORDS = {"blocks": "layers", "to_q": "query", "to_k": "key", "to_v": "value"}
_BACK = {published: own for own, published in _WORDS.items()}


def to_published(name: str) -> str:
    """`blocks.3.to_q` -> `layers.3.query`."""
    return ".".join(_WORDS.get(word, word) for word in name.split("."))


def to_module(name: str) -> str:
    """The inverse of `to_published`."""
    return ".".join(_BACK.get(word, word) for word in name.split("."))


def write_tiny(folder: Path, *, blocks: int = 4, width: int = 16, seed: int = 0) -> Path:
    """Writes the file unless it is there; the same numbers give the same weights. Raises `DiskError`."""
    path = folder / f"{FAMILY}-{blocks}x{width}-seed{seed}.safetensors"
    if path.is_file():
        return path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MixingModel(blocks, width, CHANNELS)
        table = torch.randn(BYTES, CHANNELS)
    tensors = {f"transformer.{to_published(name)}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(path, {**tensors, f"{TEXT_PART}.table": table}, {"family": FAMILY}, what="the tiny model")
    return path


class TinySource(WeightSource):
    """An opened file: parts "transformer" and "text_encoder"."""

    def __init__(self, path: Path, description: str) -> None:
        self.location = path
        self.description = description
        with safe_open(path, framework="pt") as file:
            self._stored = list(file.keys())

    def metadata(self) -> Mapping[str, object]:
        return {}

    def parts(self) -> Sequence[str]:
        return ("transformer", TEXT_PART)

    def headers(self, part: str) -> Mapping[str, TensorHeader]:
        with safe_open(self.location, framework="pt") as file:
            slices = {self._own(part, stored): file.get_slice(stored) for stored in self._of(part)}
            return {name: TensorHeader(tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}

    def tensors(self, part: str, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        with safe_open(self.location, framework="pt") as file:
            for stored in self._of(part):
                name = self._own(part, stored)
                if names is None or name in names:
                    yield name, file.get_tensor(stored)

    def fingerprint(self, part: str) -> str:
        digest = hashlib.sha256()
        for name, tensor in self.tensors(part):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    def folder(self, part: str) -> Path | None:
        return None

    def _of(self, part: str) -> list[str]:
        return [stored for stored in self._stored if stored.startswith(f"{part}.")]

    def _own(self, part: str, stored: str) -> str:
        return to_module(stored.removeprefix(f"{part}."))


class TinyFile(Loader):
    """Reads what `write_tiny` writes."""

    families: ClassVar[tuple[str, ...]] = (FAMILY,)

    def accepts(self, location: Path) -> bool:
        try:
            with safe_open(location, framework="pt") as file:
                return (file.metadata() or {}).get("family") == FAMILY
        except (OSError, SafetensorError):
            return False

    def open(self, location: Path, description: str) -> WeightSource:
        source = TinySource(location, description)
        if missing := [part for part in source.parts() if not source.headers(part)]:
            raise CheckpointError(f"the file holds no {' and no '.join(missing)}", where=description)
        return source
