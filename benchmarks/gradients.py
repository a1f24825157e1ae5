"""tuner's adapter gradients and losses against plain diffusers + peft, at real width in bf16, for every way to carry out a step.

    python benchmarks/gradients.py                     # on a GPU: 2 and 6 blocks, 832x480x17, batch 2
    python benchmarks/gradients.py --blocks 1 --small  # on a CPU: small clips, nothing replayed

Both sides have the same random weights, adapters (rank 32, B not zero), batch and draws; the peer is diffusers' model with peft's adapters,
its own checkpointing off. Printed is |g - g0| / |g0| over the gradients of all adapters together, which should be at most 2 %, and how far
losses are apart at most, relatively, in ten steps of AdamW with fp32 masters on both sides. Ways: blocks recomputed or kept, weights
resident or streamed through a ring, replayed as a CUDA graph or called, compiled or not, with the audio stream or without. The first row
of each table is the peer itself against the peer in float32: what bf16 alone makes. For video alone the peer computes its audio stream
apart. Both streams have one sigma, because diffusers' forward has the modulation between them right only then.
"""

from __future__ import annotations

import gc
import itertools
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from diffusers import LTX2VideoTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from deviation import distance, flat
from figures import Figure, write_json
from memory import GROUPS
from plain import REAL, Shape, default_dtype
from product import RANK, ProductStep, Setup
from program import begin, parser_of
from tuner.builtins.optimizers import AdamW
from tuner.builtins.options import AdamOptions
from tuner.interfaces.family import Batch, Noise

LIMIT = 0.02
STEPS = 10
"""In which losses are compared."""
WARM = 4
"""Calls after which a graph is replayed: three plain ones, then the one that captures."""


@dataclass(frozen=True)
class Way:
    """How tuner carries out a step."""

    video_only: bool
    compiled: bool
    graph: bool
    recomputed: bool
    streamed: bool
    lanes: int = 2

    @property
    def name(self) -> str:
        """In words."""
        words = ["recomputed" if self.recomputed else "kept", "streamed" if self.streamed else "resident"]
        return ", ".join([*words, *["compiled"] * self.compiled, *["CUDA graph"] * self.graph, *["one lane"] * (self.lanes == 1)])

    def setup(self, layers: int) -> Setup:
        """For `ProductStep`."""
        mode, keys = "default" if self.compiled else "", GROUPS if self.streamed else {}
        return Setup(self.recomputed, self.video_only, self.graph, mode, keys=keys, lanes=self.lanes, layers=layers, trained=True)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    blocks: int
    way: str
    video_only: bool
    gradients: float
    losses: float


def ways(video_only: bool, device: torch.device, compiled: bool) -> Iterator[Way]:
    """All that there are on `device`, with blocks that are compiled or not."""
    replayed = (False, True) if device.type == "cuda" else (False,)
    both = (False, True)
    for recomputed, streamed, graph in itertools.product(both, both, replayed):
        yield Way(video_only, compiled, graph, recomputed, streamed)
        if graph and not compiled and not video_only:
            yield Way(video_only, compiled, graph, recomputed, streamed, lanes=1)


class Step(ProductStep):
    """Draws one sigma for both streams."""

    def draw(self) -> Noise:
        drawn = super().draw()
        sigma = drawn.streams["video"].sigma
        part = sigma.view(-1, 1, 1)
        return Noise({
            name: replace(one, sigma=sigma, noisy=(1 - part) * (one.noise - one.target) + part * one.noise)
            for name, one in drawn.streams.items()
        })  # fmt: skip


class Peer:
    """diffusers' model with peft's adapters and the weights of `step`, trained on the same batch and draws."""

    def __init__(self, step: ProductStep, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        with default_dtype(dtype), device:
            self.model = LTX2VideoTransformer3DModel(**{**REAL, "num_layers": layers})
        self.model.requires_grad_(False)
        theirs = [name.removesuffix(".lora_A.default") for name, _ in step.run.model.named_modules() if name.endswith(".lora_A.default")]
        # Without its audio stream tuner has no such layers, but the peer computes them.
        self.model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=theirs))
        given = {name: tensor.to(dtype) for name, tensor in step.run.model.state_dict().items()}
        lacking = self.model.load_state_dict(given, strict=False)
        if lacking.unexpected_keys or (len(step.streams) == 2 and lacking.missing_keys):
            raise RuntimeError(f"the two models have different weights: {lacking}")
        with torch.no_grad():
            for name in lacking.missing_keys:
                self.model.get_parameter(name).fill_(0.01)
        self.model.train()
        self.streams = step.streams
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for parameter in self.trained.values():  # peft makes them in float32
            parameter.data = parameter.data.to(dtype)
        self.dtype = dtype

    def differentiate(self, batch: Batch, noise: Noise) -> Tensor:
        """Forward and backward; the loss."""
        audio = "audio" if "audio" in self.streams else "video"
        hidden = {name: noise.streams[name].noisy.to(self.dtype) for name in self.streams}
        text = {name: batch.text[name].to(self.dtype) for name in self.streams}
        silent = torch.zeros_like(hidden["video"][:, :1])
        sample = batch.samples[0]
        frames, height, width = batch.streams["video"].grid
        heard = hidden.get("audio", silent)
        video, sound = self.model(
            hidden_states=hidden["video"], audio_hidden_states=heard, encoder_hidden_states=text["video"],
            audio_encoder_hidden_states=text[audio], timestep=noise.streams["video"].sigma * 1000,
            audio_timestep=noise.streams[audio].sigma * 1000, num_frames=frames, height=height, width=width, fps=sample.frame_rate,
            audio_num_frames=heard.shape[1], isolate_modalities=len(self.streams) == 1, return_dict=False,
        )  # fmt: skip
        found = {"video": video, "audio": sound}
        loss = torch.stack([nn.functional.mse_loss(found[name].float(), noise.streams[name].target) for name in self.streams]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def gradients(self) -> Tensor:
        """One after the other in the order of the model, float32, on the host; they are gone then."""
        found = torch.cat([p.grad.float().cpu().flatten() for p in self.trained.values() if p.grad is not None])
        for parameter in self.trained.values():
            parameter.grad = None
        return found

    def train(self, batch: Batch, draws: list[Noise]) -> list[float]:
        """The losses of a step on each of `draws`."""
        masters = [nn.Parameter(parameter.detach().float()) for parameter in self.trained.values()]
        optimizer = AdamW(masters, 1e-4, AdamOptions())
        losses = []
        for noise in draws:
            losses.append(float(self.differentiate(batch, noise)))
            for master, parameter in zip(masters, self.trained.values(), strict=True):
                master.grad, parameter.grad = None if parameter.grad is None else parameter.grad.float(), None
            nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, self.trained.values(), strict=True):
                    parameter.copy_(master)
        return losses


@dataclass(frozen=True)
class Expected:
    """What the peer computes."""

    gradients: Tensor
    losses: list[float]
    rounding: float
    """How far its gradients in bf16 are off those in float32."""
    drift: float
    """The same of its losses."""


def expected(layers: int, video_only: bool, shape: Shape, device: torch.device) -> Expected:
    """By the peer, in bf16 and in float32."""
    step = Step(shape, Setup(video_only=video_only, layers=layers, trained=True), device, "real")
    draws = [step.draw() for _ in range(STEPS)]
    found: dict[torch.dtype, tuple[Tensor, list[float]]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        peer = Peer(step, layers, dtype, device)
        peer.differentiate(step.batch, draws[0])
        found[dtype] = peer.gradients(), peer.train(step.batch, draws)
        del peer
        gc.collect()
    step.close()
    (gradients, losses), (exact, true) = found[torch.bfloat16], found[torch.float32]
    return Expected(gradients, losses, distance(gradients, exact), apart(losses, true))


def apart(losses: list[float], others: list[float]) -> float:
    """Most that a loss is off, relatively."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


def compare(way: Way, layers: int, wanted: Expected, shape: Shape, device: torch.device) -> Row:
    """tuner's gradients and losses against the peer's."""
    step = Step(shape, way.setup(layers), device, "real")
    first = step.draw()
    drawn, step.draw = step.draw, lambda: first  # type: ignore[method-assign]
    for _ in range(WARM if way.graph else 0):
        step.differentiate()
        step.forget()
    step.differentiate()
    gradients = distance(flat(step), wanted.gradients)
    step.forget()
    later = [first] + [drawn() for _ in range(STEPS - 1)]
    losses = []
    for noise in later:
        step.draw = lambda noise=noise: noise  # type: ignore[method-assign,misc]
        losses.append(float(step()))
    step.close()
    return Row(layers, way.name, way.video_only, gradients, apart(losses, wanted.losses))


def show(name: str, gradients: float, losses: float, seconds: float) -> None:
    """One line of the table."""
    print(f"| {name} | {gradients:.2%} | {losses:.3%} | {seconds:.0f} |", flush=True)


def main(argv: list[str]) -> int:
    """Prints the tables."""
    parser = parser_of(__doc__, sized=False)
    parser.add_argument("--blocks", default="2,6", help="depths, separated by commas")
    parser.add_argument("--small", action="store_true", help="256x192x9, batch 1, and short captions")
    parser.add_argument("--compiled", choices=("no", "only", "too"), default="too", help="blocks as they are, compiled, or both")
    parser.add_argument("--streams", default="both,video", help="both, video; separated by a comma")
    arguments = parser.parse_args(argv)
    device, machine = begin()
    shape = Shape("small", 1, 256, 192, 9, text_tokens=64) if arguments.small else Shape("head", 2, 832, 480, 17)
    print(f"{shape.width}x{shape.height}x{shape.frames}, batch {shape.batch}, rank {RANK}; gradients at most {LIMIT:.0%} off", flush=True)
    said = logging.StreamHandler(sys.stdout)
    logging.getLogger("tuner.model.compiled").addHandler(said)
    logging.getLogger("tuner.model.compiled").setLevel(logging.INFO)
    rows: list[Row] = []
    known: dict[tuple[int, bool], Expected] = {}
    depths = [int(word) for word in arguments.blocks.split(",")]
    # All that need no compiler first: they take seconds.
    for compiled in {"no": (False,), "only": (True,), "too": (False, True)}[arguments.compiled]:
        for layers, video_only in itertools.product(depths, [word == "video" for word in arguments.streams.split(",")]):
            print(f"\n{layers} blocks, {'video alone' if video_only else 'both streams'}\n")
            print("| Way | gradients off | losses off | s |\n|---|---|---|---|", flush=True)
            if (layers, video_only) not in known:
                began = time.perf_counter()
                wanted = known[layers, video_only] = expected(layers, video_only, shape, device)
                show("the peer, against itself in float32", wanted.rounding, wanted.drift, time.perf_counter() - began)
            for way in ways(video_only, device, compiled):
                began = time.perf_counter()
                rows.append(compare(way, layers, known[layers, video_only], shape, device))
                show(way.name, rows[-1].gradients, rows[-1].losses, time.perf_counter() - began)
                write_json(arguments.json, machine, rows, figures(rows))
    return int(any(row.gradients > LIMIT for row in rows))


def figures(rows: list[Row]) -> list[Figure]:
    """The largest of each depth."""
    found = []
    for layers in sorted({row.blocks for row in rows}):
        mine = [row for row in rows if row.blocks == layers]
        found.append(Figure(f"{layers} blocks, gradients off at most, of {len(mine)} ways", max(r.gradients for r in mine), "", LIMIT))
        found.append(Figure(f"{layers} blocks, losses off at most", max(row.losses for row in mine), ""))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
