"""What the entries of a dataset file may hold, one class for each `dataset_type`. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator

CaptionStrategy = Literal["textfile", "filename", "instanceprompt"]
ResolutionType = Literal["pixel", "pixel_area", "area"]
ConditioningRole = Literal["reference", "mask"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VideoOptions(_Section):
    """`video` of an entry. Frames are counted at `frame_rate`, after resampling by presentation time."""

    num_frames: int | None = Field(default=None, ge=1)
    """Frames taken from each clip; the family's next lower valid count is used. Empty: as many as a clip has, at most
    `tuner.data.lengths.LONGEST`."""
    min_frames: int | None = Field(default=None, ge=1)
    """Shorter clips are skipped. Empty: `num_frames`. Below `num_frames`, shorter clips are used at their own valid length."""
    max_frames: int | None = Field(default=None, ge=1)
    """Longer clips are skipped."""
    frame_rate: float | None = Field(default=None, gt=0)
    """Frames per second that clips are resampled to; the run's `frame_rate` when empty."""
    bucket_strategy: Literal["aspect_ratio", "resolution_frames"] = "aspect_ratio"
    """`resolution_frames`: every clip is trained at its own length; `num_frames`, else `max_frames`, is the most that is taken."""
    frame_interval: int | None = Field(default=None, ge=1)
    """Lengths below the most that is taken are rounded down to a multiple of it, so that fewer different lengths remain."""
    is_i2v: bool = False
    """The first frame of these clips is given in every draw, not learned."""


class AudioOptions(_Section):
    """`audio` of an entry: the sound of its clips, or of its sound files."""

    auto_split: bool = True
    """Whether the clips' sound is trained."""
    audio_only: bool = False
    """Sound files: they are trained alone. Clips: only their sound is trained."""
    sample_rate: int | None = Field(default=None, ge=1)
    """Hz; must be what the family's audio encoder takes, to which all sound is resampled."""
    channels: int | None = Field(default=None, ge=1)
    """1: mix to mono, then feed every channel of the encoder. The encoder's own count, or empty: as recorded."""
    bucket_strategy: Literal["duration"] = "duration"
    duration_interval: float | None = Field(default=None, gt=0)
    """Sound alone is cut to a multiple of so many seconds; `tuner.data.lengths.DURATION_INTERVAL` when empty. Sound that belongs to a
    picture has the picture's length."""
    min_duration_seconds: float | None = Field(default=None, ge=0)
    """Files whose sound is shorter are skipped."""
    max_duration_seconds: float | None = Field(default=None, gt=0)
    """Files whose sound is longer are skipped."""
    truncation_mode: Literal["beginning", "end", "random"] = "beginning"
    """Which part of a longer clip or sound is used, picture and sound alike; `random` is drawn once for each file."""
    allow_zero_audio: bool = False
    """Clips without a sound track are trained with silence as their sound."""


class Entry(_Section):
    """What every entry has."""

    id: str = Field(min_length=1)
    type: str = "local"
    dataset_type: str = "video"
    disabled: bool = False
    default: bool = False
    cache_dir: Path
    _notes: tuple[str, ...] = PrivateAttr(default=())
    _names_cache: bool = PrivateAttr(default=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """Keys that were given and have no effect, each with its reason."""
        return self._notes

    @property
    def names_cache(self) -> bool:
        """Whether the file gives this entry a `cache_dir` of its own."""
        return self._names_cache

    def remember(self, notes: tuple[str, ...], *, names_cache: bool) -> None:
        """Sets what the file said and validation leaves out; once, after validation."""
        self._notes, self._names_cache = notes, names_cache


class FolderEntry(Entry):
    """A folder of files, searched with its subfolders."""

    instance_data_dir: Path


class CaptionedEntry(FolderEntry):
    """Files with captions: what is trained on, or held out."""

    caption_strategy: CaptionStrategy = "textfile"
    instance_prompt: str = ""
    prepend_instance_prompt: bool = False
    """Puts `instance_prompt` and a space before the caption of the text file or file name."""
    image_embeds: str = ""
    """Id of the `image_embeds` entry whose folder keeps the records."""
    text_embeds: str = ""
    """Id of the `text_embeds` entry; all captions of a run are kept in one."""
    audio: AudioOptions = AudioOptions()


class TurnOptions(_Section):
    """How often."""

    repeats: int = Field(default=0, ge=0)
    """Additional passes: each file is seen `repeats` + 1 times an epoch."""
    probability: float = Field(default=1.0, gt=0, le=1)
    """Share of these draws that an epoch takes; all are taken in turn over successive epochs."""


class PictureEntry(CaptionedEntry):
    """Clips or still pictures: they have a size."""

    resolution: float = Field(gt=0)
    resolution_type: ResolutionType
    crop: bool = False
    """Whether `crop_aspect` counts. Pictures are always scaled to cover their bucket and cut around the middle."""
    crop_style: Literal["center", "centre"] = "center"
    crop_aspect: Literal["preserve", "square"] = "square"
    """`preserve`: the bucket nearest in aspect ratio; `square`: the square one."""
    minimum_image_size: float | None = Field(default=None, ge=0)
    """Smaller ones are skipped: pixels of the shorter side, or megapixels where `resolution_type` is `area`. The run's when empty."""
    minimum_aspect_ratio: float | None = Field(default=None, gt=0)
    """Width / height below which a file is skipped."""
    maximum_aspect_ratio: float | None = Field(default=None, gt=0)
    """Width / height above which a file is skipped."""
    video: VideoOptions = VideoOptions()
    conditioning_data: tuple[str, ...] = ()
    """Ids of conditioning entries, whose files belong to the files of the same name here."""
    s2v_datasets: tuple[str, ...] = ()
    """Ids of audio entries, whose files are the sound of the clips of the same name here."""

    @field_validator("conditioning_data", "s2v_datasets", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class VideoEntry(PictureEntry, TurnOptions):
    """A folder of clips."""


class ImageEntry(PictureEntry, TurnOptions):
    """A folder of still pictures."""


class EvalEntry(PictureEntry):
    """Clips or pictures that are held out: never trained, there for validation."""


class AudioEntry(CaptionedEntry, TurnOptions):
    """A folder of sound files: trained alone, or the sound of another entry's clips."""


class ConditioningEntry(FolderEntry):
    """Files that belong to the files of other entries."""

    conditioning_type: Literal["reference", "reference_strict", "reference_loose", "mask"]
    reference_downscale: Literal[1, 2, 4] = 1
    """How many times smaller than its clip a reference is encoded."""
    source_dataset_id: str = ""
    """Id of the entry that it belongs to: the same as naming it there in `conditioning_data`."""

    @field_validator("reference_downscale", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return int(value) if isinstance(value, str) and value.isdigit() else value

    @property
    def role(self) -> ConditioningRole:
        """What its files are to a clip."""
        return "mask" if self.conditioning_type == "mask" else "reference"


class TextEntry(Entry):
    """Where encoded captions are kept."""


class ImageEmbedsEntry(Entry):
    """Where the records of files are kept, for entries that name no `cache_dir`."""


TrainedEntry = VideoEntry | ImageEntry | AudioEntry
DatasetEntry = VideoEntry | ImageEntry | AudioEntry | EvalEntry | ConditioningEntry | TextEntry | ImageEmbedsEntry
KINDS: dict[str, type[DatasetEntry]] = {
    "video": VideoEntry, "image": ImageEntry, "audio": AudioEntry, "eval": EvalEntry, "conditioning": ConditioningEntry,
    "text_embeds": TextEntry, "image_embeds": ImageEmbedsEntry,
}  # fmt: skip
SECTIONS: dict[str, type[BaseModel]] = {"video": VideoOptions, "audio": AudioOptions}
