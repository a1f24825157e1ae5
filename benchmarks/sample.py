"""One clip with sound, from noise to pixels and waveform: tuner as it samples during training, beside diffusers' own pipeline.

    python benchmarks/sample.py                            # 768x512, 49 frames, 30 steps, random weights; wants a GPU of 80 GB
    python benchmarks/sample.py --size tiny --steps 2      # the same program on a CPU, to see that it runs; its times mean nothing

Both sides have the same networks, the same guidance (one more pass a step, nothing else that diffusers' pipeline can add) and encoded
captions: hidden states of the text encoder for the pipeline, which runs the connectors itself, and what comes after them for tuner, as its
cache holds it. The pipeline keeps everything on the device; tuner brings decoders there while they decode, and frees them. Peaks count what
torch has allocated, weights included.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline
from torch import Tensor, nn

from checkpoint import DEFAULTS, arguments_of
from figures import Figure, write_json
from plain import REAL, Size
from product import build_model
from program import GIB, begin, parser_of, synchronize
from tuner.interfaces.family import Batch, BuildContext, Generated, Noise, Prediction, SampleRequest, Variant
from tuner.model.placing import RunMemory
from tuner.model.runner import BlockRunner
from tuner_ltxvideo2 import sampling
from tuner_ltxvideo2.audio_latents import AudioDecoder
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.latents import Networks
from tuner_ltxvideo2.loading import make_part
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.tiny import TEXT_LENGTH, _arguments
from tuner_ltxvideo2.video_latents import VideoDecoder

STREAMS = ("video", "audio")
OTHERS = ("connectors", "vae", "audio_vae", "vocoder")
TEXT_TOKENS: Mapping[Size, int] = {"real": 1024, "tiny": TEXT_LENGTH}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    seconds: float
    """Median of the timed clips."""
    denoising: float
    """Of it, until the last latents are there."""
    peak_gib: float | None
    """None on the CPU, where it is not measured."""
    beside_gib: float | None
    """Of it, what was not there before sampling."""


class Clock:
    """Tells when the latents of a clip are there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.denoised = 0.0

    def mark(self) -> None:
        """Now they are."""
        synchronize(self.device)
        self.denoised = time.perf_counter()


class Parts:
    """The networks, random: the transformer on the device, the others in host memory."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        small: Mapping[str, Mapping[str, object]] = _arguments("2.0") if size == "tiny" else {}
        arguments = {name: small.get(name) or arguments_of(name, DEFAULTS[name]) for name in OTHERS}
        self.variant = Variant("ltxvideo2", "2.0", arguments)
        config = dict(small["transformer"]) if size == "tiny" else dict(REAL)
        placement = RunMemory().open("transformer", int(str(config.get("num_layers", 48))), device)
        self.transformer = build_model(config, STREAMS, placement, device).to(dtype).eval()
        with device:  # where drawing the first values of a billion parameters takes no time
            made = [make_part(name, self.variant).to(dtype).eval().requires_grad_(False) for name in OTHERS]
        self.connectors, self.vae, self.audio_vae, self.vocoder = (part.cpu() for part in made)
        if device.type == "cuda":
            for part in (self.vae, self.audio_vae, self.vocoder):
                for tensor in (*part.parameters(), *part.buffers()):
                    tensor.data = tensor.data.pin_memory()


class Held(Networks):
    """Decoders whose weights are in page-locked memory, as far away as those that a run reads from the page cache."""

    held: dict[str, nn.Module]

    def load(self, device: torch.device) -> None:
        self._device = device
        named = [each for module in self.held.values() for each in (*module.named_parameters(), *module.named_buffers())]
        self._there = {tensor: tensor.data for name, tensor in named if not name.startswith("encoder.")}  # which a run does not read
        for tensor, values in self._there.items():
            tensor.data = values.to(device, non_blocking=True)
        self._loaded = dict(self.held)

    def unload(self) -> None:
        for tensor, values in self._there.items():
            tensor.data = values
        super().unload()


class HeldVideo(Held, VideoDecoder):
    """The VAE."""


class HeldAudio(Held, AudioDecoder):
    """The audio VAE and the vocoder."""


def product(parts: Parts, request: SampleRequest, text: Mapping[str, Tensor], clock: Clock, dtype: torch.dtype) -> Generated:
    """What `LTX2Family.sample` does with a request that brings its text."""
    device = clock.device
    family = LTX2Family(LTX2Options(), BuildContext(device, dtype, 0, 0, Path()))
    blocks = BlockRunner(family.block_set(parts.transformer), family.call_block)

    def predict(batch: Batch, noise: Noise) -> Prediction:
        return family.exit(parts.transformer, blocks.run(family.enter(parts.transformer, batch, noise)))

    start = sampling.Start.of(request, STREAMS, {})
    latents = sampling.denoise(predict, request, sampling.Prompt(text, text), start, family.token_shift, device)
    clock.mark()
    source: Any = None  # the networks are there already
    video, audio = HeldVideo(source, parts.variant, dtype), HeldAudio(source, parts.variant, dtype)
    video.held = {"vae": parts.vae}
    audio.held = {"audio_vae": parts.audio_vae, "vocoder": parts.vocoder}
    return sampling.decode([request], [latents], video, audio, device)[0]


def peer(parts: Parts, size: Size, clock: Clock) -> tuple[LTX2Pipeline, Callable[[SampleRequest], object]]:
    """diffusers' pipeline with all networks on the device but the text encoder."""
    device = clock.device
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096, shift_terminal=0.1
    )
    pipeline = LTX2Pipeline(
        scheduler=scheduler, vae=parts.vae, audio_vae=parts.audio_vae, text_encoder=None, tokenizer=None, connectors=parts.connectors,
        transformer=parts.transformer, vocoder=parts.vocoder,
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_tiling()
    config = parts.connectors.config
    states = torch.randn(1, TEXT_TOKENS[size], config.caption_channels * config.text_proj_in_factor, device=device, dtype=parts.vae.dtype)
    mask = torch.ones(1, TEXT_TOKENS[size], device=device, dtype=torch.int64)

    def stepped(pipeline: LTX2Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step + 1 == pipeline.num_timesteps:
            clock.mark()
        return tensors

    def run(request: SampleRequest) -> object:
        return pipeline(
            prompt_embeds=states, prompt_attention_mask=mask, negative_prompt_embeds=states, negative_prompt_attention_mask=mask,
            width=request.width, height=request.height, num_frames=request.frames, frame_rate=request.frame_rate,
            num_inference_steps=request.steps, guidance_scale=request.guidance, audio_guidance_scale=request.guidance, stg_scale=0.0,
            audio_stg_scale=0.0, modality_scale=1.0, audio_modality_scale=1.0, guidance_rescale=0.0, audio_guidance_rescale=0.0,
            spatio_temporal_guidance_blocks=None, generator=torch.Generator().manual_seed(request.seed),
            output_type="np", return_dict=False, callback_on_step_end=stepped,
        )

    return pipeline, run


def measure(name: str, make: Callable[[SampleRequest], object], request: SampleRequest, clock: Clock, clips: int) -> Row:
    """Times `clips` clips after one of two steps to warm up."""
    make(replace(request, steps=2))
    device = clock.device
    before, times = 0, []
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(clips):
        synchronize(device)
        started = time.perf_counter()
        make(request)
        synchronize(device)
        times.append((time.perf_counter() - started, clock.denoised - started))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    seconds, denoising = (statistics.median(taken) for taken in zip(*times, strict=True))
    return Row(name, seconds, denoising, *((None, None) if peak is None else (peak / GIB, (peak - before) / GIB)))


def render(rows: list[Row]) -> str:
    """The table as Markdown."""
    lines = ["| Sampling | s/clip | of it denoising | peak GiB | of it for sampling |", "|---|---|---|---|---|"]
    for row in rows:
        peak, beside = ("-" if value is None else f"{value:.1f}" for value in (row.peak_gib, row.beside_gib))
        lines.append(f"| {row.name} | {row.seconds:.2f} | {row.denoising:.2f} | {peak} | {beside} |")
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=30, help="steps of a clip")
    parser.add_argument("--guidance", type=float, default=3.0, help="1: one pass a step")
    parser.add_argument("--clips", type=int, default=3, help="timed clips")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str]) -> int:
    """Measures both, prints, and writes the JSON file."""
    arguments = parse(argv)
    device, machine = begin(arguments.size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    width, height, frames = (768, 512, 49) if arguments.size == "real" else (96, 64, 9)
    request = SampleRequest("", width=width, height=height, frames=frames, steps=arguments.steps, guidance=arguments.guidance)
    work = f"{arguments.size}, {width}x{height}x{frames} with sound, {arguments.steps} steps, guidance {arguments.guidance:g}"
    print(f"work: {work}\n", flush=True)
    parts = Parts(arguments.size, device, dtype)
    channels = int(parts.transformer.config.caption_channels)
    text = {name: torch.randn(1, TEXT_TOKENS[arguments.size], channels, device=device, dtype=dtype) for name in STREAMS}
    clock = Clock(device)
    rows = [measure("tuner", lambda asked: product(parts, asked, text, clock, dtype), request, clock, arguments.clips)]
    print(render(rows), flush=True)
    pipeline, run = peer(parts, arguments.size, clock)
    rows.append(measure("diffusers, LTX2Pipeline", run, request, clock, arguments.clips))
    del pipeline
    print(render(rows))
    mine, other = (row.seconds for row in rows)
    clips = [Figure("tuner, clip", mine, most=round(other, 3)), Figure("diffusers, clip", other)]
    write_json(arguments.json, machine, rows, clips, work=asdict(request) | {"text": {}}, size=arguments.size)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
