"""Every kind of clip that cameras and programs make. Oracles: the number in each frame and its known time, the tone under each flash.

Clips are 64 x 48 pixels and at most two seconds long; the flashes and tones are at 0.4-0.6 and 1.0-1.3 seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import pytest

from core.clips import is_flash, picture, read_number, tone, turn_clockwise, write_clip, write_sound
from core.encoders import GEOMETRY
from tuner.config.datasets import AudioOptions, VideoOptions
from tuner.data.container import MediaError, RefusedMedia, TruncatedMedia, UnreadableMedia, probe
from tuner.data.decode import SEEK, decode_frames, decode_sound
from tuner.data.lengths import clip_span

RATE = 25.0
HEARD = 16000
"""Hz of the decoded sound."""
PULSES = ((0.4, 0.6), (1.0, 1.3))
VARIABLE = [sum([1 / 60, 1 / 24, 1 / 12, 1 / 30][i % 4] for i in range(n)) for n in range(40)]


@dataclass(frozen=True)
class Film:
    """How a clip is made."""

    suffix: str
    times: Sequence[float]
    """Of its frames, from the first one on."""
    rate: Fraction | int = 25
    sound_rate: int = 48000
    layout: str = "stereo"
    codecs: tuple[str, str, str] = ("libx264", "yuv420p", "aac")
    picture_at: float = 0.0
    """Seconds into the file at which the picture begins; the sound begins at `sound_at`."""
    sound_at: float = 0.0
    size: tuple[int, int] = (64, 48)
    more: dict[str, Fraction] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        seconds, late = self.times[-1] + 0.04, self.picture_at - self.sound_at
        channels = {"mono": 1, "stereo": 2, "5.1": 6}[self.layout]
        flashes = [[n for n, time in enumerate(self.times) if begin - 1e-6 <= time < end - 1e-6] for begin, end in PULSES]
        # The tone sounds exactly while the frames that flash are shown.
        pulses = [(self.times[shown[0]] + late, self.times[shown[-1] + 1] + late) for shown in flashes]
        sound = tone(seconds + late, self.sound_rate, channels, pulses)
        codec, pixels, voice = self.codecs
        constant = self.rate if self.picture_at == 0 and self.times is not VARIABLE else None
        return write_clip(
            folder / f"film{self.suffix}", frames=len(self.times), rate=self.rate, size=self.size, codec=codec, pix_fmt=pixels,
            times=None if constant else [time + self.picture_at for time in self.times],
            flashes=[*chain(*flashes)],
            sound=sound, sound_rate=self.sound_rate, layout=self.layout, sound_start=self.sound_at, sound_codec=voice, **self.more,  # type: ignore[arg-type]
        )  # fmt: skip


def even(rate: Fraction | int, seconds: float = 1.6) -> list[float]:
    return [n / float(rate) for n in range(round(float(rate) * seconds))]


WEB = ("libvpx-vp9", "yuv420p", "libopus")
RAW = ("libx264", "yuv420p", "pcm_s16le")
FILMS = {
    "23.976": Film(".mp4", even(Fraction(24000, 1001)), Fraction(24000, 1001), 44100),
    "24 mono in matroska": Film(".mkv", even(24), 24, 48000, "mono"),
    "25 in webm": Film(".webm", even(25), 25, codecs=WEB),
    "29.97 in quicktime": Film(".mov", even(Fraction(30000, 1001)), Fraction(30000, 1001), 44100, "mono"),
    "30 in avi": Film(".avi", even(30), 30, 22050, "mono", ("mpeg4", "yuv420p", "pcm_s16le")),
    "50, surround": Film(".mp4", even(50), 50, 48000, "5.1"),
    "60, telephone sound": Film(".mkv", even(60), 60, 8000, "mono", RAW),
    "variable": Film(".mkv", VARIABLE, 25, 44100),
    "variable in mp4": Film(".mp4", VARIABLE, 25, 22050),
    "10 bit": Film(".mkv", even(25), 25, codecs=("libx265", "yuv420p10le", "flac")),
    "late picture": Film(".mp4", even(25), 25, picture_at=0.24),
    "late sound": Film(".mkv", even(25), 25, sound_at=0.24),
    "late sound in mp4": Film(".mp4", even(30), 30, sound_at=0.3),
    "late picture in matroska": Film(".mkv", even(30), 30, 44100, codecs=RAW, picture_at=0.3),
    "lossless, odd sides": Film(".mkv", even(25), 25, codecs=("ffv1", "yuv444p", "flac"), size=(65, 49)),
    "wide pixels": Film(".mp4", even(25), 25, more={"aspect": Fraction(4, 3)}),
}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each is written once."""
    made: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in made:
            made[name] = FILMS[name].write(tmp_path_factory.mktemp("film"))
        return made[name]

    return path


def assert_on_screen(number: int, seconds: float, times: Sequence[float]) -> None:
    """Frame `number` is shown at `seconds`, but for the milliseconds to which containers round."""
    end = times[number + 1] if number + 1 < len(times) else np.inf
    assert times[number] - 0.0011 <= seconds <= end + 0.0011, (number, seconds)


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.parametrize("mode", ["beginning", "end", "random"])
def test_the_frame_on_screen_and_the_tone_under_its_flash(films: Callable[[str], Path], name: str, mode: str) -> None:
    path, film = films(name), FILMS[name]
    facts = probe(path)
    span = clip_span(VideoOptions(num_frames=33), AudioOptions(truncation_mode=mode), facts, RATE, "beef" * 4, GEOMETRY)  # type: ignore[arg-type]
    assert span.frames == 33
    assert span.start <= facts.seconds - 32 / RATE and (span.start == 0 or mode != "beginning") and (span.start > 0 or mode != "end")
    frames = decode_frames(path, span.frames, RATE, start=span.start)
    assert frames.shape[1:3] == (facts.height, facts.width)
    for index, frame in enumerate(frames):
        assert_on_screen(read_number(frame), span.start + index / RATE, film.times)
    decoded = decode_sound(path, span.frames / RATE, HEARD, 2, span.start)
    assert decoded is not None and decoded[0].shape == (2, span.frames * HEARD // 25)
    loud = np.abs(decoded[0]).max(0).reshape(-1, 64).max(1) > 0.1  # rows of 4 ms
    sounding = np.repeat([is_flash(frame) for frame in frames], 10)
    assert sounding.any()
    assert_within_a_frame(loud, sounding)


def assert_within_a_frame(loud: np.ndarray, sounding: np.ndarray) -> None:
    """What is heard begins and ends within one frame (ten rows) of what is seen: each lies within the other, made a frame wider."""
    for one, other in ((loud, sounding), (sounding, loud)):
        wider = np.convolve(other, np.ones(21), mode="same") > 0
        assert not (one & ~wider)[10:-10].any()


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_turned_films(tmp_path: Path, quarters: int) -> None:
    path = write_clip(tmp_path / "phone.mp4", frames=9, size=(64, 48))
    if quarters:
        turn_clockwise(path, quarters)
    facts = probe(path)
    assert (facts.width, facts.height) == ((48, 64) if quarters % 2 else (64, 48))
    frames = decode_frames(path, 9, RATE)
    assert [read_number(np.rot90(frame, quarters)) for frame in frames] == list(range(9))  # numpy turns the other way


def test_a_late_beginning_is_sought_and_found(tmp_path: Path) -> None:
    """What is decoded from a key frame on is what decoding everything gives."""
    second = round(SEEK) + 2
    for suffix, codec in ((".mp4", "libx264"), (".mkv", "libx264"), (".avi", "mpeg4")):
        path = write_clip(tmp_path / f"long{suffix}", frames=10 * second + 20, rate=10, size=(64, 48), codec=codec, key_every=12)
        late = decode_frames(path, 17, 10.0, start=float(second))
        assert [read_number(frame) for frame in late] == list(range(10 * second, 10 * second + 17))
        assert np.array_equal(late, decode_frames(path, 10 * second + 17, 10.0)[10 * second :])


@pytest.mark.parametrize(("name", "codec", "rate"), [
    ("a.flac", "flac", 44100), ("a.wav", "pcm_s16le", 22050), ("a.mp3", "libmp3lame", 44100), ("a.ogg", "libopus", 48000),
    ("a.opus", "libopus", 48000), ("a.m4a", "aac", 48000), ("a.aac", "aac", 44100), ("b.wav", "pcm_s16le", 8000),
])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_alone(tmp_path: Path, name: str, codec: str, rate: int, channels: int) -> None:
    cover = picture(5, 64, 48) if name in ("a.flac", "a.mp3") else None
    path = write_sound(tmp_path / name, tone(1.6, rate, channels, PULSES), rate, codec, cover)
    if cover is not None:
        with av.open(str(path)) as container:
            assert len(container.streams.video) == 1
    facts = probe(path)
    assert (facts.kind, facts.width, facts.height, facts.frames, facts.has_audio) == ("audio", 0, 0, 0, True)
    assert (facts.audio_rate, facts.audio_channels) == (rate, channels)
    assert 1.6 - 0.001 <= facts.audio_seconds < 1.6 + 0.07  # a last block of at most 2048 samples, and a first one in raw aac
    late = 1024 / rate if name == "a.aac" else 0.0  # raw aac has no place to say that its first block is the encoder's
    for start, wanted in ((0.0, 1.5), (0.45, 1.0), (1.2, 1.0)):
        decoded = decode_sound(path, wanted, HEARD, 2, start)
        assert decoded is not None and decoded[0].shape == (2, round(wanted * HEARD))
        assert abs(decoded[1] / HEARD - min(wanted, facts.audio_seconds - start)) < 0.001
        heard = np.abs(decoded[0]).max(0).reshape(-1, 160).max(1) > 0.1  # rows of 10 ms
        at = start - late + np.arange(len(heard)) / 100
        inside = np.any([(at > begin - 0.015) & (at < end + 0.005) for begin, end in PULSES], axis=0)
        surely = np.any([(at > begin + 0.01) & (at < end - 0.02) for begin, end in PULSES], axis=0)
        assert not (heard & ~inside).any() and not (surely & ~heard).any()


def test_sound_of_a_film_alone_begins_with_the_sound(films: Callable[[str], Path]) -> None:
    """Beside its picture the sound of this film begins at 0.24 s; alone, at 0."""
    path = films("late sound")
    beside, alone = (decode_sound(path, 1.2, HEARD, 1, alone=alone) for alone in (False, True))
    assert beside is not None and alone is not None
    late = round(0.24 * HEARD)
    assert np.abs(beside[0][:, : late - 20]).max() == 0
    assert np.abs(beside[0][:, late:] - alone[0][:, :-late]).max() < 0.02  # resampled at another phase


def broken(folder: Path, whole: bytes, name: str, share: float) -> Path:
    path = folder / f"broken-{share:g}-{name}"
    path.write_bytes(whole[: round(len(whole) * share)])
    return path


def test_whatever_is_cut_short_or_is_no_film_is_a_named_failure(tmp_path: Path, films: Callable[[str], Path]) -> None:
    cut = {name: films(name) for name in ("23.976", "24 mono in matroska", "25 in webm", "29.97 in quicktime", "30 in avi", "10 bit")}
    cut["sound"] = write_sound(tmp_path / "a.wav", tone(1, 16000, 1, PULSES), 16000, "pcm_s16le")
    cut["lossless sound"] = write_sound(tmp_path / "a.flac", tone(1, 16000, 1, PULSES), 16000, "flac")
    for path in cut.values():
        for share in (0.02, 0.5, 0.9):
            with pytest.raises((TruncatedMedia, UnreadableMedia)):
                probe(broken(tmp_path, path.read_bytes(), path.name, share))
    playlist = b"#EXTM3U\n#EXTINF:1,\nfilm.mp4\n"
    noise = np.random.default_rng(0).bytes(20000)
    for suffix in (".mp4", ".mkv", ".wav", ".mp3", ".png", ".jpg", ".aac"):
        contents: tuple[tuple[bytes, type[MediaError]], ...] = (
            (b"", UnreadableMedia), (b"no film\n" * 500, UnreadableMedia), (bytes(5000), UnreadableMedia), (noise, UnreadableMedia),
            (playlist, RefusedMedia), (b"ffconcat version 1.0\nfile film.mp4\n", RefusedMedia),
        )  # fmt: skip
        for content, kind in contents:
            path = tmp_path / f"odd{suffix}"
            path.write_bytes(content)
            with pytest.raises(kind):
                probe(path)


def test_a_film_without_frames_is_a_named_failure(tmp_path: Path) -> None:
    for suffix in (".mp4", ".mkv", ".avi"):
        path = tmp_path / f"empty{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            container.start_encoding()
        with pytest.raises(MediaError):
            probe(path)
