"""How busy the video encoder is while clips are cached, beside a plain loop over diffusers' VAE; random weights.

    python benchmarks/caching.py                  # the VAE of LTX-2 2.0 at real size, clips of 832x480 and 49 frames; needs a GPU
    python benchmarks/caching.py --size tiny      # the same program on a CPU

The plain loop decodes a clip, encodes it and writes it, one after the other. tuner's side is the product's own caching: clips are decoded
in worker processes ahead of the encoder, equal shapes are encoded together. Busy is the share of the time in which the encoder works;
it should be at least 80 %. Starting the workers and loading the VAE count on neither side.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint import DEFAULTS
from figures import Figure, write_json
from plain import default_dtype
from program import begin, parser_of, synchronize
from tuner.config.datasets import load_datasets
from tuner.config.settings import DataSettings
from tuner.data.decode import decode_frames
from tuner.data.manifest import Manifest, scan
from tuner.data.media import write_mp4
from tuner.data.workers import DecodeWorkers
from tuner.interfaces.encoders import AudioClip, Record, Source, VideoClip
from tuner.interfaces.family import Variant
from tuner.interfaces.services import TensorHeader, WeightSource
from tuner.train.caching import fill_cache
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.loading import make_part
from tuner_ltxvideo2.tiny import _video_arguments
from tuner_ltxvideo2.video_latents import VideoLatentEncoder, scaled

BUSY = 0.8
"""Least share of the time in which the encoder should work."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    seconds: float
    busy: float
    """Share of it in the encoder."""


class RandomVae(WeightSource):
    """A VAE of the released size, or the tiny flavour's, held in memory."""

    description = "random"
    location = Path()

    def __init__(self, size: str, dtype: torch.dtype, device: torch.device) -> None:
        config: dict[str, Mapping[str, object]] = {"vae": DEFAULTS["vae"] if size == "real" else _video_arguments(newer=False)}
        self.variant = Variant("ltxvideo2", "2.0", config)
        with default_dtype(dtype), device:  # where drawing the first values takes no time
            self.network = make_part("vae", self.variant).cpu()
        self._state = dict(self.network.state_dict())

    def metadata(self) -> Mapping[str, object]:
        return {}

    def parts(self) -> Sequence[str]:
        return ("vae",)

    def headers(self, part: str) -> Mapping[str, TensorHeader]:
        names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
        return {name: TensorHeader(tuple(tensor.shape), names[tensor.dtype]) for name, tensor in self._state.items()}

    def tensors(self, part: str, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._state[name]) for name in (self._state if names is None else names))

    def fingerprint(self, part: str) -> str:
        return "random"

    def folder(self, part: str) -> Path | None:
        return None


class TimedEncoder(VideoLatentEncoder):
    """Knows how long it has worked, and since when."""

    busy = 0.0
    began = 0.0

    def encode(self, sources: Sequence[Source]) -> list[Record]:
        started = time.perf_counter()
        self.began = self.began or started
        records = super().encode(sources)  # what it gives lies on the host: nothing is left to wait for
        self.busy += time.perf_counter() - started
        return records


def write_clips(folder: Path, count: int, width: int, height: int, frames: int, *, sound: bool = False) -> None:
    """Moving patterns, as hard to decode as filmed clips of that size; with `sound` noise beside them."""
    folder.mkdir()
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")

    def write(number: int) -> None:
        shift = torch.arange(frames)[:, None, None] * (3 + number)
        grey = (torch.sin((x + shift) / (9 + number)) + torch.cos((y - shift) / 13) + 2) * 60
        noise = torch.randint(0, 12, (frames, height, width), generator=torch.Generator().manual_seed(number))
        picture = (grey + noise).to(torch.uint8)[..., None].expand(-1, -1, -1, 3)
        samples = 16000 * frames // 25
        noise_beside = AudioClip(torch.randn(2, samples) / 10, 16000, samples) if sound else None
        write_mp4(folder / f"clip{number:03}.mp4", VideoClip(picture.contiguous(), 25.0), noise_beside)
        (folder / f"clip{number:03}.txt").write_text(f"pattern {number}")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(count)))


@torch.no_grad()
def warm_up(manifest: Manifest, source: RandomVae, dtype: torch.dtype, device: torch.device) -> None:
    """Encodes a clip of the first one's shape: libraries look for their kernels the first time."""
    shape = manifest.items[0].shape
    pixels = torch.zeros(1, 3, shape.frames, shape.height, shape.width, dtype=dtype, device=device)
    source.network.to(device).encode(pixels)
    synchronize(device)


def plain_loop(manifest: Manifest, source: RandomVae, dtype: torch.dtype, device: torch.device, folder: Path) -> tuple[float, float]:
    """Seconds in all, and in the VAE."""
    vae = source.network.to(device)
    busy = 0.0
    started = time.perf_counter()
    for number, item in enumerate(manifest.items):
        shape = item.shape
        frames = decode_frames(item.path, shape.frames, shape.frame_rate, (shape.width, shape.height))
        before = time.perf_counter()
        with torch.no_grad():
            pixels = scaled([VideoClip(torch.from_numpy(frames), shape.frame_rate)], dtype, device)
            latents = vae.encode(pixels).latent_dist.mode()
            synchronize(device)
        busy += time.perf_counter() - before
        save_file({"latents": latents[0].contiguous().cpu()}, folder / f"{number}.safetensors")
    return time.perf_counter() - started, busy


def product(manifest: Manifest, encoder: TimedEncoder, device: torch.device, batch_size: int) -> tuple[float, float]:
    """The same of the product's caching; from the first call of the encoder on."""
    with DecodeWorkers() as workers:
        fill_cache(manifest, [encoder], device, batch_size=batch_size, workers=workers)
        return time.perf_counter() - encoder.began, encoder.busy


def main(argv: list[str]) -> int:
    """Measures and prints."""
    parser = parser_of(__doc__)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=1, help="vae_batch_size")
    arguments = parser.parse_args(argv)
    device, machine = begin(arguments.size)
    real = arguments.size == "real"
    dtype = torch.bfloat16 if real else torch.float32
    width, height, frames = (832, 480, 49) if real else (96, 64, 17)
    print(f"{arguments.clips} clips of {width}x{height} and {frames} frames", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_clips(folder / "clips", arguments.clips, width, height, frames)
        resolution = (width * height) ** 0.5
        data = DataSettings(resolution=resolution, cache_dir=str(folder / "cache"))
        (folder / "data.json").write_text(
            f'[{{"id": "clips", "instance_data_dir": "{folder / "clips"}", "video": {{"num_frames": {frames}}}}}]'
        )
        began = time.perf_counter()
        manifest = scan(load_datasets(folder / "data.json", None, data, {}), data, LTX2Family.geometry)
        source = RandomVae(arguments.size, dtype, device)
        warm_up(manifest, source, dtype, device)
        print(f"clips examined, VAE made and warm: {time.perf_counter() - began:.1f} s\n")
        print("| Caching | s in all | clips/s | s in the encoder | busy |\n|---|---|---|---|---|", flush=True)
        rows: list[Row] = []

        def add(name: str, total: float, busy: float) -> None:
            rows.append(Row(name, total, busy / total))
            asked = f" (at least {BUSY:.0%})" if name == "tuner" else ""
            print(f"| {name} | {total:.2f} | {arguments.clips / total:.2f} | {busy:.2f} | {busy / total:.0%}{asked} |", flush=True)
            shares = [
                Figure(f"{row.name}, encoder busy", row.busy, "", least=BUSY if real and row.name == "tuner" else None) for row in rows
            ]
            write_json(arguments.json, machine, rows, [*(Figure(f"{row.name}, in all", row.seconds) for row in rows), *shares])

        add("plain loop over diffusers' VAE", *plain_loop(manifest, source, dtype, device, folder))
        add("tuner", *product(manifest, TimedEncoder(source, source.variant, dtype), device, arguments.batch_size))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
