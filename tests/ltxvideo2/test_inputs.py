"""Collating cached records: token order, missing sound, first-frame conditioning."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ltxvideo2.ltx2_models import normal
from tuner.errors import DataError
from tuner.interfaces.encoders import Record
from tuner.interfaces.family import Sample
from tuner_ltxvideo2 import inputs

C, GRID = 3, (2, 3, 4)
FIRST = GRID[1] * GRID[2]


def sample(draw: int, *, sound: int | None = 9, grid: tuple[int, int, int] = GRID, frame_rate: float = 25.0) -> Sample:
    records = {
        "video": Record({"latents": normal(C, *grid, seed=draw).to(torch.bfloat16)}),
        "text": Record({"video": normal(5, 8, seed=100 + draw), "audio": normal(5, 6, seed=200 + draw)}),
    }
    if sound is not None:
        mask = (torch.arange(sound) < sound - 2).float()
        records["audio"] = Record({"latents": normal(sound, 128, seed=300 + draw), "mask": mask})
    return Sample(
        key=f"clip{draw}", dataset="d", draw=draw, epoch=0, frame_rate=frame_rate, frames=9, height=96, width=128, records=records
    )


def test_video_tokens_run_over_frames_rows_columns() -> None:
    batch = inputs.collate([sample(0), sample(1)], ("video", "audio"))
    stream = batch.streams["video"]
    latents = sample(1).records["video"].tensors["latents"].float()
    assert stream.latents.dtype == torch.float32
    assert stream.grid == GRID
    for token, (f, h, w) in enumerate((f, h, w) for f in range(2) for h in range(3) for w in range(4)):
        assert torch.equal(stream.latents[1, token], latents[:, f, h, w])
    assert torch.equal(inputs.unpack_video(stream.latents, GRID)[1], latents)
    assert stream.conditioned is None
    assert stream.loss_mask is None
    assert torch.equal(batch.text["audio"][1], sample(1).records["text"].tensors["audio"])
    assert batch.frame_rate == (25.0, 25.0)


def test_sound_is_padded_and_missing_sound_counts_nowhere() -> None:
    batch = inputs.collate([sample(0, sound=9), sample(1, sound=None), sample(2, sound=10)], ("video", "audio"))
    stream = batch.streams["audio"]
    assert stream.latents.shape == (3, 10, 128)
    assert stream.grid == (10, 1, 1)
    assert stream.present is not None and stream.present.tolist() == [True, False, True]
    assert stream.loss_mask is not None and stream.loss_mask.sum(1).tolist() == [7.0, 0.0, 8.0]
    assert not stream.latents[1].any()
    assert not stream.latents[0, 9].any()
    assert torch.equal(stream.latents[2], sample(2, sound=10).records["audio"].tensors["latents"])


def test_clips_without_any_sound_get_the_length_that_belongs_to_them() -> None:
    batch = inputs.collate([sample(0, sound=None), sample(1, sound=None)], ("video", "audio"))
    assert batch.streams["audio"].latents.shape == (2, 9, 128)  # 25 · 9 frames / 25 a second
    assert inputs.audio_length(121, 24.0) == 126
    assert inputs.audio_length(1, 60.0) == 1


def test_streams_that_are_not_trained_are_left_out() -> None:
    batch = inputs.collate([sample(0, sound=None)], ("video",))
    assert list(batch.streams) == ["video"]
    assert list(batch.text) == ["video"]
    sound = inputs.collate([sample(0)], ("audio",))
    assert list(sound.streams) == ["audio"]
    assert sound.streams["audio"].present is None
    with pytest.raises(DataError, match="clip1: this clip has no sound"):
        inputs.collate([sample(0), sample(1, sound=None)], ("audio",))


def test_errors_name_the_clip() -> None:
    with pytest.raises(DataError, match="clip1: video latents has another shape than that of clip0"):
        inputs.collate([sample(0), sample(1, grid=(2, 3, 5))], ("video",))
    bare = dataclasses.replace(sample(0), records={})
    with pytest.raises(DataError, match="clip0: the cache holds no video record"):
        inputs.collate([bare], ("video",))


def conditioned(draws: range, probability: float, seed: int = 1, grid: tuple[int, int, int] = GRID) -> Tensor | None:
    batch = inputs.collate([sample(d, grid=grid) for d in draws], ("video",), seed=seed, i2v_probability=probability)
    return batch.streams["video"].conditioned


def test_first_frame_conditioning_is_drawn_per_sample() -> None:
    drawn = conditioned(range(200), 0.3)
    assert drawn is not None
    assert drawn[:, FIRST:].sum() == 0
    per_sample = drawn[:, :FIRST].all(1)
    assert torch.equal(per_sample, drawn[:, :FIRST].any(1))
    assert 40 <= int(per_sample.sum()) <= 80  # 60 expected, three standard deviations are 19
    # the draw belongs to the sample, not to its batch
    alone = [conditioned(range(d, d + 1), 0.3) for d in range(200)]
    assert [one is not None for one in alone] == per_sample.tolist()
    other = conditioned(range(200), 0.3, seed=2)
    assert other is not None and not torch.equal(other, drawn)


def test_conditioned_tokens_leave_the_loss() -> None:
    stream = inputs.collate([sample(0), sample(1)], ("video",), i2v_probability=1.0).streams["video"]
    assert stream.conditioned is not None and stream.conditioned[:, :FIRST].all()
    assert stream.loss_mask is not None and torch.equal(stream.loss_mask, (~stream.conditioned).float())


def test_nothing_is_conditioned_without_chance_or_with_a_single_frame() -> None:
    assert conditioned(range(50), 0.0) is None
    assert conditioned(range(50), 1.0, grid=(1, 3, 4)) is None
    assert conditioned(range(1), 1e-9) is None, "none drew it: the batch stays on the cheap path"
