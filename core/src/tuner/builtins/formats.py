"""The adapter file of peft and diffusers: `<part>.<module>.lora_A.weight`, with rank and alpha as JSON in the file's metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuner.errors import CheckpointError
from tuner.interfaces.services import AdapterState, CheckpointFormat
from tuner.tensor_files import write_tensors

FILE_NAME = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for in a folder."""
PREFIX = "transformer."
METADATA_KEY = "lora_adapter_metadata"
"""diffusers reads peft's configuration here, its keys prefixed like the tensors'. Without it alpha is taken to be the rank."""
ENDS = (".lora_A.weight", ".lora_B.weight")


class PeftFormat(CheckpointFormat):
    """Loads with `load_lora_weights` of a diffusers pipeline and `load_lora_adapter` of its transformer, alpha included."""

    name = "peft"

    def write(self, path: Path, adapter: AdapterState, facts: Mapping[str, str]) -> None:
        """Writes `path` whole or not at all. Raises `DiskError`."""
        tensors: dict[str, Tensor] = {}
        for module, pair in adapter.weights.items():
            for end, tensor in zip(ENDS, pair, strict=True):
                tensors[PREFIX + module + end] = tensor.detach().cpu().contiguous()
        peft = {"r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": list(adapter.targets), "bias": "none"}
        described = json.dumps({PREFIX + key: value for key, value in peft.items()}, sort_keys=True)
        write_tensors(path, tensors, {**facts, METADATA_KEY: described}, what="the adapter")

    def accepts(self, path: Path) -> bool:
        """Whether every tensor's name is one that `write` gives."""
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
        except (OSError, SafetensorError):
            return False
        return bool(keys) and all(key.startswith(PREFIX) and key.endswith(ENDS) for key in keys)

    def read(self, path: Path) -> AdapterState:
        """The adapter, tensors in the dtype they are stored in. Raises `CheckpointError` for anything but this layout."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot be read as a safetensors file: {error}", where=str(path)) from error
        weights = _pairs(path, tensors)
        rank = _rank(path, weights)
        described = _described(path, metadata)
        return AdapterState(weights, rank, _alpha(path, described, rank), _targets(described, list(weights)))


def _pairs(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    odd = [key for key in tensors if not (key.startswith(PREFIX) and key.endswith(ENDS))]
    if odd or not tensors:
        problem = f"{len(odd)} of {len(tensors)} tensors do not belong to a peft adapter of a transformer"
        raise CheckpointError(problem, where=str(path), value=odd[0] if odd else None)
    # Each end is as long as the other, so the module's name lies between the prefix and either.
    modules = dict.fromkeys(key[len(PREFIX):-len(ENDS[0])] for key in tensors)
    for module in modules:
        missing = [end for end in ENDS if PREFIX + module + end not in tensors]
        if missing:
            problem = f"{PREFIX}{module}{missing[0]} is missing"
            raise CheckpointError(problem, where=str(path), remedy="the file is not complete; use another copy")
    return {module: (tensors[PREFIX + module + ENDS[0]], tensors[PREFIX + module + ENDS[1]]) for module in modules}


def _rank(path: Path, weights: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    ranks = {size for a, b in weights.values() for size in (a.shape[0], b.shape[-1])}
    if len(ranks) != 1 or any(a.dim() != 2 or b.dim() != 2 for a, b in weights.values()):
        raise CheckpointError("the matrices are not all of one rank", where=str(path), value=sorted(ranks))
    return ranks.pop()


def _described(path: Path, metadata: Mapping[str, str]) -> dict[str, object]:
    try:
        described = json.loads(metadata.get(METADATA_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{METADATA_KEY} is not JSON: {error}", where=str(path)) from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{METADATA_KEY} is not a JSON object", where=str(path))
    return {str(key): value for key, value in described.items()}


def _alpha(path: Path, described: Mapping[str, object], rank: int) -> float:
    if described.get(PREFIX + "rank_pattern") or described.get(PREFIX + "alpha_pattern") or described.get(PREFIX + "use_rslora"):
        raise CheckpointError("scales that differ between modules, or rslora, are not read", where=str(path))
    alpha = described.get(PREFIX + "lora_alpha", rank)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha <= 0:
        raise CheckpointError("lora_alpha is not a positive number", where=str(path), value=alpha)
    stated = described.get(PREFIX + "r", rank)
    if stated != rank:
        raise CheckpointError(f"the metadata's rank is not the matrices' {rank}", where=str(path), value=stated)
    return float(alpha)


def _targets(described: Mapping[str, object], modules: Sequence[str]) -> tuple[str, ...]:
    """As stated; peft may state a pattern or endings, which are kept as they are."""
    stated = described.get(PREFIX + "target_modules")
    return tuple(str(target) for target in stated) if isinstance(stated, list) and stated else tuple(modules)
