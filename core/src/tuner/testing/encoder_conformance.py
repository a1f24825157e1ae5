"""What every latent encoder has to keep to: records must depend on the source and the settings, and on nothing else."""

from __future__ import annotations

import gc
import json
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from tuner.interfaces.encoders import LatentEncoder, Record, Source, VideoClip
from tuner.plugins.record import Kind
from tuner.testing.clips import moving_picture, tone
from tuner.testing.conformance import Conformance, check, equal

CPU = torch.device("cpu")
CAPTIONS = ("a red ball rolls over grass", "", "two people talk; rain falls", "a river at sunset, water splashes, a dog barks")
PATHS = re.compile(r"(?<![\w.])[/\\][\w.-]+[/\\]|[A-Za-z]:\\|~/")


class EncoderConformance(Conformance):
    """Subclass it, and say how the encoder is made:

        class TestMine(EncoderConformance):
            plugin = tuner_mine.plugin
            component = "mine"            # an encoder that the plugin registers
            options = {"mine": True}

    or, for the encoder of a family or a regularizer, override `encoder`. Size and rate are those of the clips it is given.
    """

    kind: ClassVar[Kind] = "latent_encoder"
    frames: ClassVar[int] = 9
    size: ClassVar[tuple[int, int]] = (64, 64)
    """Width and height in pixels."""
    sample_rate: ClassVar[int] = 16000
    channels: ClassVar[int] = 2
    seconds: ClassVar[float] = 0.36
    tolerance: ClassVar[float] = 0.0
    """How far a record may be from the same one encoded in a batch, or in less memory, relative to its largest number. 0: not at all.
    Libraries choose other kernels for other shapes: give a few units in the last place of the encoder's dtype."""

    def encoder(self) -> LatentEncoder:
        """A new encoder, not loaded."""
        built = self.build()
        assert isinstance(built, LatentEncoder)
        return built

    def sources(self, count: int = 3) -> list[Source]:
        """Different sources of one shape, of the kind that it reads."""
        reads = self.encoder().reads
        if reads == "text":
            return list(CAPTIONS[:count])
        if reads == "audio":
            return [tone(self.seconds, 200.0 * (index + 1), self.sample_rate, self.channels) for index in range(count)]
        return [VideoClip(moving_picture(self.frames, *self.size, index / 3), 25.0) for index in range(count)]

    def encoded(self, sources: Sequence[Source]) -> list[Record]:
        """By a new encoder, which is unloaded again."""
        encoder = self.encoder()
        try:
            encoder.load(CPU)
            return encoder.encode(sources)
        finally:
            encoder.unload()

    # --- settings ------------------------------------------------------------------------------------------------
    def test_settings_name_the_record_and_no_place(self) -> None:
        encoder = self.encoder()
        settings = dict(encoder.settings())
        plain = all(isinstance(value, str | int | float | bool) for value in settings.values())
        check(plain, f"settings hold something else than text, numbers and true/false: {settings}; they name cache files as JSON")
        check(bool(settings), "settings are empty: give at least a version, to be raised when the same source would give other records")
        check(
            any(isinstance(value, str) and value for value in settings.values()),
            f"settings hold no text, {settings}: the records of another encoder with this name, of another family, could be taken for "
            "these; name the family or the weights' fingerprint",
        )
        text = json.dumps(settings)
        check(
            not PATHS.search(text), f"settings hold a path, {text}: the same weights in another folder would be encoded with all over again"
        )
        check(
            settings == dict(self.encoder().settings()),
            "two encoders with the same options have different settings: nothing would be found again",
        )

    def test_settings_do_not_depend_on_loading(self) -> None:
        encoder = self.encoder()
        before = dict(encoder.settings())
        encoder.load(CPU)
        loaded = dict(encoder.settings())
        encoder.unload()
        check(
            before == loaded == dict(encoder.settings()), "settings change with load or unload: training looks records up without loading"
        )

    # --- records -------------------------------------------------------------------------------------------------
    def test_records_are_plain_and_alike(self) -> None:
        records = self.encoded(self.sources())
        check(len(records) == len(self.sources()), f"{len(records)} records for {len(self.sources())} sources")
        check(all(isinstance(record, Record) and record.tensors for record in records), "a record holds no tensor")
        keys = {tuple(record.tensors) for record in records}
        check(len(keys) == 1, f"records hold different tensors: {keys}; batches stack them by name")
        for name, tensor in ((name, tensor) for record in records for name, tensor in record.tensors.items()):
            check(
                tensor.device.type == "cpu" and not tensor.requires_grad,
                f"{name} is on {tensor.device}, or carries a graph: the cache is on disk",
            )
            check(bool(tensor.isfinite().all()), f"{name} holds numbers that are not finite")
            own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            check(
                own and tensor.is_contiguous(),
                f"{name} is a view of a larger tensor: whoever keeps one record keeps all of its batch; clone it",
            )
        shapes = {tuple(tensor.shape for tensor in record.tensors.values()) for record in records}
        check(len(shapes) == 1, f"sources of one shape give records of different shapes: {shapes}; they could not be stacked")

    def test_different_sources_give_different_records(self) -> None:
        one, other, *_ = self.encoded(self.sources())
        alike = all(equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
        check(not alike, "two different sources give the same record: it does not look at them")

    def test_encoding_twice_gives_the_same_bits(self) -> None:
        torch.manual_seed(1)
        first = self.encoded(self.sources())
        torch.manual_seed(2)
        self._compare(
            first, self.encoded(self.sources()), 0.0, "encoding the same sources twice gives other records: take the mode, draw nothing"
        )

    def test_a_record_does_not_depend_on_its_batch(self) -> None:
        sources = self.sources()
        alone = [self.encoded([source])[0] for source in sources]
        why = "a source gives another record in a batch than alone: what is in the cache would depend on vae_batch_size and file names"
        self._compare(alone, self.encoded(sources), self.tolerance, why)
        self._compare(alone[::-1], self.encoded(sources[::-1]), self.tolerance, why)

    def test_less_memory_gives_the_same_records(self) -> None:
        sources, encoder = self.sources(2), self.encoder()
        encoder.load(CPU)
        try:
            expected, settings = encoder.encode(sources), dict(encoder.settings())
            for _ in range(20):
                if encoder.reduce_memory() is None:
                    return
                if dict(encoder.settings()) == settings:
                    why = "reduce_memory() changes the records but not the settings: old and new ones would be mixed in one cache"
                    self._compare(expected, encoder.encode(sources), self.tolerance, why)
            raise AssertionError("reduce_memory() still finds something to switch on after 20 times: encoding would never give up")
        finally:
            encoder.unload()

    # --- its life ------------------------------------------------------------------------------------------------
    def test_unload_frees_and_may_come_at_any_time(self) -> None:
        encoder, sources = self.encoder(), self.sources(1)
        encoder.unload()
        before = reachable_bytes(encoder)
        encoder.load(CPU)
        encoder.encode(sources)
        encoder.unload()
        encoder.unload()
        after = reachable_bytes(encoder)
        check(
            after <= before,
            f"after unload() the encoder still holds {after - before} bytes of tensors: the transformer is loaded next to them",
        )
        encoder.load(CPU)
        again = encoder.encode(sources)
        encoder.unload()
        self._compare(self.encoded(sources), again, 0.0, "loaded a second time it gives other records")

    def _compare(self, one: Sequence[Record], other: Sequence[Record], tolerance: float, why: str) -> None:
        for a, b in zip(one, other, strict=True):
            for name, tensor in a.tensors.items():
                check(close(tensor, b.tensors[name], tolerance), f"{name}: {why}")


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Equal bits, or apart by at most `tolerance` of the largest number."""
    if tolerance == 0 or not one.is_floating_point():
        return equal(one, other)
    largest = float(one.float().abs().max().clamp(min=1e-12)) if one.numel() else 1.0
    return one.shape == other.shape and float((one.float() - other.float()).abs().max()) <= tolerance * largest


def reachable_bytes(owner: object) -> int:
    """Bytes of all tensors that can be reached from `owner` through attributes, containers and closures."""
    skipped = (type, types.ModuleType, types.FrameType, Path, str, bytes, int, float)
    seen, queue, storages = {id(owner)}, [owner], dict[int, int]()
    while queue:
        one = queue.pop()
        if isinstance(one, Tensor):
            storages[one.untyped_storage()._cdata] = one.untyped_storage().nbytes()
        # A function's globals lead to every module's tensors, so of functions only the closure is followed.
        children = list(one.__closure__ or ()) if isinstance(one, types.FunctionType) else gc.get_referents(one)
        for child in children:
            if id(child) not in seen and not isinstance(child, skipped):
                seen.add(id(child))
                queue.append(child)
    return sum(storages.values())
