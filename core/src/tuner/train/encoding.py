"""One encoder at work: loaded when there is something to encode, unloaded in every case, sparing when memory runs out.

What does not fit is tried again in smaller batches, then in the ways that the encoder itself offers; each step is said once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NamedTuple

import torch

from tuner.errors import DataError, OutOfMemoryError, PluginError
from tuner.interfaces.encoders import AudioClip, LatentEncoder, Record, Source, VideoClip
from tuner.model.exhausted import lacking_memory

REMEDIES: Mapping[str, str] = {
    "video": "lower resolution, or num_frames of its dataset",
    "audio": "lower num_frames or the length of sounds of its dataset",
    "text": "use a smaller text_encoder_1_precision, or shorten the caption",
}
"""What to lower, by what the encoder reads."""


class SettingsChanged(Exception):
    """The encoder now works in a way that gives other records: their places must be asked for again."""


class Task(NamedTuple):
    """Something to encode, and how errors name it."""

    name: str
    source: Source


class EncoderAtWork:
    """Use as a context manager. `notices` collects what was adjusted."""

    def __init__(self, encoder: LatentEncoder, device: torch.device, batch_size: int, notices: list[str]) -> None:
        self.batch_size = batch_size
        self._encoder = encoder
        self._device = device
        self._notices = notices
        self._loaded = False

    def __enter__(self) -> EncoderAtWork:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._loaded:
            self._encoder.unload()

    def encode(self, tasks: Sequence[Task]) -> list[Record | DataError]:
        """Equally shaped sources -> a record each, or why there is none.

        Raises `OutOfMemoryError` for a source that no way of encoding fits, `SettingsChanged`, `PluginError`.
        """
        results: list[Record | DataError] = []
        while len(results) < len(tasks):
            results += self._attempt(tasks[len(results) : len(results) + self.batch_size])
        return results

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # before: half a model must be unloaded too
        try:
            self._encoder.load(self._device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"not enough device memory for the weights of encoder {self._encoder.name!r}", where="caching",
                remedy="close other programs on the device, or stream these weights from host memory",
            ) from error  # fmt: skip

    def _attempt(self, tasks: Sequence[Task]) -> list[Record | DataError]:
        """Encodes these, or lowers the appetite and returns nothing. A source that is declined is set apart, the others go on singly."""
        self._load()
        try:
            records = self._encoder.encode([task.source for task in tasks])
        except DataError as error:
            if len(tasks) == 1:
                return [error]
            lacking = ""
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            lacking = lacking_memory(error)
            if not lacking:
                raise
        else:
            if len(records) != len(tasks):
                raise PluginError(f"encoder {self._encoder.name!r} returned {len(records)} records for {len(tasks)} sources")
            return list(records)
        # Here the exception is gone, and with it the tensors that its traceback kept alive.
        return self._spare(tasks, lacking) if lacking else [result for task in tasks for result in self.encode([task])]

    def _spare(self, tasks: Sequence[Task], lacking: str) -> list[Record | DataError]:
        """Nothing, where it is worth another try."""
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        name = self._encoder.name
        if len(tasks) > 1:
            self.batch_size = len(tasks) // 2
            self._notices.append(f"{name}: vae_batch_size {len(tasks)} -> {self.batch_size}: more do not fit into {lacking} memory")
            return []
        before = dict(self._encoder.settings())
        if said := self._encoder.reduce_memory():
            self._notices.append(f"{name}: {said}, because {describe(tasks[0].source)} did not fit into {lacking} memory")
            if dict(self._encoder.settings()) != before:
                raise SettingsChanged
            return []
        message = f"not enough {lacking} memory to encode it with {name!r}: {describe(tasks[0].source)}"
        remedy = REMEDIES[self._encoder.reads]
        if lacking == "host":
            return [DataError(message, where=tasks[0].name, remedy=remedy)]
        raise OutOfMemoryError(message, where=tasks[0].name, remedy=remedy)


def shape_of(source: Source) -> tuple[int, ...]:
    """Sources of one shape are encoded together; captions all are."""
    if isinstance(source, VideoClip):
        return tuple(source.frames.shape)
    return tuple(source.samples.shape) if isinstance(source, AudioClip) else ()


def describe(source: Source) -> str:
    """Its size, in words."""
    if isinstance(source, VideoClip):
        frames, height, width, _ = source.frames.shape
        return f"{frames} frames of {width}x{height}"
    if isinstance(source, AudioClip):
        return f"{source.samples.shape[1] / source.sample_rate:g} s of sound"
    return f"a caption of {len(source)} letters"
