"""Memory and time of encoding captions with Gemma 3 12B and LTX-2's connectors, resident and streamed, with random weights.

    python benchmarks/text_encoder.py --folder /dev/shm/gemma    # real size: writes 24 GB of random weights there first
    python benchmarks/text_encoder.py --size tiny                # the same program on a CPU, to see that it runs

The product's own encoder, from files to what is cached. Peak memory counts what torch has allocated on the device, from loading on.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from safetensors.torch import save_file
from torch import Tensor
from transformers import Gemma3TextConfig

from figures import Figure, write_json
from plain import default_dtype
from product import open_memory
from program import GIB, begin, parser_of, synchronize
from tuner.interfaces.family import Variant
from tuner.interfaces.services import TensorHeader, WeightSource
from tuner_ltxvideo2.gemma import empty_gemma
from tuner_ltxvideo2.text import TextEncoder
from tuner_ltxvideo2.tiny import write_tiny

LIMIT_GIB = 4.0
"""Of the streamed rows."""
CASES: Mapping[str, Mapping[str, str]] = {
    "resident, bf16": {},
    "resident, int8": {"text_encoder_1_precision": "int8-torchao"},
    "RamTorch, bf16": {"ramtorch_text_encoder": "true"},
    "group offload with a stream, bf16": {"group_offload_text_encoder": "true", "group_offload_use_stream": "true"},
    "group offload with a stream, int8": {
        "group_offload_text_encoder": "true", "group_offload_use_stream": "true", "text_encoder_1_precision": "int8-torchao",
    },
}  # fmt: skip
SIZES: Mapping[str, Mapping[str, int]] = {
    "real": {
        "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    peak_gib: float
    seconds: float
    loaded: float
    streamed: bool


def figures(rows: list[Row]) -> list[Figure]:
    """Peak and seconds of each."""
    peaks = [Figure(f"{row.name}, peak", row.peak_gib, "GiB", LIMIT_GIB if row.streamed else None) for row in rows]
    return [*peaks, *(Figure(f"{row.name}, caption", row.seconds) for row in rows)]


class Connectors(WeightSource):
    """Random connectors for a Gemma of that size, held in memory."""

    description = "random"

    def __init__(self, size: Mapping[str, int]) -> None:
        width, layers = size["hidden_size"], size["num_hidden_layers"]
        heads = width // 128
        arguments = {
            "caption_channels": width, "text_proj_in_factor": layers + 1, "rope_type": "split",
            "video_connector_num_attention_heads": heads, "audio_connector_num_attention_heads": heads,
        }  # fmt: skip
        self.variant = Variant("ltxvideo2", "2.0", {"connectors": arguments})
        with default_dtype(torch.bfloat16):
            self._state = dict(LTX2TextConnectors(**arguments).state_dict())
        self.location = Path()

    def metadata(self) -> Mapping[str, object]:
        return {}

    def parts(self) -> Sequence[str]:
        return ("connectors",)

    def headers(self, part: str) -> Mapping[str, TensorHeader]:
        return {name: TensorHeader(tuple(tensor.shape), "BF16") for name, tensor in self._state.items()}

    def tensors(self, part: str, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._state[name]) for name in (self._state if names is None else names))

    def fingerprint(self, part: str) -> str:
        return "random"

    def folder(self, part: str) -> Path | None:
        return None


def write_gemma(folder: Path, size: Mapping[str, int]) -> None:
    """A Gemma of that size with random weights, a file for each layer, and the tiny flavour's tokenizer made as long as the real one's."""
    tiny = write_tiny(folder / "tiny").text_encoder
    for file in tiny.glob("*token*"):
        shutil.copy(file, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 1024}))
    config = Gemma3TextConfig(**size)
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in empty_gemma(config).state_dict().items()}
    place = {name: name.split(".")[1] if name.startswith("layers.") else "rest" for name in shapes}
    drawn = torch.randn(1 << 22, dtype=torch.bfloat16) * 0.02
    index = {}
    for file in dict.fromkeys(place.values()):
        tensors = {}
        for name, shape in shapes.items():
            if place[name] == file:
                index[name] = f"model-{file}.safetensors"
                tensors[name] = drawn.repeat(-(-shape.numel() // drawn.numel()))[: shape.numel()].view(shape).clone()
        save_file(tensors, folder / f"model-{file}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def measure(folder: Path, source: Connectors, keys: Mapping[str, str], device: torch.device, captions: int) -> tuple[float, float, float]:
    """Seconds to load, median seconds a caption, peak GiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    encoder = TextEncoder(source, source.variant, torch.bfloat16, folder, open_memory(keys, device))
    started = time.perf_counter()
    encoder.load(device)
    synchronize(device)
    loaded = time.perf_counter() - started
    times = []
    for number in range(captions):
        started = time.perf_counter()
        encoder.encode([f"a caption with number {number}"])
        synchronize(device)
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    encoder.unload()
    return loaded, statistics.median(times), peak


def main(argv: list[str]) -> int:
    """Measures and prints."""
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, help="where the weights are written; a temporary folder when left out")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--captions", type=int, default=4)
    arguments = parser.parse_args(argv)
    device, machine = begin(arguments.size)
    rows: list[Row] = []
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder, size = Path(scratch), SIZES[arguments.size]
        write_gemma(folder, size)
        source = Connectors(size)
        print("\n| Text encoder | peak GiB | s/caption | s to load |\n|---|---|---|---|", flush=True)
        for name, keys in ((n, k) for n, k in CASES.items() if arguments.only in n):
            loaded, seconds, peak = measure(folder, source, keys, device, arguments.captions)
            rows.append(Row(name, peak, seconds, loaded, any("ramtorch" in key or "group" in key for key in keys)))
            write_json(arguments.json, machine, rows, figures(rows))
            limit = f" (at most {LIMIT_GIB:g})" if rows[-1].streamed else ""
            print(f"| {name} | {peak:.2f}{limit} | {seconds:.3f} | {loaded:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
