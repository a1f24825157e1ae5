"""Collating cached records: token order, which streams a batch has, missing sound, given streams, reference clips."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ltxvideo2.ltx2_models import normal
from tuner.errors import DataError
from tuner.interfaces.encoders import Record
from tuner.interfaces.family import ClipShape, Sample
from tuner_ltxvideo2 import inputs
from tuner_ltxvideo2.conditioning import Conditioning
from tuner_ltxvideo2.geometry import audio_latents, audio_length, unpack_video

C, GRID, SMALL = 3, (2, 3, 4), (2, 1, 2)
S = GRID[0] * GRID[1] * GRID[2]
BOTH = ("video", "audio")


def sound_alone(draw: int, length: int = 9) -> Sample:
    heard = sample(draw, sound=length)
    records = {name: heard.records[name] for name in ("audio", "text")}
    return dataclasses.replace(heard, kind="audio", frames=0, height=0, width=0, seconds=length / 25, records=records)




def sample(
    draw: int, *, sound: int | None = 9, grid: tuple[int, int, int] = GRID, frame_rate: float = 25.0, reference: bool = False
) -> Sample:
    records = {
        "video": Record({"latents": normal(C, *grid, seed=draw).to(torch.bfloat16)}),
        "text": Record({"video": normal(5, 8, seed=100 + draw), "audio": normal(5, 6, seed=200 + draw)}),
    }
    if sound is not None:
        mask = (torch.arange(sound) < sound - 2).float()
        records["audio"] = Record({"latents": normal(sound, 128, seed=300 + draw), "mask": mask})
    if reference:
        records["reference"] = Record({"latents": normal(C, *SMALL, seed=400 + draw)})
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
    assert torch.equal(unpack_video(stream.latents, GRID)[1], latents)
    assert stream.conditioned is stream.loss_mask is stream.extra_grid is None
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


def test_length_of_sound_to_a_picture() -> None:
    assert (audio_length(9, 25.0), audio_length(121, 24.0), audio_length(1, 60.0), audio_latents(0.0)) == (9, 126, 1, 1)


# --- which streams a batch has -----------------------------------------------------------------------------------
def test_a_stream_that_no_sample_has_is_left_out() -> None:
    silent = inputs.collate([sample(0, sound=None), sample(1, sound=None)], BOTH)
    assert (list(silent.streams), list(silent.text)) == (["video"], ["video"])
    mixed = inputs.collate([sample(0, sound=None), sample(1)], BOTH)
    assert list(mixed.streams) == ["video", "audio"]
    heard = inputs.collate([sound_alone(0, 7), sound_alone(1)], BOTH)
    assert (list(heard.streams), list(heard.text)) == (["audio"], ["audio"])
    stream = heard.streams["audio"]
    assert stream.present is None and stream.loss_mask is not None
    assert (stream.latents.shape[1], stream.loss_mask.sum(1).tolist()) == (9, [5.0, 7.0])


def test_only_what_is_learned_is_asked_of_every_sample() -> None:
    assert list(inputs.collate([sample(0, sound=None)], ("video",)).streams) == ["video"]
    assert list(inputs.collate([sample(0)], ("audio",)).streams) == ["audio"]
    with pytest.raises(DataError, match="clip1: is a clip without sound, and nothing but audio is learned"):
        inputs.collate([sample(0), sample(1, sound=None)], ("audio",))
    with pytest.raises(DataError, match="clip1: is a clip without sound"):
        inputs.collate([sample(0), sample(1, sound=None)], BOTH, given="video")
    with pytest.raises(DataError, match="clip0: is sound alone, and nothing but video is learned"):
        inputs.collate([sound_alone(0)], BOTH, given="audio")


def test_a_given_stream_is_clean_where_there_is_one() -> None:
    rules = Conditioning(prefix=1.0)
    given = inputs.collate([sample(0), sample(1, sound=None)], BOTH, rules=rules, given="audio")
    audio = given.streams["audio"]
    assert audio.clean and audio.loss_mask is None and audio.conditioned is None
    assert audio.present is not None and audio.present.tolist() == [True, False]
    assert not given.streams["video"].clean and given.streams["video"].conditioned is not None
    silent = inputs.collate([sample(0, sound=None)], BOTH, given="audio")
    assert list(silent.streams) == ["video"]
    pictured = inputs.collate([sample(0, reference=True)], BOTH, given="video").streams
    assert pictured["video"].clean and pictured["video"].extra_grid is None and not pictured["audio"].clean


# --- reference clips ---------------------------------------------------------------------------------------------
def test_reference_tokens_stand_behind_the_picture_and_are_given() -> None:
    samples = [sample(0, reference=True), sample(1, reference=True)]
    plain, first = (inputs.collate(samples, BOTH, rules=rules).streams["video"] for rules in (Conditioning(), Conditioning(i2v=1.0)))
    assert (plain.grid, plain.extra_grid, plain.extra_tokens, plain.latents.shape[1]) == (GRID, SMALL, 4, S + 4)
    reference = samples[1].records["reference"].tensors["latents"]
    assert torch.equal(unpack_video(plain.latents[1, S:], SMALL), reference)
    assert plain.conditioned is not None and plain.conditioned.sum(0).tolist() == [0] * S + [2] * 4
    assert first.conditioned is not None and first.conditioned.sum(0).tolist() == [2] * 12 + [0] * 12 + [2] * 4
    with pytest.raises(DataError, match="clip1: the cache holds no reference record"):
        inputs.collate([samples[0], sample(1)], BOTH)


# --- for measuring -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "streams"),
    [
        (ClipShape(128, 96, 9, 25.0, 9 / 25), {"video": S, "audio": 9}),
        (ClipShape(128, 96, 1, 25.0, 1 / 25), {"video": S // 2}),
        (ClipShape(0, 0, 0, 25.0, 2.0), {"audio": 50}),
    ],
)
def test_dummy_batches_have_the_streams_and_shapes_of_real_ones(shape: ClipShape, streams: dict[str, int]) -> None:
    batch, noise = inputs.dummy_batch(shape, 2, {"video": (5, 8), "audio": (5, 6)}, torch.bfloat16, torch.device("meta"), given="audio")
    assert {name: (*s.latents.shape[:2], s.clean) for name, s in batch.streams.items()} == {
        name: (2, tokens, name == "audio") for name, tokens in streams.items()
    }
    assert list(batch.text) == list(noise.streams) == list(streams)


# --- what does not fit -------------------------------------------------------------------------------------------
def test_errors_name_the_clip() -> None:
    with pytest.raises(DataError, match="clip1: video latents has another shape than that of clip0"):
        inputs.collate([sample(0), sample(1, grid=(2, 3, 5))], ("video",))
    bare = dataclasses.replace(sample(0), records={})
    with pytest.raises(DataError, match="clip0: the cache holds no video record"):
        inputs.collate([bare], ("video",))
