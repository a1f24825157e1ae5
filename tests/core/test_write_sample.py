"""What a sample is written as: an mp4 where there is a picture, else a wav."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tuner.data.media import decode_audio
from tuner.errors import ConfigError, DiskError, NumericError
from tuner.interfaces.encoders import AudioClip, VideoClip
from tuner.interfaces.family import Generated
from tuner.train.samples.validate import check_target, write_sample


@pytest.mark.parametrize("channels", [1, 2])
def test_sound_alone_becomes_a_wav_with_every_sample(channels: int, tmp_path: Path) -> None:
    samples = torch.rand(channels, 4800, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    written = write_sample(Generated(None, AudioClip(samples, 24000, 4800), {}), tmp_path / "step_1" / "sample.mp4")
    assert written == tmp_path / "step_1" / "sample.wav"
    assert [path.name for path in written.parent.iterdir()] == ["sample.wav"]
    read = decode_audio(written, seconds=0.2, sample_rate=24000, channels=channels)
    assert read is not None and read.valid_samples == 4800
    torch.testing.assert_close(read.samples, samples.clamp(-1, 1), atol=1 / 32000, rtol=0)


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a file, no folder")
    with pytest.raises(DiskError, match="the clip cannot be written"):
        write_sample(Generated(None, AudioClip(torch.zeros(1, 480), 24000, 480), {}), tmp_path / "notes.txt" / "sample.mp4")


def test_such_a_place_is_named_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The super-user, as whom tests may run, can write everywhere: the answer of the system is put in.
    monkeypatch.setattr("tuner.train.samples.validate.os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(DiskError, match="cannot be written"):
        check_target(tmp_path / "new" / "clip.mp4")


def test_what_is_not_finite_is_no_clip(tmp_path: Path) -> None:
    sound = AudioClip(torch.full((1, 480), torch.nan), 24000, 480)
    for generated in (Generated(None, sound, {}), Generated(None, None, {"video": torch.tensor([torch.inf])})):
        with pytest.raises(NumericError, match="not finite"):
            write_sample(generated, tmp_path / "sample.mp4")


def test_nothing_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither picture nor sound"):
        write_sample(Generated(None, None, {}), tmp_path / "sample.mp4")


def test_what_the_encoder_refuses_is_an_error_that_validation_passes_over(tmp_path: Path) -> None:
    """libx264 takes at most 16384 pixels a side, and FFmpeg's error for that is of no class that Python knows."""
    wide = VideoClip(torch.zeros(1, 2, 20000, 3, dtype=torch.uint8), 25.0)
    with pytest.raises(DiskError, match="the clip cannot be written"):
        write_sample(Generated(wide, None, {}), tmp_path / "wide.mp4")
    assert not list(tmp_path.iterdir())
