"""The training set: the batches of an epoch, and their records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from tuner.data.epochs import Draw, plan_epoch
from tuner.data.manifest import Manifest
from tuner.data.randomness import uniform
from tuner.data.records import RecordPlaces
from tuner.errors import DataError
from tuner.interfaces.encoders import LatentEncoder
from tuner.interfaces.family import Sample

__all__ = ["Draw", "TrainingSet"]


class TrainingSet:
    """The items of a manifest, whose records are in the cache.

    `encoders` are asked for their settings only; their weights are not loaded. `caption_dropout`: the probability that a draw is
    trained with the empty caption.
    """

    def __init__(
        self, manifest: Manifest, encoders: Sequence[LatentEncoder], batch_size: int, seed: int, caption_dropout: float = 0.0
    ) -> None:
        if not manifest.items:
            raise DataError("the training set is empty", where="datasets")
        self.items = manifest.items
        self._manifest = manifest
        self._places = RecordPlaces(encoders, manifest.geometry, manifest.text_cache)
        self._batch_size = batch_size
        self._seed = seed
        self._dropout = caption_dropout
        self._planned: tuple[int, list[tuple[Draw, ...]]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch; the same for every epoch."""
        return self._manifest.batches_per_epoch(self._batch_size)

    def digest(self) -> str:
        """Identity of what is trained on, in its order: clips, captions, and the encoders that they went through."""
        parts = [self._manifest.digest(), {name: dict(settings) for name, settings in self._places.identities().items()}]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def epoch_plan(self, epoch: int) -> list[tuple[Draw, ...]]:
        """The batches of an epoch; see `epochs.plan_epoch`."""
        planned = self._planned  # read once: the prefetch thread may be in the next epoch already
        if planned is None or planned[0] != epoch:
            planned = self._planned = (epoch, plan_epoch(self.items, self._batch_size, self._seed, epoch))
        return planned[1]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, index) of the batch number `step`, counted from 0 over all epochs."""
        return divmod(step, self.steps_per_epoch)

    def load(self, epoch: int, draws: Sequence[Draw]) -> list[Sample]:
        """Reads the records of one batch. Raises `MissingRecord`."""
        return [self._sample(epoch, draw) for draw in draws]

    def _sample(self, epoch: int, draw: Draw) -> Sample:
        item = self.items[draw.item]
        dropped = uniform(self._seed, "caption dropout", epoch, draw.item, draw.repeat) < self._dropout
        caption = "" if dropped else item.caption
        return Sample(
            key=item.key, dataset=item.dataset, draw=draw.position, epoch=epoch, frame_rate=item.frame_rate, frames=item.bucket.frames,
            height=item.bucket.height, width=item.bucket.width, records=self._places.read(item, caption), caption=caption,
            kind=item.kind, seconds=item.seconds, first_frame=item.first_frame,
        )  # fmt: skip
