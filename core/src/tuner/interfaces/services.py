"""Loaders of weights, file formats of adapters, and trackers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class TensorHeader:
    """Shape and dtype of a stored tensor, from the file's header."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: "BF16", "F32", "F8_E4M3", ..."""

    @property
    def count(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total


class WeightSource(ABC):
    """Weights of one model on disk, whatever the layout, under the module names that the family uses.

    A part is one network: "transformer", "connectors", "vae", "audio_vae", "vocoder", "text_encoder".
    """

    location: Path
    description: str
    """For people: repository and revision, or file name; no private path."""

    @abstractmethod
    def metadata(self) -> Mapping[str, object]:
        """The checkpoint's own configuration, part -> config, as stored."""

    @abstractmethod
    def parts(self) -> Sequence[str]:
        """Which parts are there."""

    @abstractmethod
    def headers(self, part: str) -> Mapping[str, TensorHeader]:
        """Module-relative names -> headers, of everything stored for `part`. Reads no tensor data."""

    @abstractmethod
    def tensors(self, part: str, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Tensors of `part` (all, or the named ones) on the CPU."""

    def fill(self, part: str, targets: Mapping[str, Tensor]) -> None:
        """Writes the named tensors into memory that is there already, on any device and in any dtype.

        What can be is read straight into it. Copies to a device may still be under way on its current stream.
        """
        for name, tensor in self.tensors(part, tuple(targets)):
            targets[name].detach().copy_(tensor)

    @abstractmethod
    def fingerprint(self, part: str) -> str:
        """Identity of the weights of `part`: headers and sampled bytes, never the path."""

    @abstractmethod
    def folder(self, part: str) -> Path | None:
        """Where a part that transformers loads itself (tokenizer, text encoder) lies; None where there is none."""


class Loader(ABC):
    """Opens what the user wrote in `pretrained_model_name_or_path`, once it lies on this disk."""

    families: ClassVar[tuple[str, ...]]

    @abstractmethod
    def accepts(self, location: Path) -> bool:
        """Whether this layout is the one found at `location`. Cheap: names and headers only."""

    @abstractmethod
    def open(self, location: Path, description: str) -> WeightSource:
        """Raises `CheckpointError` with missing and unknown keys."""


@dataclass(frozen=True)
class AdapterState:
    """A LoRA in memory: module name -> (A, B), with B · A · alpha / rank added to the weight."""

    weights: Mapping[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float
    targets: tuple[str, ...]


class CheckpointFormat(ABC):
    """A file layout for finished adapters."""

    name: str
    families: ClassVar[tuple[str, ...]] = ()
    """Families it belongs to; empty: any."""

    @abstractmethod
    def write(self, path: Path, adapter: AdapterState, facts: Mapping[str, str]) -> None:
        """Writes one safetensors file. `facts` go into its metadata: base model, trigger words; never captions or paths."""

    @abstractmethod
    def accepts(self, path: Path) -> bool:
        """Whether the file at `path` has this layout (names and header only)."""

    @abstractmethod
    def read(self, path: Path) -> AdapterState:
        """Reads it back. Raises `CheckpointError`."""


@dataclass(frozen=True)
class CardFacts:
    """What a family adds to the model card of a result."""

    task: str = ""
    """Pipeline tag of the hub, such as "image-to-video"; empty: what follows from the streams."""
    pipeline: str = "DiffusionPipeline"
    """Class of diffusers that takes the adapter."""
    repository: str = ""
    """Hub repository from which that class loads the base model; empty: not known."""


class Tracker(ABC):
    """Receives metrics, in a thread of its own. One that fails is reported once and left out; it never stops training."""

    name: str

    @classmethod
    def check(cls) -> None:
        """While planning: raises `EnvironmentProblem` where it cannot work, such as without its library."""

    @abstractmethod
    def start(self, settings: Mapping[str, object]) -> None:
        """Once, with the resolved settings (without secrets)."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Host numbers."""

    def sample(self, step: int, path: Path, label: str, prompt: str) -> None:
        """A sample was made: an mp4, or a wav where it is sound alone. `label`: the same for the same prompt at every step."""

    def close(self) -> None:
        """Once, at the end."""
