"""From the command to the first training step: where the seconds go, in a fresh process, over cached data.

    python benchmarks/start.py                    # LTX-2 2.0 at real size, written to /dev/shm first (43 GB); needs a GPU
    python benchmarks/start.py --only int8        # rows whose name contains one of these words
    python benchmarks/start.py --size tiny --folder /tmp/start    # the same program on a CPU; its times mean nothing

The command is `tuner train` for two steps; its own record of a start (the event `start` in events.jsonl) is what is printed. Weights are
random and lie in the page cache, because they have just been written, or on a RAM disk. Records of a few made clips are random and of
the right shapes, so nothing is encoded. The text encoder's file is a hole of its size: a run over cached captions reads a few pages of it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from caching import write_clips
from checkpoint import Model, write_model
from figures import Figure, write_json
from program import begin, find_device, parser_of
from tuner.config.resolve import resolve
from tuner.data.records import RecordPlaces
from tuner.interfaces.encoders import LatentEncoder, Record
from tuner.plugins.loader import load_plugins
from tuner.train.plan import Plan
from tuner.train.planning import make_plan
from tuner_ltxvideo2.audio_latents import latent_length

LIMIT = 60.0
"""Seconds that a start may take."""
CASES: Mapping[str, Mapping[str, object]] = {
    "resident, bf16": {},
    "resident, int8": {"base_model_precision": "int8-torchao"},
    "streamed, bf16": {"enable_group_offload": True, "group_offload_use_stream": True},
    "streamed, int8": {"enable_group_offload": True, "group_offload_use_stream": True, "base_model_precision": "int8-torchao"},
}
CLIPS = 4
WORK = {"real": (832, 480, 17), "tiny": (96, 64, 9)}
"""Width, height and frames of the clips."""


def prepared(folder: Path, size: str, count: int, *, sparse: bool = False) -> tuple[Model, dict[str, object]]:
    """A model, and the keys of a run over so many clips, all of whose records are there. What is in `folder` already is left."""
    folder.mkdir(parents=True, exist_ok=True)
    model = write_model(folder, size, sparse=sparse)
    width, height, frames = WORK[size]
    clips = folder / f"clips-{count}"
    if not clips.is_dir():
        write_clips(clips, count, width, height, frames, sound=True)
    keys = configuration(folder, model, size, clips)
    fill_cache(keys)
    return model, keys


def configuration(folder: Path, model: Model, size: str, clips: Path) -> dict[str, object]:
    """Keys of a run over `clips`."""
    width, height, frames = WORK[size]
    dataset = [{"id": "clips", "instance_data_dir": str(clips), "video": {"num_frames": frames}}]
    (folder / "data.json").write_text(json.dumps(dataset))
    return {
        "model_family": "ltxvideo2", "pretrained_model_name_or_path": str(model.checkpoint), "text_encoder_path": str(model.text_encoder),
        "data_backend_config": str(folder / "data.json"), "cache_dir": str(folder / "cache"), "resolution": (width * height) ** 0.5,
        "max_train_steps": 2, "train_batch_size": 2, "lora_rank": 32, "optimizer": "adamw", "validation_disable": True,
    }  # fmt: skip


def fill_cache(keys: Mapping[str, object]) -> None:
    """Random records of the right shapes for every clip and caption, under the names that the run will look for."""
    registry = load_plugins()
    settings = resolve(registry.option_types, flags={key: str(value) for key, value in keys.items()})
    plan = make_plan(registry, settings, find_device())
    places = RecordPlaces(plan.encoders, plan.manifest.geometry, plan.manifest.text_cache)
    for encoder in plan.encoders:
        for item in plan.manifest.items:
            place = places.caption(item.caption, encoder.name) if encoder.reads == "text" else places.clip(item, encoder.name)
            if place is not None and not place.filled():
                bucket = item.bucket
                place.cache.write(place.key, made_record(plan, encoder, (bucket.width, bucket.height, bucket.frames), item.seconds))


def made_record(plan: Plan, encoder: LatentEncoder, shape: tuple[int, int, int], seconds: float) -> Record:
    """What the encoder would make of a clip of that width, height and number of frames; random."""
    width, height, frames = shape
    dtype = plan.context.dtype
    if encoder.reads == "text":
        configured = plan.facts.variant.config["transformer"]
        channels, tokens = int(str(configured["caption_channels"])), plan.family.caption_tokens or 0
        return Record({name: torch.randn(tokens, channels).to(dtype) for name in plan.streams}, {"tokens": "8", "truncated_tokens": "0"})
    if encoder.reads == "video":
        return Record({"latents": torch.randn(128, (frames - 1) // 8 + 1, height // 32, width // 32).to(dtype)})
    length = latent_length(round(seconds * plan.manifest.geometry.sample_rate))
    return Record({"latents": torch.randn(length, 128).to(dtype), "mask": torch.ones(length)})


def start(folder: Path, keys: Mapping[str, object]) -> Mapping[str, object]:
    """Runs the command and returns its record of the start. Raises `CalledProcessError`."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    (folder / "config.json").write_text(json.dumps({**keys, "output_dir": str(out)}))
    command = [sys.executable, "-m", "tuner.cli.main", "train", "--config", str(folder / "config.json")]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        print(ran.stdout, ran.stderr, file=sys.stderr)
        ran.check_returncode()
    events = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    return next(event for event in events if event["kind"] == "start")  # type: ignore[no-any-return]


def touch(size: int) -> None:
    """Uses so many bytes of memory once: a virtual machine may be given what it has never used only then, at a gigabyte a second."""
    torch.empty(size, dtype=torch.uint8).fill_(1)


def show(name: str, found: Mapping[str, object]) -> None:
    """One line of the table."""
    seconds = found["seconds"]
    assert isinstance(seconds, Mapping)
    total, speed = float(str(found["total"])), float(str(found["bytes"])) / 1e9 / seconds["load"]
    each = " | ".join(f"{taken:.2f}" for taken in seconds.values())
    print(f"| {name} | {each} | {total:.1f} (at most {LIMIT:g}) | {speed:.1f} |", flush=True)


def main(argv: list[str]) -> int:
    """Measures and prints."""
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/tuner-start"), help="where the weights are written, and left")
    parser.add_argument("--sparse", action="store_true", help="write holes in place of random weights; see checkpoint.py")
    parser.add_argument("--only", default="", help="only rows whose name contains one of these words, separated by commas")
    arguments = parser.parse_args(argv)
    _, machine = begin(arguments.size)
    folder: Path = arguments.folder
    model, keys = prepared(folder, arguments.size, CLIPS, sparse=arguments.sparse)
    width, height, frames = WORK[arguments.size]
    print(f"weights: {model.checkpoint.stat().st_size / 1e9:.2f} GB; {CLIPS} clips of {width}x{height}x{frames}, batch 2, LoRA rank 32\n")
    found: dict[str, Mapping[str, object]] = {}
    figures: list[Figure] = []
    for name, more in CASES.items():
        if any(word in name for word in arguments.only.split(",")):
            if more.get("enable_group_offload"):
                touch(model.checkpoint.stat().st_size)
            found[name] = start(folder, {**keys, **more})
            if len(found) == 1:
                phases = list(found[name]["seconds"])  # type: ignore[call-overload]
                print(f"| Weights | {' | '.join(phases)} | s in all | load, GB/s |\n|{'---|' * (len(phases) + 3)}", flush=True)
            show(name, found[name])
            figures.append(Figure(f"start, {name}", float(str(found[name]["total"])), most=LIMIT if arguments.size == "real" else None))
            write_json(arguments.json, machine, [], figures, phases=found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
