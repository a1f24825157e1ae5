"""Encoding in less memory: the same latents for every length and every size of chunk, and a lower peak, counted in bytes.

The oracle is diffusers' own encoder over the whole clip.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import (
    LTX2VideoCausalConv3d,
    LTX2VideoDecoder3d,
    LTX2VideoDownsampler3d,
    LTX2VideoUpsampler3d,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tuner.interfaces.encoders import VideoClip
from tuner.interfaces.family import Variant
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.loading import build_part
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.vae_chunks import (
    ChunkedConv,
    ChunkedDownsampler,
    ChunkedUpsampler,
    Passage,
    chunk_bounds,
    patch_convolutions,
    roll_encoder,
)
from tuner_ltxvideo2.variants import variant_of
from tuner_ltxvideo2.video_latents import VideoDecoder, VideoLatentEncoder, scaled, shown

CPU = torch.device("cpu")
LENGTHS = [n for n in range(1, 41) if n % 8 == 1]
SAVINGS = ("vae_enable_slicing", "vae_enable_patch_conv", "vae_enable_temporal_roll")


def close(found: Tensor, expected: Tensor) -> None:
    """A convolution over another number of frames adds up its products in another order."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside held at once. Each storage counts from its first operation until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._known.pop(key)


def clip(frames: int, height: int = 32, width: int = 32, seed: int = 0) -> VideoClip:
    generator = torch.Generator().manual_seed(seed)
    return VideoClip(torch.randint(0, 256, (frames, height, width, 3), generator=generator, dtype=torch.uint8), 25.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vae(source20: WeightSource) -> Any:
    return build_part(source20, "vae", variant_of(source20), dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def plain(vae: Any) -> dict[int, Tensor]:
    """Length -> what diffusers encodes."""
    with torch.no_grad():
        return {n: vae.encoder(normal(1, 3, n, 32, 32, seed=n)) for n in LENGTHS}


# --- layers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("causal", "kernel", "mode"), [(True, 3, "zeros"), (False, 3, "reflect"), (True, 1, "zeros"), (False, 5, "zeros")])
def test_a_convolution_in_pieces_is_the_convolution(causal: bool, kernel: int, mode: str) -> None:
    layer = LTX2VideoCausalConv3d(2, 3, (kernel, 3, 3), spatial_padding_mode=mode).requires_grad_(False)
    passage = Passage()
    chunked = ChunkedConv(layer, passage)
    for frames in range(1, 41):
        given = normal(1, 2, frames, 4, 4, seed=frames)
        expected = layer(given, causal=causal)
        for size in {1, 2, 7, frames - 1, frames} - {0}:
            passage.elements = size * 2 * 4 * 4
            close(chunked(given, causal=causal), expected)


@pytest.mark.parametrize("frames", range(1, 41))
def test_a_convolution_that_remembers_is_the_convolution(frames: int) -> None:
    layer = LTX2VideoCausalConv3d(2, 3, 3).requires_grad_(False)
    passage = Passage()
    chunked = ChunkedConv(layer, passage)
    given = normal(1, 2, frames, 4, 4, seed=frames)
    for size in {1, 2, 3, 5, frames}:
        with passage.rolling():
            parts = [chunked(part) for part in given.split(size, dim=2)]
        close(torch.cat(parts, dim=2), layer(given))


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 1, 1), (2, 2, 2)])
def test_a_sampler_in_pieces_is_the_sampler(stride: tuple[int, int, int]) -> None:
    layer = LTX2VideoDownsampler3d(4, 8, stride=stride).requires_grad_(False)
    passage = Passage()
    chunked = ChunkedDownsampler(layer, ChunkedConv(layer.conv, passage), passage)
    for frames in range(1, 41, 2):
        given = normal(1, 4, frames, 4, 4, seed=frames)
        for size in (0, 1, 3, 6):
            passage.elements = size * 4 * 4 * 4
            close(chunked(given), layer(given))


@pytest.mark.parametrize(("stride", "factor", "shortcut"), [((2, 2, 2), 2, True), ((2, 1, 1), 1, False), ((1, 2, 2), 2, True)])
def test_an_upsampler_in_pieces_is_the_upsampler(stride: tuple[int, int, int], factor: int, shortcut: bool) -> None:
    layer = LTX2VideoUpsampler3d(8, stride=stride, residual=shortcut, upscale_factor=factor, spatial_padding_mode="reflect")
    passage = Passage()
    chunked = ChunkedUpsampler(layer.requires_grad_(False), ChunkedConv(layer.conv, passage), passage)
    for frames, causal in itertools.product(range(1, 8), (False, True)):
        given = normal(2, 8, frames, 3, 4, seed=frames)
        for size in (0, 1, 2, 3, 8):
            passage.elements = size * 2 * 8 * 3 * 4
            close(chunked(given, causal=causal), layer(given, causal=causal))


def test_chunks_follow_the_latents() -> None:
    for frames, latents in itertools.product(LENGTHS, range(1, 7)):
        bounds = chunk_bounds(frames, latents)
        sizes = [stop - start for start, stop in bounds]
        assert sum(sizes) == frames and bounds[0][0] == 0
        assert [(size + 7) // 8 for size in sizes[:-1]] == [latents] * (len(sizes) - 1)
        assert all(size % 8 == 0 for size in sizes[1:])


# --- the encoder -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("latents", range(1, 6))
def test_a_rolled_encoder_is_the_encoder_at_every_length(latents: int, vae: Any, plain: dict[int, Tensor]) -> None:
    rolled = copy.copy(vae)
    rolled._modules = {"encoder": copy.deepcopy(vae.encoder)}
    roll_encoder(rolled, latents)
    for n, expected in plain.items():
        with torch.no_grad():
            close(rolled.encoder(normal(1, 3, n, 32, 32, seed=n)), expected)


@pytest.fixture(scope="module")
def variant(source20: WeightSource) -> Variant:
    return variant_of(source20)


def encode(encoder: VideoLatentEncoder, *clips: VideoClip) -> list[Tensor]:
    encoder.load(CPU)
    try:
        return [record.tensors["latents"] for record in encoder.encode(clips)]
    finally:
        encoder.unload()


def peak(work: Callable[[], object]) -> int:
    """Bytes that `work` held at most, results included."""
    with torch.no_grad(), Peak() as counted:
        result = work()
    del result
    return counted.most


def test_the_peak_is_counted_by_storages() -> None:
    def work() -> Tensor:
        first = torch.zeros(1000)  # 4,000 bytes
        second = first.view(10, 100) + 1  # 8,000: the view is the same storage
        del first
        third = second * 2  # 8,000 again
        return third.add_(1)

    assert peak(work) == 8000


def test_each_saving_lowers_the_peak(source20: WeightSource, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner_ltxvideo2.vae_chunks.PATCH_ELEMENTS", 2 * 32 * 8 * 8)  # a frame of the first layers
    clips = [clip(33, seed=seed) for seed in (0, 1)]

    def measured(**options: bool) -> int:
        encoder = VideoLatentEncoder(source20, variant, torch.float32, LTX2Options(**options))
        encoder.load(CPU)
        found = peak(lambda: encoder.encode(clips))
        encoder.unload()
        return found

    whole = measured()
    sliced, patched, rolled = (measured(**{key: True}) for key in SAVINGS)
    assert sliced < 0.65 * whole
    assert patched < 0.85 * whole
    assert rolled < 0.4 * whole
    assert measured(**dict.fromkeys(SAVINGS, True)) < min(sliced, patched, rolled)


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_all_at_once_give_the_latents_of_tiling_alone(
    frames: int, source20: WeightSource, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the smallest of the published configurations has them."""
    monkeypatch.setattr("tuner_ltxvideo2.vae_chunks.PATCH_ELEMENTS", 20000)
    clips = [clip(frames, 32, 544)] if frames == 9 else [clip(frames, seed=seed) for seed in (0, 1)]  # 512 is a tile
    tiled = VideoLatentEncoder(source20, variant, torch.float32, LTX2Options(vae_enable_tiling=True))
    everything = VideoLatentEncoder(source20, variant, torch.float32, LTX2Options(vae_enable_tiling=True, **dict.fromkeys(SAVINGS, True)))
    assert tiled.settings() == everything.settings()
    for a, b in zip(encode(tiled, *clips), encode(everything, *clips), strict=True):
        close(a, b)


def test_memory_is_reduced_step_by_step_and_the_record_stays_the_same(source20: WeightSource, variant: Variant) -> None:
    encoder = VideoLatentEncoder(source20, variant, torch.float32)
    settings, given = encoder.settings(), [clip(9, seed=0), clip(9, seed=1)]
    encoder.load(CPU)
    expected = [record.tensors["latents"] for record in encoder.encode(given)]
    for key in SAVINGS:
        assert encoder.reduce_memory() == f"{key} is switched on"
        for record, latents in zip(encoder.encode(given), expected, strict=True):
            close(record.tensors["latents"], latents)
    assert encoder.reduce_memory() is None  # tiling changes nothing for small pictures
    assert encoder.settings() == settings
    encoder.unload()
    close(encode(encoder, given[0])[0], expected[0])  # loaded anew, it is still reduced


def test_only_what_helps_is_switched_on_and_tiling_changes_the_settings(source20: WeightSource, variant: Variant) -> None:
    encoder = VideoLatentEncoder(source20, variant, torch.float32)
    encode(encoder, clip(1, 32, 544))
    assert encoder.reduce_memory() == "vae_enable_tiling is switched on, which makes other latents"
    assert encoder.settings()["tiling"] and encoder.reduce_memory() is None


def test_an_encoder_that_failed_half_way_begins_anew(vae: Any, plain: dict[int, Tensor]) -> None:
    broken = copy.copy(vae)
    broken._modules = {"encoder": copy.deepcopy(vae.encoder)}
    roll_encoder(broken)

    def fail(module: nn.Module, given: Any, made: Tensor) -> None:
        if made.shape[2] == 8:  # in the second chunk
            raise torch.OutOfMemoryError("full")

    handle = broken.encoder.encoder.conv_in.register_forward_hook(fail)
    given = normal(1, 3, 17, 32, 32, seed=17)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        broken.encoder(given)
    handle.remove()
    with torch.no_grad():
        close(broken.encoder(given), plain[17])


def test_pixels_are_scaled_a_few_frames_at_a_time() -> None:
    given = [clip(33, 32, 64, seed=seed) for seed in (0, 1)]
    whole = torch.stack([one.frames for one in given]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    assert torch.equal(scaled(given, torch.float32, CPU), whole)
    assert torch.equal(scaled(given, torch.bfloat16, CPU), whole.bfloat16())


# --- the decoder -------------------------------------------------------------------------------------------------
def test_the_decoders_convolutions_in_pieces() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = LTX2VideoDecoder3d(
            8, block_out_channels=(16, 32, 64), layers_per_block=(1, 1, 1, 1), inject_noise=(False,) * 4, patch_size=2
        )
    patched = copy.deepcopy(whole.requires_grad_(False))
    patch_convolutions(patched, 4000)
    latents = normal(1, 8, 3, 2, 3)
    close(patched(latents), whole(latents))
    assert peak(lambda: patched(latents)) < 0.8 * peak(lambda: whole(latents))


def test_pictures_are_made_of_pixels_a_few_frames_at_a_time() -> None:
    def whole(decoded: Tensor) -> Tensor:
        return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()

    for dtype in (torch.float32, torch.bfloat16):
        decoded = normal(3, 150, 16, 32).to(dtype)
        given = decoded.clone()
        assert torch.equal(shown(given), whole(decoded)) and torch.equal(given, decoded)
    assert peak(lambda: shown(given)) < 0.7 * peak(lambda: whole(given))


def test_a_decoder_is_told_by_the_same_option(source20: WeightSource, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner_ltxvideo2.vae_chunks.PATCH_ELEMENTS", 4000)
    latents = normal(1, 128, 2, 2, 2)
    shown = []
    for options in (LTX2Options(), LTX2Options(vae_enable_patch_conv=True)):
        decoder = VideoDecoder(source20, variant, torch.float32, options)
        decoder.load(CPU)
        shown.append(decoder.decode(latents).frames.int())
        decoder.unload()
    assert int((shown[0] - shown[1]).abs().max()) <= 1  # rounding to 8 bits
