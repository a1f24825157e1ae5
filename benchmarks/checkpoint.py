"""LTX-2 2.0 at released size as files, for programs that measure reading: names, shapes and metadata are real, values are not.

A `sparse` file consists of a header and a hole, which reads as zeros and takes no room on the disk. On a RAM disk (/dev/shm) a hole is
read faster than data would be, so what is to be timed there should be written in full.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Gemma3TextConfig

from text_encoder import SIZES
from tuner.interfaces.family import Variant
from tuner_ltxvideo2.gemma import empty_gemma
from tuner_ltxvideo2.keys import PARTS, join_original, to_original
from tuner_ltxvideo2.loading import empty_part, part_class
from tuner_ltxvideo2.tiny import write_tiny

DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "transformer": {"rope_type": "split"}, "connectors": {"rope_type": "split"},
    "vae": {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}, "audio_vae": {}, "vocoder": {},
}  # fmt: skip
"""What 2.0 has otherwise than the defaults of diffusers' classes."""
DRAWN = 1 << 26
"""Bytes of random weights that are repeated to the end of a file."""


@dataclass(frozen=True)
class Model:
    """A checkpoint and its text encoder."""

    checkpoint: Path
    text_encoder: Path


def write_model(folder: Path, size: str, *, sparse: bool, blocks: int = 0) -> Model:
    """Writes the model, or leaves the one that is there. `size`: "real" or "tiny"; `blocks`: of the transformer, 0: all."""
    if size == "tiny":
        tiny = write_tiny(folder)
        return Model(tiny.checkpoint, tiny.text_encoder)
    name = f"ltx-2-{blocks or 48}-blocks{'-sparse' if sparse else ''}"
    found = Model(folder / f"{name}.safetensors", folder / "gemma")
    if not found.checkpoint.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write_checkpoint(found.checkpoint, blocks, sparse=sparse)
    if not found.text_encoder.is_dir():
        _write_gemma(found.text_encoder)
    return found


def _write_checkpoint(path: Path, blocks: int, *, sparse: bool) -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    config: dict[str, object] = {}
    for part in PARTS:
        given = {**DEFAULTS[part], **({"num_layers": blocks} if blocks and part == "transformer" else {})}
        model = empty_part(part, Variant("ltxvideo2", "2.0", {part: arguments_of(part, given)}))
        # Configuration in diffusers' words, which is read as it is.
        config[part] = {"_class_name": part_class(part, given).__name__, **arguments_of(part, given)}
        for name, tensor in model.state_dict().items():
            kind = "F32" if name in ("latents_mean", "latents_std") else "BF16"
            shapes[join_original(part, to_original(part, name))] = kind, tuple(tensor.shape)
    write_tensors(path, shapes, {"model_version": "2.0.0", "config": json.dumps(config)}, sparse=sparse)


def arguments_of(part: str, given: Mapping[str, object]) -> dict[str, object]:
    """`given` and the defaults of diffusers' class."""
    with torch.device("meta"):
        made = part_class(part, given)(**given) if part != "transformer" else None
    if made is None:  # 48 blocks need not be made to know the defaults
        with torch.device("meta"):
            made = part_class(part, given)(**{**given, "num_layers": 1})
    config = {key: value for key, value in dict(made.config).items() if not key.startswith("_")}
    return {**config, "num_layers": given.get("num_layers", 48)} if part == "transformer" else config


def _write_gemma(folder: Path) -> None:
    """The files of Gemma 3 12B's size, with a hole for the weights: a run over cached captions looks at names and a few pages."""
    tiny = write_tiny(folder.with_name("tiny")).text_encoder
    folder.mkdir()
    for file in tiny.glob("*token*"):
        shutil.copy(file, folder)
    config = Gemma3TextConfig(**SIZES["real"])
    config.save_pretrained(folder)
    shapes = {name: ("BF16", tuple(tensor.shape)) for name, tensor in empty_gemma(config).state_dict().items()}
    write_tensors(folder / "model.safetensors", shapes, {}, sparse=True)


def write_tensors(path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], *, sparse: bool) -> None:
    """A safetensors file of tensors by name -> (dtype, shape); whole, or not there at all."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (kind, shape) in shapes.items():
        start, end = end, end + math.prod(shape) * {"BF16": 2, "F32": 4}[kind]
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        begin = file.tell()
        if not sparse:
            # Small values, so that a step over them gives finite numbers. One piece repeated: drawing all would take minutes.
            piece = (torch.randn(DRAWN // 2) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().data
            for start in range(0, end, DRAWN):
                file.write(piece[: min(DRAWN, end - start)])
        file.truncate(begin + end)
    temporary.replace(path)
