"""What inspecting finds: each remark at a clip made for it, nothing at plain ones; what decoding shows fails as training would fail it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from core.clips import tone, write_clip, write_sound
from core.encoders import GEOMETRY
from tuner.config.datasets import DatasetEntry, load_datasets
from tuner.config.settings import DataSettings
from tuner.data.buckets import Bucket
from tuner.data.epochs import group_turns, plan_epoch
from tuner.data.items import Item
from tuner.data.looks import SIDE, Look, Picture, Scene, look, small_size, wave
from tuner.data.manifest import Manifest, survey
from tuner.data.remarks import Remark, equal_captions, estimate_tokens, find_remarks
from tuner.data.scenes import Viewed, view
from tuner.data.similarity import BYTES, difference_hash, first_similar, means
from tuner.data.workers import DecodeWorkers

SETTINGS = DataSettings(resolution=96, cache_dir="cache")
LIMIT = 20
"""Tokens of a caption."""


@pytest.fixture(scope="module")
def workers() -> Iterator[DecodeWorkers]:
    with DecodeWorkers(1) as pool:
        yield pool


# --- similarity ----------------------------------------------------------------------------------------------------
def texture(seed: int, size: tuple[int, int] = (144, 96)) -> NDArray[np.float64]:
    """(H, W), 0 to 255, with the spectrum of photographs."""
    width, height = size
    rng = np.random.default_rng(seed)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    radius[0, 0] = 1
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / radius**1.2).real
    return ((noise - noise.mean()) / noise.std() * 50 + 128).clip(0, 255)


def changed(grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smaller, darker and strongly compressed."""
    file = io.BytesIO()
    Image.fromarray((grey * 0.8).astype(np.uint8)).resize((100, 60)).save(file, "JPEG", quality=30)
    return np.asarray(Image.open(file), np.float64)


def test_a_hash_has_a_bit_for_every_step() -> None:
    rising = np.tile(np.arange(0, 144, dtype=np.float64), (96, 1))
    bits = np.unpackbits(np.frombuffer(difference_hash(rising), np.uint8))
    # 8 x 8 steps to the right are brighter; those down are even; none is darker.
    assert len(bits) == 8 * BYTES and bits[:64].all() and not bits[64:].any()
    down = np.unpackbits(np.frombuffer(difference_hash(255 - rising.T), np.uint8))
    assert not down[:192].any() and down[192:].all()
    assert difference_hash(np.full((96, 144), 90.0)) == b""
    assert means(np.arange(36.0).reshape(6, 6), 2, 3).tolist() == [[6.5, 8.5, 10.5], [24.5, 26.5, 28.5]]


def test_changed_copies_are_similar_and_others_are_not() -> None:
    originals = [texture(seed) for seed in range(20)]
    seen = [(difference_hash(grey),) for grey in originals]
    copies = [(difference_hash(changed(grey)),) for grey in originals]
    assert first_similar(seen) == {}
    assert first_similar([*seen, *copies]) == {20 + n: n for n in range(20)}


def test_every_frame_counts_and_plain_ones_are_passed_over() -> None:
    a, b, plain = difference_hash(texture(1)), difference_hash(texture(2)), b""
    assert first_similar([(a, b), (a, a)]) == {}
    assert first_similar([(a, plain), (a, plain), (a, b)]) == {1: 0}
    assert first_similar([(plain,), (plain,), (a, a)]) == {}


# --- looking -------------------------------------------------------------------------------------------------------
def test_a_look_keeps_three_small_pictures_and_the_wave(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", frames=9, size=(320, 160), sound=tone(0.5, 48000, 2, [(0.1, 0.2)]))
    scene = Scene((Picture("clip", path, 9, 25.0, (320, 160)),), None, thumbnails=True)
    (seen,) = look(path, scene).seen
    sizes = [Image.open(io.BytesIO(content)).size for content in seen.thumbnails]
    assert sizes == [(SIDE, SIDE // 2)] * 3 and all(content.startswith(b"\xff\xd8") for content in seen.thumbnails)
    assert len(seen.hashes) == 3 and seen.motion > 0.1 and 0.2 < seen.brightness < 0.7
    assert small_size((32, 64)) == (32, 64) and small_size((2048, 256)) == (144, 24)
    columns = wave(tone(0.5, 48000, 2, [(0.1, 0.2)]))
    loud = [index for index, (low, high) in enumerate(columns) if high > 0.4 and low < -0.4]
    assert len(columns) == 120 and loud == list(range(24, 48))
    assert wave(np.zeros((1, 3), np.float32)) == ((0.0, 0.0),) * 3 and wave(np.zeros((1, 0), np.float32)) == ()


# --- remarks -------------------------------------------------------------------------------------------------------
def film(path: Path, pictures: list[NDArray[np.float64]], rate: int = 25) -> Path:
    """A clip of grey pictures, without loss."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"qp": "0"})
        stream.height, stream.width = pictures[0].shape
        stream.pix_fmt = "yuv420p"
        for grey in pictures:
            rgb = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def drifting(seed: int, frames: int = 25) -> list[NDArray[np.float64]]:
    return [np.roll(texture(seed), 3 * index, axis=1) for index in range(frames)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip for each remark, under its name; captioned."""
    folder = tmp_path_factory.mktemp("made")
    plain = film(folder / "clips" / "a plain.mp4", drifting(1))
    shutil.copy(plain, folder / "clips" / "b duplicate.mp4")
    film(folder / "clips" / "c near duplicate.mp4", [0.8 * grey for grey in drifting(1)])
    write_clip(folder / "clips" / "d silent.mp4", sound=np.zeros((2, 48000), np.float32))
    loud = np.clip(4 * tone(1, 48000, 2, [(0, 1)]), -1, 1)
    write_clip(folder / "clips" / "e clipped.mkv", size=(64, 96), sound=loud, sound_codec="pcm_s16le", layout="stereo")
    film(folder / "clips" / "f long caption.mp4", drifting(2))
    film(folder / "clips" / "g dark.mp4", [grey * 0.06 for grey in drifting(3)])
    film(folder / "clips" / "h static.mp4", [texture(4)] * 25)
    film(folder / "clips" / "i enlarged.mp4", [grey[:64, :64] for grey in drifting(5)])
    film(folder / "clips" / "j repeated frames.mp4", drifting(6, 20), rate=15)
    for clip in sorted((folder / "clips").iterdir()):
        clip.with_suffix(".txt").write_text("many words " * LIMIT if "caption" in clip.name else f"about {clip.stem}")
    (folder / "exam").mkdir()
    shutil.copy(plain, folder / "exam" / "a.mp4")
    (folder / "exam" / "a.txt").write_text("an exam")
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def entries(tmp_path: Path, *raw: Mapping[str, object]) -> list[DatasetEntry]:
    file = tmp_path / "datasets.json"
    file.write_text(json.dumps([{"cache_dir": str(tmp_path / "cache"), **entry} for entry in raw]))
    return load_datasets(file, None, SETTINGS, {})


def looked_at(found: list[DatasetEntry], workers: DecodeWorkers, thumbnails: int = 0) -> tuple[Viewed, list[tuple[Remark, ...]]]:
    viewed = view(survey(found, SETTINGS, GEOMETRY, workers=workers, remember=False), workers, thumbnails=thumbnails)
    return viewed, find_remarks(viewed.manifest.verdicts, viewed.looks, LIMIT, lambda verdict: verdict.path.name)


CLIPS: Mapping[str, object] = {"id": "clips", "instance_data_dir": "clips"}


def test_each_remark_is_found_where_it_belongs(here: Path, tmp_path: Path, workers: DecodeWorkers) -> None:
    exam = {"id": "exam", "dataset_type": "eval", "instance_data_dir": "exam"}
    viewed, remarks = looked_at(entries(tmp_path, CLIPS, exam), workers)
    kinds = [(verdict.path.stem, [remark.kind for remark in own]) for verdict, own in zip(viewed.manifest.verdicts, remarks, strict=True)]
    assert kinds == [
        ("a plain", []), ("b duplicate", ["duplicate"]), ("c near duplicate", ["near duplicate"]), ("d silent", ["silent"]),
        ("e clipped", ["clipped"]), ("f long caption", ["long caption"]), ("g dark", ["dark"]), ("h static", ["static"]),
        ("i enlarged", ["enlarged"]), ("j repeated frames", ["repeated frames"]), ("a", ["held out and trained"]),
    ]  # fmt: skip
    texts = {remark.kind: remark.text for own in remarks for remark in own}
    assert texts == {
        "duplicate": "the same file as a plain.mp4", "near duplicate": "shows nearly the same as a plain.mp4",
        "silent": "its sound is silent", "clipped": texts["clipped"], "dark": texts["dark"],
        "long caption": f"its caption has about 55 tokens, the model reads {LIMIT}", "static": "nothing moves in 25 frames",
        "enlarged": "enlarged 1.5 times, from 64x64 to 96x96", "held out and trained": "trained as well: a plain.mp4",
        "repeated frames": "15 frames/s are shown at 25, so frames are repeated",
    }  # fmt: skip
    # |2 sin| is above 1 in two thirds of all samples.
    assert float(texts["clipped"].partition("%")[0]) == pytest.approx(66.7, abs=1)
    heard = {verdict.path.stem: one.heard for verdict, one in zip(viewed.manifest.verdicts, viewed.looks, strict=True) if one}
    silent, clipped = heard["d silent"], heard["e clipped"]
    assert silent is not None and silent.loudness is None and silent.peak == 0
    assert clipped is not None and clipped.peak == pytest.approx(1, abs=1e-4) and heard["a plain"] is None


def test_the_same_folder_twice_is_no_duplicate_and_captions_can_all_be_equal(here: Path, tmp_path: Path, workers: DecodeWorkers) -> None:
    smaller = {**CLIPS, "id": "smaller", "resolution": 64, "caption_strategy": "instanceprompt", "instance_prompt": "a clip"}
    found = entries(tmp_path, CLIPS, smaller)
    viewed, remarks = looked_at(found, workers)
    duplicates = [v.path.name for v, own in zip(viewed.manifest.verdicts, remarks, strict=True) if any(r.kind == "duplicate" for r in own)]
    assert duplicates == ["b duplicate.mp4", "b duplicate.mp4"]
    assert equal_captions(viewed.manifest.verdicts, found) == []  # asked for
    copy = tmp_path / "equal"
    shutil.copytree(here / "clips", copy, ignore=shutil.ignore_patterns("[!a-c]*", "*.txt"))
    for clip in list(copy.iterdir()):
        clip.with_suffix(".txt").write_text("the one and only " * 5)
    equal = entries(tmp_path, {"id": "equal", "instance_data_dir": str(copy)})
    manifest = survey(equal, SETTINGS, GEOMETRY, workers=workers, remember=False)
    words = "equal: all 3 captions are the same: the one and only the one and only the one and only the one a…"
    assert equal_captions(manifest.verdicts, equal) == [words]


def test_tokens_are_estimated_from_words_and_bytes() -> None:
    assert estimate_tokens("") == 0
    assert estimate_tokens("a dog runs") == 4
    assert estimate_tokens("一只狗在跑" * 10) == 38  # 150 bytes


# --- what decoding shows -------------------------------------------------------------------------------------------
def test_what_cannot_be_decoded_drops_out_and_takes_nothing_along(here: Path, tmp_path: Path, workers: DecodeWorkers) -> None:
    clips, masks, songs = (tmp_path / name for name in ("films", "masks", "songs"))
    for name in ("good", "torn", "masked", "dubbed", "short"):
        film(clips / f"{name}.mp4", drifting(len(name), 5 if name == "short" else 25))
        (clips / f"{name}.txt").write_text(name)
        write_sound(_folder(songs) / f"{name}.wav", tone(1, 16000, 1, [(0, 1)]), 16000, "pcm_s16le")
        Image.fromarray(np.full((96, 144, 3), 255, np.uint8)).save(_folder(masks) / f"{name}.png")
    film(masks / "masked.mp4", drifting(9))
    (masks / "masked.png").unlink()
    for path in (clips / "torn.mp4", masks / "masked.mp4"):
        content = bytearray(path.read_bytes())
        end = content.index(b"moov") - 4
        content[end - 60 : end] = bytes(60)
        path.write_bytes(content)
    found = entries(
        tmp_path, {"id": "films", "instance_data_dir": str(clips), "s2v_datasets": "songs", "conditioning_data": "masks"},
        {"id": "songs", "dataset_type": "audio", "instance_data_dir": str(songs)},
        {"id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": str(masks)},
    )  # fmt: skip
    before = survey(found, SETTINGS, GEOMETRY, workers=workers, remember=False)
    viewed, _ = looked_at(found, workers, thumbnails=100)
    states = {v.path.stem: (v.status, v.reason) for v in viewed.manifest.verdicts if v.dataset == "films"}
    assert before.count("failed") == 0 and states == {
        "dubbed": ("used", ""), "good": ("used", ""), "masked": ("failed", "truncated or damaged"), "short": ("skipped", "too short"),
        "torn": ("failed", "truncated or damaged"),
    }  # fmt: skip
    looks: dict[str, Look | None] = {v.path.name: one for v, one in zip(viewed.manifest.verdicts, viewed.looks, strict=True)}
    good, short = looks["good.mp4"], looks["short.mp4"]
    assert good and [seen.role for seen in good.seen] == ["clip", "mask"] and good.heard and good.heard.wave
    assert short and len(short.seen[0].thumbnails) == 3  # shown, though it is skipped
    assert looks["torn.mp4"] is None and looks["good.png"] is None
    assert looked_at(found, workers)[0].looks[3] is None  # without pictures it is not decoded
    assert not (tmp_path / "cache").exists()


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


# --- totals --------------------------------------------------------------------------------------------------------
ENTRIES = [("a", 1.0), ("b", 0.5), ("c", 0.3)]
turns = st.lists(st.tuples(st.sampled_from([32, 64, 96]), st.integers(0, 3), st.sampled_from(ENTRIES)), min_size=1, max_size=15)


@given(turns, st.integers(1, 5), st.integers(0, 3))
def test_the_batches_of_buckets_are_those_of_an_epoch(drawn: list[tuple[int, int, tuple[str, float]]], size: int, epoch: int) -> None:
    items = [
        Item(entry, Path(f"{n}.mp4"), f"{n:064x}", "", Bucket(width, 64, 9), 25.0, False, False, False, repeats, Path("cache"),
             probability=probability)
        for n, (width, repeats, (entry, probability)) in enumerate(drawn)
    ]  # fmt: skip
    planned = plan_epoch(items, size, 7, epoch)
    groups = group_turns(items, size)
    assert sum(group.batches for group in groups) == len(planned)
    assert sum(group.items for group in groups) == len(items)
    for group in groups:
        own = [batch for batch in planned if items[batch[0].item].group == group.group]
        assert (group.batches, group.turns, group.last) == (len(own), sum(map(len, own)), min(map(len, own)))
    assert Manifest((), (), Path("cache"), GEOMETRY).batches_per_epoch(size) == 0


def test_workers_look_without_torch() -> None:
    code = "import sys, tuner.data.looks; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
