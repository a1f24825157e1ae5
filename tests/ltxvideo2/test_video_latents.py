"""Video latents: the formula written out, diffusers' normalisation, memory options, and the way back."""

from __future__ import annotations

import pytest
import torch
from diffusers import LTX2Pipeline
from torch import Tensor

from tuner.errors import DataError
from tuner.interfaces.encoders import VideoClip
from tuner.interfaces.family import Variant
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.loading import build_part
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.variants import variant_of
from tuner_ltxvideo2.video_latents import VideoDecoder, VideoLatentEncoder, tile_stride

CPU = torch.device("cpu")


def clip(frames: int = 9, height: int = 64, width: int = 64, seed: int = 0) -> VideoClip:
    generator = torch.Generator().manual_seed(seed)
    return VideoClip(torch.randint(0, 256, (frames, height, width, 3), generator=generator, dtype=torch.uint8), 25.0)


def encode(encoder: VideoLatentEncoder, *clips: VideoClip) -> list[Tensor]:
    encoder.load(CPU)
    try:
        return [record.tensors["latents"] for record in encoder.encode(clips)]
    finally:
        encoder.unload()


def test_equal_to_diffusers_and_to_the_formula(tiny_source: WeightSource, tiny_variant: Variant) -> None:
    given = clip()
    found = encode(VideoLatentEncoder(tiny_source, tiny_variant, torch.float32), given)[0]
    vae = build_part(tiny_source, "vae", tiny_variant, dtype=torch.float32, device=CPU)
    pixels = (given.frames.float() / 127.5 - 1).movedim(-1, 0)[None]
    with torch.no_grad():
        moments = vae.encode(pixels).latent_dist.parameters  # mean, then log variance
    mean = moments[:, :128]
    stored = dict(tiny_source.tensors("vae", ["latents_mean", "latents_std"]))
    by_hand = torch.stack([(mean[0, c] - stored["latents_mean"][c]) / stored["latents_std"][c] for c in range(128)])
    assert torch.equal(found, by_hand)
    assert torch.equal(found, LTX2Pipeline._normalize_latents(mean, stored["latents_mean"], stored["latents_std"], 1.0)[0])


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_counts_and_sizes(frames: int, source20: WeightSource) -> None:
    latents = encode(VideoLatentEncoder(source20, variant_of(source20), torch.float32), clip(frames, 32, 96))[0]
    assert latents.shape == (128, (frames - 1) // 8 + 1, 1, 3)
    assert latents.dtype == torch.float32


def test_the_runs_dtype_is_stored_and_set_down(source20: WeightSource) -> None:
    encoder = VideoLatentEncoder(source20, variant_of(source20), torch.bfloat16)
    assert encode(encoder, clip(1, 32, 32))[0].dtype == torch.bfloat16
    assert encoder.settings()["dtype"] == "torch.bfloat16"


def test_later_frames_do_not_change_earlier_latents(source20: WeightSource) -> None:
    long = clip(17)
    encoder = VideoLatentEncoder(source20, variant_of(source20), torch.float32)
    # other sums of products in a convolution over another length
    torch.testing.assert_close(
        encode(encoder, VideoClip(long.frames[:9], 25.0))[0], encode(encoder, long)[0][:, :2], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(8, 64, 64), (10, 64, 64), (9, 60, 64), (9, 64, 48)])
def test_shapes_that_cannot_be_encoded_are_an_error(shape: tuple[int, int, int], source20: WeightSource) -> None:
    with pytest.raises(DataError):
        encode(VideoLatentEncoder(source20, variant_of(source20), torch.float32), clip(*shape))


def test_tiling_is_kept_apart_and_leaves_small_clips_as_they_are(source20: WeightSource) -> None:
    variant = variant_of(source20)
    plain = VideoLatentEncoder(source20, variant, torch.float32)
    tiled = VideoLatentEncoder(source20, variant, torch.float32, LTX2Options(vae_enable_tiling=True))
    assert plain.settings() != tiled.settings()
    assert torch.equal(encode(plain, clip())[0], encode(tiled, clip())[0])
    large = clip(1, 32, 576)
    whole, found = encode(plain, large)[0], encode(tiled, large)[0]
    # tiles of 16 columns begin every 14: two columns of the first run over into the second
    first, second = (encode(plain, VideoClip(large.frames[:, :, part], 25.0))[0] for part in (slice(512), slice(448, 576)))
    expected = torch.cat([first[..., :14], first[..., 14:15], (first[..., 15:] + second[..., 1:2]) / 2, second[..., 2:]], dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # far left of the first tile's end the convolutions see the same pixels; they reach 9 columns across
    torch.testing.assert_close(whole[..., :7], found[..., :7], atol=1e-5, rtol=1e-5)
    assert float((whole - found).abs().max()) > 1e-3


def test_decoding_undoes_the_normalisation(tiny_source: WeightSource, tiny_variant: Variant) -> None:
    latents = torch.randn(1, 128, 2, 2, 3, generator=torch.Generator().manual_seed(3))
    decoder = VideoDecoder(tiny_source, tiny_variant, torch.float32)
    decoder.load(CPU)
    shown = decoder.decode(latents, frame_rate=24.0)
    decoder.unload()
    assert (tuple(shown.frames.shape), shown.frames.dtype, shown.frame_rate) == ((9, 64, 96, 3), torch.uint8, 24.0)
    vae = build_part(tiny_source, "vae", tiny_variant, dtype=torch.float32, device=CPU)
    mean, deviation = vae.get_buffer("latents_mean"), vae.get_buffer("latents_std")
    with torch.no_grad():
        pictures = vae.decode(LTX2Pipeline._denormalize_latents(latents, mean, deviation, 1.0)).sample[0]
    expected = ((pictures.clamp(-1, 1) / 2 + 0.5) * 255).movedim(0, -1)
    assert float((shown.frames.float() - expected).abs().max()) <= 0.5 + 1e-3  # rounding to 8 bits


@pytest.mark.parametrize("width", [18, 29])
def test_large_pictures_are_decoded_by_tiles(width: int, source20: WeightSource) -> None:
    latents = torch.randn(1, 128, 1, 2, width, generator=torch.Generator().manual_seed(2))
    decoder = VideoDecoder(source20, variant_of(source20), torch.float32)
    decoder.load(CPU)
    shown = decoder.decode(latents).frames
    assert decoder._network("vae").use_tiling
    assert shown.shape == (1, 64, 32 * width, 3)
    # by tiles, the first 13 places are those of a picture that ends with the first tile
    first = decoder.decode(latents[..., :16]).frames
    assert torch.equal(shown[:, :, : 32 * 13], first[:, :, : 32 * 13])


def test_no_tile_is_one_place_wide() -> None:
    for size in range(17, 120):
        stride = tile_stride(size)
        assert all(min(16, size - start) >= 2 for start in range(0, size, stride))
