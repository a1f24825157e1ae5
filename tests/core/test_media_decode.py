"""Decoding by presentation time. The oracle is the number that is burnt into each frame, and the tone under each flash."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from core.clips import is_flash, picture, read_number, tone, turn_clockwise, write_clip, write_sound
from tuner.data.container import MediaError, NoVideoStream, RefusedMedia, TooShort, TruncatedMedia, UndecodableSound, UnreadableMedia
from tuner.data.decode import decode_frames, decode_sound
from tuner.data.media import decode_audio, decode_video, probe, write_mp4
from tuner.errors import DataError
from tuner.interfaces.encoders import AudioClip, VideoClip

FLASHES = range(5, 10)
"""At 25 frames per second: from 0.2 to 0.4 seconds."""


def numbers(frames: np.ndarray) -> list[int]:
    return [read_number(frame) for frame in frames]


@pytest.mark.parametrize("rate", [24, 25, Fraction(30000, 1001), 30, 60])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_are_chosen_by_time(tmp_path: Path, rate: Fraction | int, suffix: str) -> None:
    count = round(rate)
    path = write_clip(tmp_path / f"clip{suffix}", frames=count, rate=rate)
    facts = probe(path)
    wanted = facts.frames_at(25.0)
    assert facts.frames == count and facts.frames_at(float(rate)) == count
    assert abs(wanted - 25 * count / float(rate)) <= 1
    shown = numbers(decode_frames(path, wanted, 25.0))
    tick = 0.001 if suffix == ".mkv" else 0.0001
    for index, number in enumerate(shown):
        # The frame is on screen at index / 25 seconds, but for the container's rounding.
        assert number / rate <= index / 25 + tick and (number + 1) / rate > index / 25 - tick


def test_variable_rate_and_start(tmp_path: Path) -> None:
    gaps = [0.02, 0.05, 0.04, 0.1, 0.03] * 5
    times = [sum(gaps[:i]) for i in range(25)]
    path = write_clip(tmp_path / "vfr.mkv", times=times)
    wanted = probe(path).frames_at(25.0)
    expected = [max(i for i, time in enumerate(times) if time <= k / 25 + 0.001) for k in range(wanted)]
    assert numbers(decode_frames(path, wanted, 25.0)) == expected
    assert numbers(decode_frames(path, 5, 25.0, start=0.4)) == expected[10:15]


def test_same_rate_is_every_frame_once_whatever_the_container(tmp_path: Path) -> None:
    for name, codec, pixels in (("a.avi", "mpeg4", "yuv420p"), ("a.gif", "gif", "rgb8"), ("a.mov", "libx264", "yuv420p")):
        path = write_clip(tmp_path / name, frames=17, codec=codec, pix_fmt=pixels)
        assert numbers(decode_frames(path, 17, 25.0)) == list(range(17)), name


def test_edit_list_is_honoured_and_is_no_truncation(tmp_path: Path) -> None:
    """A phone's trim leaves the frames in the file: an edit list hides them. Counting frames would call such a clip truncated."""
    path = write_clip(tmp_path / "trim.mp4", frames=25)
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12
    media_time = int.from_bytes(data[entry + 4 : entry + 8], "big")
    data[entry : entry + 8] = (600).to_bytes(4, "big") + (media_time + 10 * 512).to_bytes(4, "big")  # 0.6 s from frame 10 on
    path.write_bytes(bytes(data))
    assert probe(path).frames == 15
    assert numbers(decode_frames(path, 15, 25.0)) == list(range(10, 25))


def test_too_short_names_both_counts(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "short.mp4", frames=20)
    with pytest.raises(TooShort, match="20 of 57 frames"):
        decode_video(path, frames=57, frame_rate=25.0)


def test_rotation(tmp_path: Path) -> None:
    path = turn_clockwise(write_clip(tmp_path / "phone.mp4", frames=3))
    facts = probe(path)
    assert (facts.width, facts.height) == (64, 96)
    expected = np.rot90(picture(2, 96, 64), -1)  # numpy turns counter-clockwise
    assert np.abs(decode_frames(path, 3, 25.0)[2].astype(int) - expected).mean() < 2


def test_anamorphic_pixels_become_square(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "wide.mp4", frames=2, aspect=Fraction(2))
    assert (probe(path).width, probe(path).height) == (192, 64)
    frame = decode_frames(path, 1, 25.0)[0]
    assert frame.shape == (64, 192, 3)
    assert np.abs(frame.astype(int) - picture(0, 192, 64)).mean() < 6


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (160, 32), (32, 96)])
def test_cover_and_centre_crop(tmp_path: Path, size: tuple[int, int]) -> None:
    """A horizontal ramp tells which columns were kept: the crop is centred, and the aspect ratio is kept."""
    ramp = torch.linspace(0, 255, 128).round().to(torch.uint8).view(1, 1, 128, 1).expand(2, 64, 128, 3).contiguous()
    write_mp4(tmp_path / "ramp.mp4", VideoClip(ramp, 25.0))
    frame = decode_video(tmp_path / "ramp.mp4", frames=2, frame_rate=25.0, size=size).frames[1].float()
    assert frame.shape == (size[1], size[0], 3)
    visible = min(1.0, size[0] / size[1] / 2)  # of the source's width, of aspect 2
    middle = frame[size[1] // 2, :, 1]
    assert abs(middle.mean().item() - 127.5) < 3
    assert abs((middle[-2] - middle[1]).item() - 255 * visible * (size[0] - 3) / size[0]) < 8


def test_odd_sizes(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "odd.mp4", frames=9, size=(97, 63), pix_fmt="yuv444p")
    assert (probe(path).width, probe(path).height) == (97, 63)
    clip = decode_video(path, frames=9, frame_rate=25.0, size=(96, 64))
    assert clip.frames.shape == (9, 64, 96, 3) and numbers(clip.frames.numpy()) == list(range(9))


@pytest.mark.parametrize(("layout", "channels"), [("mono", 1), ("stereo", 2), ("5.1", 6)])
@pytest.mark.parametrize("rate", [44100, 48000])
def test_tone_stays_under_the_flash(tmp_path: Path, layout: str, channels: int, rate: int) -> None:
    path = write_clip(tmp_path / "clip.mp4", flashes=FLASHES, sound=tone(1, rate, channels, [(0.2, 0.4)]), layout=layout, sound_rate=rate)
    facts = probe(path)
    assert (facts.has_audio, facts.audio_rate, facts.audio_channels, facts.audio_problem) == (True, rate, channels, "")
    flashes = [is_flash(frame) for frame in decode_frames(path, 25, 25.0)]
    for mono in (False, True):
        sound = decode_audio(path, seconds=1.0, sample_rate=16000, channels=2, mono=mono)
        assert sound is not None and sound.samples.shape == (2, 16000) and sound.valid_samples == 16000
        assert 0.4 < sound.samples.abs().max() <= 1
        loud = sound.samples.abs().amax(0).view(25, 640).amax(1) > 0.1  # one row a frame
        assert loud.tolist() == flashes


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_that_begins_later_or_is_cut_out(tmp_path: Path, suffix: str) -> None:
    path = write_clip(tmp_path / f"late{suffix}", flashes=FLASHES, sound=tone(0.6, 48000, 2, [(0, 0.2)]), sound_start=0.2)
    sound = decode_audio(path, seconds=1.0, sample_rate=16000, channels=2)
    assert sound is not None
    heard = torch.nonzero(sound.samples[0].abs() > 0.1)
    assert abs(heard[0].item() / 16000 - 0.2) < 0.005 and abs(heard[-1].item() / 16000 - 0.4) < 0.005
    assert abs(sound.valid_samples / 16000 - 0.8) < 0.03  # AAC ends on a whole block of 1024 samples
    assert sound.samples[:, sound.valid_samples :].abs().max() == 0
    later = decode_audio(path, seconds=0.4, sample_rate=16000, channels=1, start=0.3)
    assert later is not None and later.samples.shape == (1, 6400)
    assert torch.allclose(later.samples[0], sound.samples.mean(0)[4800:11200], atol=1e-6)


def test_gap_inside_the_sound_is_silent(tmp_path: Path) -> None:
    first, second = tone(0.2, 48000, 1, [(0, 0.2)]), tone(0.2, 48000, 1, [(0, 0.2)])
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as container:
        stream, voice = container.add_stream("libx264", rate=25), container.add_stream("pcm_s16le", rate=48000, layout="mono")
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(25):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index, 96, 64), format="rgb24")))
        container.mux(stream.encode(None))
        for samples, start in ((first, 0), (second, 28800)):  # the second begins at 0.6 s
            frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16), "s16", "mono")
            frame.sample_rate, frame.time_base, frame.pts = 48000, Fraction(1, 48000), start
            container.mux(voice.encode(frame))
        container.mux(voice.encode(None))
    decoded = decode_sound(path, 1.0, 16000, 2)
    assert decoded is not None
    loud = np.abs(decoded[0][0]).reshape(10, 1600).max(axis=1) > 0.1
    assert loud.tolist() == [True, True, False, False, False, False, True, True, False, False]
    assert abs(decoded[1] - 12800) <= 2


def test_mono_is_the_mean_of_the_channels(tmp_path: Path) -> None:
    one_sided = tone(0.5, 16000, 2, [(0, 0.5)])
    one_sided[1] = 0
    path = write_clip(tmp_path / "left.mkv", frames=12, sound=one_sided, sound_rate=16000, sound_codec="pcm_s16le")
    plain = decode_audio(path, seconds=0.48, sample_rate=16000, channels=2)
    mono = decode_audio(path, seconds=0.48, sample_rate=16000, channels=2, mono=True)
    assert plain is not None and mono is not None
    assert np.allclose(plain.samples.numpy(), one_sided[:, :7680], atol=2e-4)  # 16-bit source, no resampling
    assert np.allclose(mono.samples.numpy(), np.repeat(one_sided.mean(axis=0, keepdims=True), 2, 0)[:, :7680], atol=2e-4)


def test_no_sound_is_none_and_undecodable_sound_is_a_failure(tmp_path: Path) -> None:
    silent = write_clip(tmp_path / "silent.mp4", frames=5)
    assert not probe(silent).has_audio and decode_audio(silent, seconds=0.2, sample_rate=16000, channels=2) is None
    path = write_clip(tmp_path / "noise.mkv", frames=5, sound=tone(0.2, 48000, 2, [(0, 0.2)]))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"A_AAC", b"A_XYZ"))  # a codec that nobody knows
    facts = probe(path)
    assert facts.has_audio and facts.audio_problem
    with pytest.raises(DataError):
        decode_audio(path, seconds=0.2, sample_rate=16000, channels=2)


def bad_files(folder: Path) -> dict[str, tuple[Path, type[MediaError]]]:
    whole = write_clip(folder / "whole.mkv", frames=50).read_bytes()
    index_last = write_clip(folder / "last.mp4", frames=50).read_bytes()
    with av.open(str(folder / "first.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index, 96, 64), format="rgb24")))
        container.mux(stream.encode(None))
    index_first = (folder / "first.mp4").read_bytes()
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nwhole.mkv\n#EXT-X-ENDLIST\n"
    files: dict[str, tuple[bytes, type[MediaError]]] = {
        "truncated.mkv": (whole[: len(whole) * 9 // 10], TruncatedMedia),
        "truncated_index_last.mp4": (index_last[: len(index_last) // 2], UnreadableMedia),
        "truncated_index_first.mp4": (index_first[: len(index_first) * 19 // 20], TruncatedMedia),
        "text.mp4": (b"this is not a film", UnreadableMedia),
        "empty.mp4": (b"", UnreadableMedia),
        "playlist.mp4": (playlist, RefusedMedia),
        "script.mp4": (b"ffconcat version 1.0\nfile 'whole.mkv'\n", RefusedMedia),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    return {name: (folder / name, kind) for name, (_, kind) in files.items()}


def test_bad_files_are_named_failures(tmp_path: Path) -> None:
    for name, (path, kind) in bad_files(tmp_path).items():
        with pytest.raises(kind) as caught:
            probe(path)
        assert caught.value.where == str(path) and caught.value.exit_code == 4, name


def test_sound_alone_has_no_frames(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "sound.mp4", tone(0.5, 48000, 1, [(0, 1)]), 48000, "aac")
    with pytest.raises(NoVideoStream):
        decode_frames(path, 1, 25.0)


def test_names_inside_the_file_need_not_be_utf8(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "latin.mp4", frames=9)
    path.write_bytes(path.read_bytes().replace(b"VideoHandler", b"Vid\xe9oHandler"))
    assert numbers(decode_frames(path, 9, 25.0)) == list(range(9))


def test_damaged_middle_is_an_error_not_a_grey_frame(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "holes.mp4", frames=25)
    data = bytearray(path.read_bytes())
    data[700:900] = bytes([7, 99]) * 100  # inside the coded frames, which end before the index
    assert data.index(b"moov") > 900
    path.write_bytes(bytes(data))
    with pytest.raises(MediaError):
        decode_frames(path, 25, 25.0)


def test_written_clip_reads_back(tmp_path: Path) -> None:
    frames = torch.from_numpy(np.stack([picture(i, 96, 64, flash=i in FLASHES) for i in range(17)]))
    frames[..., 0] = torch.clamp(frames[..., 0].int() + 60, max=255).to(torch.uint8)
    sound = AudioClip(torch.from_numpy(tone(17 / 25, 24000, 2, [(0.2, 0.4)])), 24000, 16320)
    path = tmp_path / "deep" / "sample.mp4"
    write_mp4(path, VideoClip(frames, 25.0), sound)
    assert [p.name for p in path.parent.iterdir()] == ["sample.mp4"]
    back = decode_video(path, frames=17, frame_rate=25.0)
    assert (back.frames.float() - frames.float()).abs().mean() < 3
    assert (back.frames[0, 2, 2].int() - frames[0, 2, 2].int()).abs().max() <= 3  # colours keep their matrix and range
    heard = decode_audio(path, seconds=17 / 25, sample_rate=24000, channels=2)
    assert heard is not None
    assert np.corrcoef(heard.samples[0].numpy(), sound.samples[0].numpy())[0, 1] > 0.99
    with pytest.raises(DataError, match="even"):
        write_mp4(tmp_path / "odd.mp4", VideoClip(frames[:, :63], 25.0))


def test_sound_error_is_pickled_whole() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(UndecodableSound("no", where="clip", remedy="do")))
    assert (type(error), str(error)) == (UndecodableSound, "clip: no\n  -> do")
