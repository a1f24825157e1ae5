"""Which tokens are given clean: each mode by its definition, one draw a sample, and never all of them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tuner.errors import ConfigError, DataError
from tuner.interfaces.encoders import Record
from tuner.interfaces.family import Sample
from tuner_ltxvideo2 import conditioning
from tuner_ltxvideo2.conditioning import Conditioning, given_audio, given_video
from tuner_ltxvideo2.options import LTX2Options

GRID = (5, 4, 6)
"""33 frames of 192 x 128 pixels."""
LENGTH = 33
"""Tokens of the sound to 33 frames at 25 a second: one for each frame."""


def sample(draw: int, *, mask: Tensor | None = None, first_frame: bool = False, frame_rate: float = 25.0) -> Sample:
    records = {"audio": Record({})} | ({} if mask is None else {"mask": Record({"mask": mask})})
    return Sample(
        key=f"clip{draw}", dataset="d", draw=draw, epoch=0, frame_rate=frame_rate, frames=33, height=128, width=192, records=records,
        first_frame=first_frame,
    )  # fmt: skip


def video(rules: Conditioning, *samples: Sample, grid: tuple[int, int, int] = GRID, seed: int = 1) -> Tensor | None:
    """(B, F, H, W)."""
    found = given_video(samples, grid, rules, seed)
    return None if found is None else found.reshape(len(samples), *grid)


def frames_given(rules: Conditioning, first: Sample, grid: tuple[int, int, int] = GRID) -> list[int]:
    """Latent frames that are given; each is whole or not at all."""
    found = video(rules, first, grid=grid)
    if found is None:
        return []
    flat = found[0].flatten(1)
    assert torch.equal(flat.all(1), flat.any(1))
    return flat.all(1).nonzero().flatten().tolist()


# --- modes -------------------------------------------------------------------------------------------------------
def test_beginning_and_end_in_latent_frames() -> None:
    assert frames_given(Conditioning(i2v=1.0), sample(0)) == [0]
    assert frames_given(Conditioning(prefix=1.0, prefix_frames=3), sample(0)) == [0, 1, 2]
    assert frames_given(Conditioning(suffix=1.0, suffix_frames=2), sample(0)) == [3, 4]
    assert frames_given(Conditioning(prefix=1.0, prefix_frames=9), sample(0)) == [0, 1, 2, 3], "one latent frame is left to learn"
    assert frames_given(Conditioning(suffix=1.0, suffix_frames=9), sample(0)) == [1, 2, 3, 4]
    assert frames_given(Conditioning(), sample(0, first_frame=True)) == [0], "the dataset asks for it in every draw"


def test_pixel_frames_become_latent_frames_and_roundings_are_said() -> None:
    for asked, latents in ((1, 1), (8, 1), (9, 2), (25, 4), (32, 4)):
        options = LTX2Options(prefix_conditioning_probability=1.0, prefix_conditioning_frames=asked)
        assert Conditioning.of(options).prefix_frames == latents
        exact = 8 * (latents - 1) + 1
        assert conditioning.notices(options) == (
            [] if asked == exact else [f"prefix_conditioning_frames: {asked} -> {exact} (valid counts are 1 + k·8)"]
        )
    options = LTX2Options(suffix_conditioning_probability=0.5, suffix_conditioning_frames=20)
    assert Conditioning.of(options).suffix_frames == 2
    assert conditioning.notices(options) == ["suffix_conditioning_frames: 20 -> 16 (valid counts are k·8)"]
    assert conditioning.notices(LTX2Options(suffix_conditioning_frames=20)) == []


@settings(max_examples=40, deadline=None)
@given(draw=st.integers(0, 10_000), frames=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 9))
def test_a_crop_is_one_rectangle_over_all_frames_and_leaves_something_to_learn(draw: int, frames: int, height: int, width: int) -> None:
    found = video(Conditioning(crop=1.0), sample(draw), grid=(frames, height, width))
    if (height, width) == (1, 1):
        assert found is None
        return
    assert found is not None and not found.all()
    rows, columns = found[0, 0].any(1), found[0, 0].any(0)
    assert torch.equal(found[0], (rows[:, None] & columns).expand(frames, -1, -1))
    for side, count in ((rows, height), (columns, width)):
        places = side.nonzero().flatten()
        assert len(places) == int(places[-1] - places[0]) + 1
        assert max(1, math.ceil(count / 4)) <= len(places) <= max(1, math.floor(3 * count / 4))


def test_a_mask_says_what_is_learned() -> None:
    mask = torch.zeros(GRID)
    mask[2:, 1:3, :2] = 0.6
    found = video(Conditioning(prefix=1.0), sample(0, mask=mask), sample(1))
    assert found is not None
    assert torch.equal(found[0], mask == 0), "a mask goes before chance"
    assert found[1].flatten(1).all(1).tolist() == [True, False, False, False, False]
    both = video(Conditioning(), sample(0, mask=torch.ones(GRID), first_frame=True))
    assert both is not None and both[0].flatten(1).all(1).tolist() == [True, False, False, False, False]
    with pytest.raises(DataError, match="clip3: its mask leaves nothing to learn"):
        video(Conditioning(), sample(3, mask=torch.full(GRID, 0.5)))
    with pytest.raises(DataError, match="clip3: its mask is of another shape"):
        video(Conditioning(), sample(3, mask=torch.ones(2, 4, 6)))


def test_a_single_frame_has_neither_beginning_nor_end() -> None:
    every = Conditioning(i2v=0.4, prefix=0.3, suffix=0.3)
    assert video(every, *(sample(d) for d in range(30)), sample(30, first_frame=True), grid=(1, 4, 6)) is None
    assert video(Conditioning(crop=1.0), sample(0), grid=(1, 4, 6)) is not None
    assert video(Conditioning(i2v=1.0), dataclasses.replace(sample(0), kind="audio")) is None


# --- chance ------------------------------------------------------------------------------------------------------
def test_one_number_picks_one_mode_for_a_sample_whatever_its_batch() -> None:
    rules = Conditioning(i2v=0.2, prefix=0.3, suffix=0.1, crop=0.15, prefix_frames=2)
    samples = [sample(draw) for draw in range(400)]
    modes = [rules.mode(one, 1, 5) for one in samples]
    for mode, share in (("i2v", 0.2), ("prefix", 0.3), ("suffix", 0.1), ("crop", 0.15), (None, 0.25)):
        deviation = math.sqrt(400 * share * (1 - share))
        assert abs(modes.count(mode) - 400 * share) < 4 * deviation, mode
    together = video(rules, *samples)
    assert together is not None
    for draw in range(0, 400, 40):
        alone = video(rules, samples[draw])
        assert torch.equal(together[draw], torch.zeros(GRID, dtype=torch.bool) if alone is None else alone[0])
    assert [rules.mode(one, 2, 5) for one in samples] != modes
    assert [rules.mode(dataclasses.replace(one, epoch=1), 1, 5) for one in samples] != modes
    assert video(Conditioning(i2v=1e-9), *samples) is None, "none drew it: the batch stays on the cheap path"


def test_chances_that_exclude_each_other_are_at_most_one() -> None:
    with pytest.raises(ConfigError, match=r"i2v_conditioning_probability, crop_conditioning_probability: together.*1\.1"):
        Conditioning.of(LTX2Options(i2v_conditioning_probability=0.7, crop_conditioning_probability=0.4))
    with pytest.raises(ConfigError, match="suffix_conditioning_probability: the whole picture is given already"):
        Conditioning.of(LTX2Options(suffix_conditioning_probability=0.1, given_stream="video"))
    assert Conditioning.of(LTX2Options(i2v_conditioning_probability=0.7, prefix_conditioning_probability=0.3)).prefix == 0.3


# --- the sound of a span -----------------------------------------------------------------------------------------
def sound(rules: Conditioning, first: Sample, frames: int = GRID[0]) -> list[int]:
    found = given_audio([first], frames, LENGTH, rules, 1)
    return [] if found is None else found[0].nonzero().flatten().tolist()


def test_the_sound_of_a_given_span_is_given_too() -> None:
    """At 25 frames a second a token of sound is as long as a frame: as many of both are given."""
    assert sound(Conditioning(prefix=1.0, prefix_frames=3), sample(0)) == list(range(17))
    assert sound(Conditioning(suffix=1.0, suffix_frames=2), sample(0)) == list(range(17, 33))
    at_60 = sample(0, frame_rate=60.0)  # 33 frames are 0.55 s: 17 frames 0.283 s, or 7.08 tokens
    assert sound(Conditioning(prefix=1.0, prefix_frames=3), at_60) == list(range(7))
    assert sound(Conditioning(suffix=1.0, suffix_frames=2), at_60)[0] == 8
    for rules in (Conditioning(i2v=1.0), Conditioning(crop=1.0), Conditioning()):
        assert sound(rules, sample(0)) == []
    assert sound(Conditioning(prefix=1.0, prefix_frames=9), sample(0)) == list(range(25)), "capped as the picture is"
    silent = dataclasses.replace(sample(0), records={})
    assert sound(Conditioning(prefix=1.0), silent) == []
    assert sound(Conditioning(prefix=1.0), sample(0, mask=torch.ones(GRID))) == []
