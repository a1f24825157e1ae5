"""Filling the cache: from clips on disk to records, one encoder at a time, failures counted, nothing done twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from core.clips import picture, tone, write_clip
from core.encoders import GEOMETRY, Pictures, Sounds, Words
from tuner.config.datasets import load_datasets
from tuner.config.settings import DataSettings
from tuner.data.dataset import TrainingSet
from tuner.data.manifest import Manifest, scan
from tuner.data.records import RecordPlaces
from tuner.data.workers import DecodeWorkers
from tuner.errors import DataError, OutOfMemoryError, PluginError
from tuner.interfaces.encoders import Record, Source
from tuner.train.caching import CacheSummary, fill_cache

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def workers() -> Iterator[DecodeWorkers]:
    with DecodeWorkers(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for number in range(4):
        sound = tone(1, 48000, 1, [(0, 0.2)]) if number % 2 == 0 else None
        write_clip(folder / f"{number}.mp4", frames=17, size=(64, 64), sound=sound, layout="mono", flashes=[number])
        (folder / f"{number}.txt").write_text(f"clip {number // 2}")
    return folder


@pytest.fixture
def clips(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "clips")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "clips"


def find(workers: DecodeWorkers, **changes: object) -> Manifest:
    settings = DataSettings(resolution=64, cache_dir="cache")
    raw = [{"id": "clips", "instance_data_dir": "clips", "video": {"num_frames": 9}, **changes},
           {"id": "text", "dataset_type": "text_embeds", "cache_dir": "cache/text"}]  # fmt: skip
    Path("datasets.json").write_text(json.dumps(raw))
    return scan(load_datasets(Path("datasets.json"), None, settings, {}), settings, GEOMETRY, workers=workers)


def counts(summary: CacheSummary) -> tuple[int, int, int, int]:
    assert summary.found == summary.cached + summary.encoded + summary.failed
    return summary.found, summary.cached, summary.encoded, summary.failed


def test_records_are_what_the_sources_say(clips: Path, workers: DecodeWorkers) -> None:
    manifest = find(workers)
    encoders = [Pictures(), Sounds(), Words()]
    reports: list[tuple[int, int, str]] = []
    summary = fill_cache(
        manifest, encoders, CPU, batch_size=3, with_empty_caption=True, report=lambda *row: reports.append(row), workers=workers
    )
    assert counts(summary) == (4, 0, 4, 0) and (summary.captions_cached, summary.captions_encoded) == (0, 3)
    assert [(e.loads, e.unloads, e.batches) for e in encoders] == [(1, 1, [3, 1]), (1, 1, [2]), (1, 1, [3])]
    assert [row for row in reports if row[0] == row[1]] == [(4, 4, "encoding video"), (2, 2, "encoding audio"), (3, 3, "encoding text")]
    dataset = TrainingSet(summary.manifest, encoders, 1, seed=0)
    for batch in dataset.epoch_plan(0):
        (sample,) = dataset.load(0, batch)
        number = batch[0].item
        expected = torch.stack([torch.from_numpy(picture(i, 64, 64, flash=i == number)).float().mean((0, 1)) for i in range(9)])
        assert (sample.records["video"].tensors["latents"] - expected).abs().max() < 3  # compression
        assert ("audio" in sample.records) == (number % 2 == 0)
        if number % 2 == 0:
            assert sample.records["audio"].tensors["valid"] == round(9 / 25 * 16000)
            mean = 0.5 * 2 / torch.pi * 0.2 / (9 / 25)  # of |0.5 sin| while it sounds
            assert (sample.records["audio"].tensors["latents"] - mean).abs().max() < 0.01
        assert sample.records["text"].tensors["video"].tolist() == [float(ord(c)) for c in f"clip {number // 2}"]


def test_second_run_loads_nothing_and_a_changed_setting_misses(clips: Path, workers: DecodeWorkers) -> None:
    manifest = find(workers)
    fill_cache(manifest, [Pictures(), Sounds(), Words()], CPU, workers=workers)
    again = [Pictures(), Sounds(), Words()]
    assert counts(fill_cache(manifest, again, CPU, workers=workers)) == (4, 4, 0, 0)
    assert [e.loads for e in again] == [0, 0, 0]
    changed = [Pictures(scale=2.0), Sounds(), Words()]
    assert counts(fill_cache(manifest, changed, CPU, workers=workers)) == (4, 0, 4, 0)
    assert [e.loads for e in changed] == [1, 0, 0]
    back = [Pictures(), Sounds(), Words()]
    assert counts(fill_cache(manifest, back, CPU, workers=workers)) == (4, 4, 0, 0)
    mono = find(workers, audio={"channels": 1})
    encoders = [Pictures(), Sounds(), Words()]
    assert counts(fill_cache(mono, encoders, CPU, workers=workers)) == (4, 2, 2, 0)
    assert [e.loads for e in encoders] == [0, 1, 0]


def test_encoders_of_one_name_and_settings_share_records_only_where_they_are_of_one_class(clips: Path, workers: DecodeWorkers) -> None:
    """Two families may both have an encoder `video` without settings, and one cache folder."""
    manifest = find(workers)
    elsewhere = type(Pictures.__qualname__, (Pictures,), {"__module__": "other_family.latents", "__qualname__": Pictures.__qualname__})
    other = type("Paintings", (Pictures,), {"__module__": Pictures.__module__})
    moved = type(Pictures.__qualname__, (Pictures,), {"__module__": f"{Pictures.__module__.partition('.')[0]}.moved"})
    moved.__qualname__ = Pictures.__qualname__
    assert counts(fill_cache(manifest, [Pictures()], CPU, workers=workers)) == (4, 0, 4, 0)
    for kind, encoded in ((elsewhere, 4), (other, 4), (moved, 0), (Pictures, 0)):
        assert counts(fill_cache(manifest, [kind()], CPU, workers=workers)) == (4, 4 - encoded, encoded, 0)


def test_a_damaged_entry_is_encoded_anew(clips: Path, workers: DecodeWorkers) -> None:
    manifest = find(workers)
    encoder = Pictures()
    fill_cache(manifest, [encoder], CPU, workers=workers)
    place = RecordPlaces([encoder], GEOMETRY, manifest.text_cache).clip(manifest.items[1], "video")
    assert place is not None
    place.cache.path(place.key).write_bytes(b"damaged")
    assert counts(fill_cache(manifest, [encoder], CPU, workers=workers)) == (4, 3, 1, 0)
    assert place.filled()


def test_clips_that_fail_are_counted_and_left_out(clips: Path, workers: DecodeWorkers) -> None:
    path = clips / "1.mp4"
    data = bytearray(path.read_bytes())
    end = data.index(b"moov") - 4
    data[end - 60 : end] = bytes(60)  # the last frames; the first one is looked at earlier
    path.write_bytes(bytes(data))
    (clips / "0.txt").write_text("undecipherable")
    manifest = find(workers, video={"num_frames": 17})
    assert manifest.count("used") == 4
    encoders = [Pictures(), Sounds(), Words()]
    summary = fill_cache(manifest, encoders, CPU, batch_size=2, workers=workers)
    assert counts(summary) == (4, 0, 2, 2)
    assert {item.path.name for item in summary.failures} == {"0.mp4", "1.mp4"}
    assert [item.path.name for item in summary.manifest.items] == ["2.mp4", "3.mp4"]
    assert summary.manifest.describe() == "found 4 = used 2 + skipped 0 + failed 2"
    assert "cannot be tokenized" in summary.manifest.table() and "0.mp4" in summary.describe()
    assert summary.facts()["failed"] == 2 and str(clips) not in json.dumps(summary.facts())
    assert all(e.loads == e.unloads == 1 for e in encoders)
    assert counts(fill_cache(manifest, encoders, CPU, workers=workers)) == (4, 2, 0, 2)


def test_no_clip_left_is_an_error(clips: Path, workers: DecodeWorkers) -> None:
    for file in clips.glob("*.txt"):
        file.write_text("undecipherable")
    with pytest.raises(DataError, match="no clip could be encoded"):
        fill_cache(find(workers), [Words()], CPU, workers=workers)


def test_silence_stands_in_for_sound(clips: Path, workers: DecodeWorkers) -> None:
    manifest = find(workers, audio={"allow_zero_audio": True})
    encoder = Sounds()
    assert counts(fill_cache(manifest, [encoder], CPU, batch_size=8, workers=workers)) == (4, 0, 4, 0)
    assert encoder.batches == [3]  # the silent ones are one and the same sound
    dataset = TrainingSet(manifest, [encoder], 4, seed=0)
    samples = dataset.load(0, dataset.epoch_plan(0)[0])
    assert sorted(float(s.records["audio"].tensors["latents"].sum()) > 0 for s in samples) == [False, False, True, True]


class Broken(Pictures):
    """Fails in its own way while encoding."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error = error

    def encode(self, sources: list[Source]) -> list[Record]:  # type: ignore[override]
        if self.error:
            raise self.error
        return []


def test_encoders_are_unloaded_after_any_error(clips: Path, workers: DecodeWorkers) -> None:
    manifest = find(workers)
    for error, kind in ((RuntimeError("bug"), RuntimeError), (KeyboardInterrupt(), KeyboardInterrupt), (None, PluginError)):
        encoder = Broken(error)
        with pytest.raises(kind):
            fill_cache(manifest, [encoder], CPU, workers=workers)
        assert (encoder.loads, encoder.unloads) == (1, 1)


class Hungry(Pictures):
    """Takes `fits` clips at once; after each of `ways` one more. The last way may give other records."""

    def __init__(self, fits: int, ways: tuple[str, ...] = (), lacking: BaseException | None = None, other: bool = False) -> None:
        super().__init__()
        self.fits, self.ways, self.other = fits, list(ways), other
        self.lacking = lacking or torch.OutOfMemoryError("full")

    def reduce_memory(self) -> str | None:
        if not self.ways:
            return None
        self.fits += 1
        if self.other and len(self.ways) == 1:
            self.scale = 2.0
        return self.ways.pop(0)

    def encode(self, sources: Sequence[Source]) -> list[Record]:
        if len(sources) > self.fits:
            raise self.lacking
        return super().encode(sources)


def latents(manifest: Manifest, encoder: Pictures) -> torch.Tensor:
    places = RecordPlaces([encoder], GEOMETRY, manifest.text_cache)
    return torch.stack([places.read(item, "")["video"].tensors["latents"] for item in manifest.items])


def test_what_does_not_fit_is_encoded_in_smaller_batches_then_in_other_ways(clips: Path, workers: DecodeWorkers) -> None:
    manifest = find(workers)
    fill_cache(manifest, [plain := Pictures()], CPU, batch_size=4, workers=workers)
    expected = latents(manifest, plain)
    shutil.rmtree("cache")
    encoder = Hungry(1)
    summary = fill_cache(manifest, [encoder], CPU, batch_size=4, workers=workers)
    assert counts(summary) == (4, 0, 4, 0) and encoder.batches == [1, 1, 1, 1]
    assert [notice.partition(":")[2].partition(":")[0] for notice in summary.notices] == [
        " vae_batch_size 4 -> 2",
        " vae_batch_size 2 -> 1",
    ]
    assert torch.equal(latents(manifest, encoder), expected)
    shutil.rmtree("cache")
    encoder = Hungry(-1, ("slices", "chunks"))
    summary = fill_cache(manifest, [encoder], CPU, batch_size=1, workers=workers)
    assert encoder.batches == [1] * 4 and encoder.loads == encoder.unloads == 1
    assert [("slices" in notice, "chunks" in notice) for notice in summary.notices] == [(True, False), (False, True)]
    assert all(notice in summary.describe() for notice in summary.notices) and summary.facts()["notices"] == list(summary.notices)
    assert torch.equal(latents(manifest, encoder), expected)


def test_a_way_that_gives_other_records_makes_all_of_them_anew(clips: Path, workers: DecodeWorkers) -> None:
    """The third clip is too much: what was made before it has other names than what comes after, so all are made in the new way."""

    class Tired(Hungry):
        def encode(self, sources: Sequence[Source]) -> list[Record]:
            self.fits = self.fits if len(self.batches) != 2 or self.scale == 2.0 else 0
            return super().encode(sources)

    manifest = find(workers)
    encoder = Tired(1, ("tiles",), other=True)
    summary = fill_cache(manifest, [encoder], CPU, batch_size=1, workers=workers)
    assert counts(summary) == (4, 0, 4, 0) and sum(encoder.batches) == 6 and encoder.loads == 1
    doubled = latents(manifest, encoder)
    shutil.rmtree("cache")
    fill_cache(manifest, [plain := Pictures()], CPU, workers=workers)
    assert torch.equal(doubled, 2 * latents(manifest, plain))


def test_out_of_memory_names_clip_size_and_keys(clips: Path, workers: DecodeWorkers) -> None:
    encoder = Hungry(0)
    with pytest.raises(OutOfMemoryError, match="device memory to encode it with 'video': 9 frames of 64x64") as caught:
        fill_cache(find(workers), [encoder], CPU, batch_size=2, workers=workers)
    assert caught.value.exit_code == 5 and caught.value.where.endswith(".mp4") and "resolution" in caught.value.remedy
    assert encoder.unloads == 1


@pytest.mark.parametrize("lacking", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")])
def test_a_source_that_host_memory_cannot_hold_is_left_out(clips: Path, workers: DecodeWorkers, lacking: BaseException) -> None:
    class Picky(Hungry):
        def encode(self, sources: Sequence[Source]) -> list[Record]:
            self.fits = 0 if any(source.frames[3].max() > 254 and source.frames[3][0, 0].min() > 200 for source in sources) else 9  # type: ignore[union-attr]
            return super().encode(sources)

    summary = fill_cache(find(workers), [Picky(9, lacking=lacking)], CPU, batch_size=4, workers=workers)
    assert counts(summary) == (4, 0, 3, 1)
    assert [(item.path.name, "host memory" in error.message) for item, error in summary.failures.items()] == [("3.mp4", True)]


def test_same_clip_twice_is_encoded_once(clips: Path, workers: DecodeWorkers) -> None:
    for suffix in ("mp4", "txt"):
        shutil.copy(clips / f"3.{suffix}", clips / f"copy.{suffix}")
    encoder = Pictures()
    assert counts(fill_cache(find(workers), [encoder], CPU, batch_size=8, workers=workers)) == (5, 0, 5, 0)
    assert encoder.batches == [4]
