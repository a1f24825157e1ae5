"""What a model family implements, and the records that pass between it and the core.

Dimensions: B samples, S tokens of one stream, C latent channels, T text tokens, D channels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from tuner.config.options import Options
from tuner.interfaces.blocks import BlockSet, BlockState
from tuner.interfaces.encoders import LatentEncoder, Record
from tuner.interfaces.samples import Generated as Generated
from tuner.interfaces.samples import SampleRequest as SampleRequest
from tuner.interfaces.services import CardFacts

if TYPE_CHECKING:
    from tuner.config.settings import ModelSettings
    from tuner.interfaces.memory import PartMemory, Placement
    from tuner.interfaces.services import WeightSource


@dataclass(frozen=True)
class BuildContext:
    """What every factory is given beside its own options."""

    device: torch.device
    dtype: torch.dtype
    """The dtype that frozen weights are held and computed in."""
    seed: int
    rank: int
    output_dir: Path
    memory: PartMemory | None = None
    """Opens the parts that a family loads itself, such as a text encoder; None: everything is put on `device` as it is."""
    geometry: Geometry | None = None
    """Of the run's family; None while the family itself is built."""
    total_steps: int = 0
    """Optimizer steps of the run, once it is assembled; 0 before."""


@dataclass(frozen=True)
class Geometry:
    """Which clips a family can encode."""

    frame_step: int
    """Valid frame counts are 1 + k · frame_step."""
    size_step: int
    """Height and width are multiples of it, in pixels."""
    sample_rate: int
    """Of the sound that the audio encoder takes, in Hz."""
    audio_channels: int
    default_frame_rate: float

    def snap_frames(self, frames: int) -> int:
        """The largest valid count that is not above `frames` (at least 1)."""
        return 1 + max(0, frames - 1) // self.frame_step * self.frame_step

    def snap_size(self, pixels: float) -> int:
        """The largest valid side that is not above `pixels` (at least one step)."""
        return max(self.size_step, int(pixels) // self.size_step * self.size_step)


@dataclass(frozen=True)
class TokenShift:
    """mu(n) = base + (top - base) / (top_tokens - base_tokens) · (n - base_tokens), unclamped; n = target tokens of the stream."""

    base: float
    top: float
    base_tokens: int
    top_tokens: int

    def mu(self, tokens: int) -> float:
        """The mean of the logit-normal sigma distribution for `tokens` tokens."""
        return self.base + (self.top - self.base) / (self.top_tokens - self.base_tokens) * (tokens - self.base_tokens)


@dataclass(frozen=True)
class Variant:
    """One released generation of a family, as found in a checkpoint's own metadata."""

    family: str
    name: str
    """"2.0", "2.3", ..."""
    config: Mapping[str, Mapping[str, object]]
    """Per part (transformer, connectors, vae, ...): the keyword arguments its module is built with."""


@dataclass(frozen=True)
class ModelFacts:
    """What headers alone tell, before anything is loaded."""

    variant: Variant
    parameters: int
    """Of the transformer, for the streams that are trained."""
    blocks: int
    block_bytes: int
    """Of the largest block, at the run's dtype."""
    bytes: int
    """Of the transformer, at the run's dtype."""
    adapter_targets: int
    """How many linear layers the default LoRA targets match."""
    linear_shapes: tuple[tuple[int, int], ...] = ()
    """(out, in) of each linear layer of the largest block, in order; empty: not known."""
    linear_names: tuple[str, ...] = ()
    """Their names inside the block; empty: not known."""


@dataclass(frozen=True)
class ClipShape:
    """Size and length that clips of one bucket have. Sound alone: width, height and frames are 0."""

    width: int
    height: int
    frames: int
    frame_rate: float
    seconds: float
    """Duration, of sound too."""


@dataclass(frozen=True)
class Sample:
    """One cached item as the dataset hands it over: encoder name -> record, and what the manifest knows."""

    key: str
    """Stable identity of the item: source and settings."""
    dataset: str
    draw: int
    """Index in the epoch's order, for counter-based randomness."""
    epoch: int
    frame_rate: float
    frames: int
    height: int
    width: int
    records: Mapping[str, Record]
    caption: str = ""
    kind: Literal["video", "image", "audio"] = "video"
    """Audio: sound alone; `frames`, `height` and `width` are 0."""
    seconds: float = 0.0
    """Duration of picture and sound."""
    first_frame: bool = False
    """The dataset asks for the first frame to be given clean in every draw (image to video)."""


@dataclass(frozen=True)
class StreamBatch:
    """The clean tokens of one stream."""

    latents: Tensor
    """(B, S, C) normalised latents, packed to tokens."""
    grid: tuple[int, int, int]
    loss_mask: Tensor | None = None
    """(B, S) float: 1 where the loss counts; None: everywhere."""
    present: Tensor | None = None
    """(B,) bool: which samples have this stream at all; None: all."""
    conditioned: Tensor | None = None
    """(B, S) bool: tokens given clean, at timestep 0, outside the loss; None: none."""
    clean: bool = False
    """The whole stream is given, not learned: sigma 0 for every sample."""
    extra_grid: tuple[int, int, int] | None = None
    """Grid of further tokens behind those of `grid`, such as a reference clip's; all of them are `conditioned`. None: there are none."""

    @property
    def extra_tokens(self) -> int:
        """How many tokens at the end belong to `extra_grid`."""
        return math.prod(self.extra_grid) if self.extra_grid else 0


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket, collated by the family. A stream that no sample of the batch has is left out of `streams`."""

    samples: tuple[Sample, ...]
    streams: Mapping[str, StreamBatch]
    text: Mapping[str, Tensor]
    """Stream -> (B, T, D) encoded captions."""
    frame_rate: tuple[float, ...]
    """Frames per second of each sample; of a sound-only batch the run's, where it means nothing."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Cached features that regularizers asked for: "encoder.tensor" -> (B, ...). Absent where a sample of the batch has none."""
    most_given: Mapping[str, int] = field(default_factory=dict)
    """Stream -> the most `conditioned` tokens of one sample, which the host knows without asking; a stream that is missing: not counted."""


@dataclass(frozen=True)
class StreamNoise:
    """x_sigma = (1 - sigma) · x0 + sigma · eps; velocity target = eps - x0."""

    sigma: Tensor
    """(B,) float32 in [0, 1]."""
    noisy: Tensor
    """(B, S, C): the model's input; conditioned tokens hold x0."""
    target: Tensor
    """(B, S, C) float32 velocity."""
    noise: Tensor
    """(B, S, C) float32 eps."""
    drift: Tensor | None = None
    """(B, S, C) float32: how far a rollout of the model itself moved `noisy` off the point that was drawn; `noise` and `target` are
    those that lead through `noisy`. 0 where nothing was rolled out; None: nowhere."""


@dataclass(frozen=True)
class Noise:
    """The draws for one batch."""

    streams: Mapping[str, StreamNoise]


@dataclass(frozen=True)
class Prediction:
    """Stream -> (B, S, C) predicted velocity."""

    streams: Mapping[str, Tensor]


@dataclass(frozen=True)
class Located:
    """Where a model lies on this disk."""

    weights: Path
    """File or folder."""
    description: str
    """For people and for model cards: repository and commit, or the file's name; no private path."""
    downloads: tuple[str, ...] = ()
    """What a run would have to download first, in words; only of a preview."""


class ModelFamily(ABC):
    """A family of generative models: describes its forward pass in three parts and knows its own files.

    Built once per run as `Family(options, context)`. Nothing here knows a regularizer or a memory strategy.
    """

    options_type: ClassVar[type[Options]]
    geometry: ClassVar[Geometry]
    stream_names: ClassVar[tuple[str, ...]]
    token_shift: ClassVar[TokenShift]
    caption_tokens: ClassVar[int] = 0
    """Tokens of a caption that the model reads; what follows is cut off. 0: no limit is known."""

    # --- before anything is loaded -------------------------------------------------------------------------------
    @abstractmethod
    def locate(self, settings: ModelSettings, cache_dir: Path) -> Located:
        """Finds weights (and what else it needs, such as a text encoder) on this disk; downloads them where a hub repository is named.

        Raises `ConfigError` for an unknown flavour, `HubError`, `CheckpointError` where nothing is found.
        """

    def preview(self, settings: ModelSettings, scratch: Path) -> Located:
        """`locate` for a plan that is only looked at: nothing large is downloaded, and what has to be written goes into `scratch`.

        A family that downloads puts there what the plan reads, such as headers, and names the rest in `Located.downloads`.
        """
        return self.locate(settings, scratch)

    @abstractmethod
    def inspect(self, source: WeightSource, streams: Sequence[str]) -> ModelFacts:
        """Reads headers only. Raises `CheckpointError` for a checkpoint this family does not know."""

    @abstractmethod
    def encoders(
        self, source: WeightSource, streams: Sequence[str], companions: frozenset[str] = frozenset()
    ) -> Sequence[LatentEncoder]:
        """The encoders whose records training on `streams` needs, in the order in which to run them. Loads nothing.

        `companions`: the roles of further files that items of the dataset have: "reference", "mask".
        """

    def select_streams(self, available: frozenset[str]) -> tuple[str, ...]:
        """Which streams are trained, given those that the dataset has; in the order of `stream_names`."""
        return tuple(name for name in self.stream_names if name in available)

    def learned_streams(self, streams: Sequence[str]) -> tuple[str, ...]:
        """Those of `streams` that have a loss; the others are given clean."""
        return tuple(streams)

    def stream_weights(self) -> Mapping[str, float]:
        """Weight of each stream's loss; 1 where not named."""
        return {}

    def notices(self) -> Sequence[str]:
        """What its options ask for and get otherwise, such as a length that was rounded; shown with the plan."""
        return ()

    def file_facts(self, companions: Mapping[str, Sequence[tuple[ClipShape, ClipShape]]]) -> Mapping[str, str]:
        """What other programs must find in the metadata of an adapter that was trained on such companions.

        `companions`: role -> the different pairs of an item's shape and its companion's.
        """
        return {}

    def card_facts(self, settings: ModelSettings, given: frozenset[str]) -> CardFacts:
        """What the model card says; `given`: what clips of the dataset are trained with: "first_frame", "reference", "mask"."""
        return CardFacts()

    # --- the training model --------------------------------------------------------------------------------------
    @abstractmethod
    def load(
        self, source: WeightSource, streams: Sequence[str], dtype: torch.dtype, device: torch.device, placement: Placement | None = None
    ) -> nn.Module:
        """The transformer with exactly the weights that `streams` need; every key accounted for.

        `placement`: reads the blocks one by one onto `placement.reading` and hands each over; None: everything goes to `device`.
        """

    def empty(self, source: WeightSource, streams: Sequence[str], dtype: torch.dtype, blocks: int = 0) -> nn.Module | None:
        """What `load` gives, on the meta device; of the blocks only so many (0: all). None: not offered, then no run can be forecast."""
        return None

    @abstractmethod
    def collate(self, samples: Sequence[Sample], streams: Sequence[str]) -> Batch:
        """Stacks cached records into a batch on the CPU; pads and masks what is missing."""

    def collate_fixed(self, samples: Sequence[Sample], streams: Sequence[str]) -> Batch:
        """`collate` with nothing left to chance: only what the dataset asks for is given. For losses that are compared between runs."""
        return self.collate(samples, streams)

    @abstractmethod
    def dummy_batch(
        self, model: nn.Module, shape: ClipShape, batch_size: int, streams: Sequence[str], device: torch.device
    ) -> tuple[Batch, Noise]:
        """A batch such as clips of `shape` give, with meaningless values, on `device` ("meta" included): for measuring."""

    @abstractmethod
    def enter(self, model: nn.Module, batch: Batch, noise: Noise) -> BlockState:
        """Embeds tokens, positions, timesteps and text: everything before the first block."""

    @abstractmethod
    def call_block(self, block: nn.Module, state: BlockState) -> BlockState:
        """One transformer block, a pure function of its arguments."""

    @abstractmethod
    def exit(self, model: nn.Module, state: BlockState) -> Prediction:
        """Everything after the last block."""

    @abstractmethod
    def block_set(self, model: nn.Module) -> BlockSet:
        """The ordered blocks."""

    # --- adapters ------------------------------------------------------------------------------------------------
    @abstractmethod
    def adapter_targets(self, model: nn.Module, streams: Sequence[str]) -> list[str]:
        """Full names of the linear layers that LoRA trains by default when `streams` are trained."""

    @abstractmethod
    def original_name(self, module_name: str) -> str:
        """The published checkpoint's name of a module of this model (for files that other programs read)."""

    @abstractmethod
    def module_name(self, original_name: str) -> str:
        """Inverse of `original_name`."""

    # --- sampling ------------------------------------------------------------------------------------------------
    def check_request(self, request: SampleRequest) -> None:
        """Raises `ConfigError` for a size or length that cannot be generated, or for what cannot be given. Called while planning.

        Records of what is given are not made yet then: those of the request, if any, are empty.
        """

    def check_sampling(self, source: WeightSource) -> None:
        """Raises `CheckpointError` where the checkpoint lacks what samples are made with. Called while planning."""

    def request_defaults(self, settings: ModelSettings) -> Mapping[str, float]:
        """Validation key -> value, for the keys of which this model needs another than the default, such as steps and guidance."""
        return {}

    @abstractmethod
    def sample(
        self,
        model: nn.Module,
        source: WeightSource,
        requests: Sequence[SampleRequest],
        run_blocks: BlockFunction,
        streams: Sequence[str],
    ) -> list[Generated]:
        """Generates clips. Text that the requests do not bring is encoded first and the encoder dropped; `run_blocks` runs the blocks.

        Raises `ConfigError` for a record that does not fit its request, or whose stream is not among `streams`.
        """


class BlockFunction(ABC):
    """What runs a state through all blocks; training and sampling use the same one."""

    @abstractmethod
    def run(self, state: BlockState) -> BlockState:
        """The state after the last block."""
