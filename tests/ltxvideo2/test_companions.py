"""Masks as latents see them, and reference clips through the VAE."""

from __future__ import annotations

import pytest
import torch

from tuner.errors import DataError
from tuner.interfaces.encoders import LatentEncoder, VideoClip
from tuner.interfaces.family import ClipShape
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.companions import MaskEncoder, ReferenceEncoder, file_facts
from tuner_ltxvideo2.variants import variant_of
from tuner_ltxvideo2.video_latents import VideoLatentEncoder

CPU = torch.device("cpu")


def encoded(encoder: LatentEncoder, frames: torch.Tensor) -> dict[str, torch.Tensor]:
    encoder.load(CPU)
    try:
        return dict(encoder.encode([VideoClip(frames, 25.0)])[0].tensors)
    finally:
        encoder.unload()


@pytest.mark.parametrize("count", [1, 9, 17])
def test_a_mask_is_the_mean_luminance_of_each_latents_pixels(count: int) -> None:
    frames = torch.randint(0, 256, (count, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    frames[:, :32, :32] = 255  # so that something is learned
    mask = encoded(MaskEncoder(), frames)["mask"]
    spans = [(0, 1)] + [(start, start + 8) for start in range(1, count, 8)]
    assert mask.shape == (len(spans), 2, 3)
    for f, (begin, end) in enumerate(spans):
        for h in range(2):
            for w in range(3):
                cell = frames[begin:end, 32 * h : 32 * h + 32, 32 * w : 32 * w + 32].double().mean(dim=(0, 1, 2)) / 255
                expected = 0.2126 * cell[0] + 0.7152 * cell[1] + 0.0722 * cell[2]
                assert float(mask[f, h, w]) == pytest.approx(float(expected), abs=1e-5)


def test_a_mask_that_leaves_nothing_is_declined() -> None:
    frames = torch.zeros(9, 64, 64, 3, dtype=torch.uint8)
    frames[0, :20, :20] = 255
    with pytest.raises(DataError, match="leaves nothing to learn"):
        MaskEncoder().encode([VideoClip(frames, 25.0)])
    with pytest.raises(DataError, match="multiples of 32"):
        MaskEncoder().encode([VideoClip(torch.full((1, 40, 64, 3), 255, dtype=torch.uint8), 25.0)])


def test_a_reference_goes_through_the_same_vae(source20: WeightSource) -> None:
    frames = torch.randint(0, 256, (9, 32, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own, reference = (kind(source20, variant_of(source20), torch.float32) for kind in (VideoLatentEncoder, ReferenceEncoder))
    assert (reference.name, reference.of, own.of) == ("reference", "reference", "clip")
    assert reference.settings() == own.settings()
    assert torch.equal(encoded(reference, frames)["latents"], encoded(own, frames)["latents"])


def test_files_say_how_much_smaller_the_references_were() -> None:
    def pair(factor: int, width: int = 768) -> tuple[ClipShape, ClipShape]:
        shape = ClipShape(width, 512, 49, 25.0, 49 / 25)
        return shape, ClipShape(width // factor, 512 // factor, 49, 25.0, 49 / 25)

    assert file_facts({"reference": [pair(2), pair(2, 512)]}) == {"reference_downscale_factor": "2"}
    assert file_facts({"reference": [pair(1)], "mask": [pair(1)]}) == {"reference_downscale_factor": "1"}
    assert file_facts({"reference": [pair(1), pair(2)]}) == {}
    assert file_facts({"mask": [pair(1)]}) == file_facts({}) == {}
