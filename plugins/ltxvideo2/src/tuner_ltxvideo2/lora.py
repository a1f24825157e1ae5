"""LoRA files that ComfyUI and diffusers both load at strength 1: original module names, alpha folded into B, no alpha tensors.

A file written here has the keys `diffusion_model.<original module name>.lora_A.weight` and `.lora_B.weight`. An `.alpha` tensor
would make diffusers refuse it, so B is stored times alpha / rank. Reading also takes diffusers' own spelling (`transformer.` and
diffusers' names) and the older `.lora_down` / `.lora_up` / `.alpha` one. Published files may adapt the text connectors as well; these
layers are left out, because captions are encoded before an adapter is there.

Dimensions: r rank.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from tuner.errors import CheckpointError
from tuner.interfaces.services import AdapterState, CheckpointFormat
from tuner.tensor_files import write_tensors
from tuner_ltxvideo2 import keys

log = logging.getLogger(__name__)

ORIGINAL = "diffusion_model."
DIFFUSERS = "transformer."
_SUFFIXES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_down.weight": "A", ".lora_up.weight": "B", ".alpha": "alpha"}
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_NAMED = 8  # how many names an error lists before it only counts


class UniversalFormat(CheckpointFormat):
    """One file for both worlds."""

    name = "universal"
    families: ClassVar[tuple[str, ...]] = ("ltxvideo2",)

    def write(self, path: Path, adapter: AdapterState, facts: Mapping[str, str]) -> None:
        """Writes the file under another name and renames it, so that `path` is whole or absent.

        B is multiplied in fp32 and stored in its own dtype. Raises `CheckpointError` for tensors that are no adapter of this rank,
        `DiskError` where the folder cannot be written.
        """
        _check_pairs(adapter)
        tensors: dict[str, Tensor] = {}
        for module, (down, up) in adapter.weights.items():
            key = ORIGINAL + keys.to_original("transformer", module)
            tensors[key + ".lora_A.weight"] = down.detach().cpu().contiguous()
            tensors[key + ".lora_B.weight"] = _folded(up.detach().cpu(), adapter.alpha / adapter.rank)
        own = {
            "format": "pt", "rank": str(adapter.rank), "alpha": f"{adapter.alpha:g}", "alpha_folded": "true",
            "targets": json.dumps(sorted(adapter.targets)),
        }  # fmt: skip
        write_tensors(path, tensors, {**facts, **own}, what="the adapter")

    def accepts(self, path: Path) -> bool:
        """Whether every key is of an adapter in one of the three spellings."""
        if path.suffix != ".safetensors" or not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError):
            return False
        adapted = [name for name in names if not _is_of_connectors(name)]
        return bool(adapted) and all(_split(name) is not None for name in adapted)

    def read(self, path: Path) -> AdapterState:
        """The adapter under this family's module names, any alpha folded into B: `alpha` equals `rank`, the largest in the file."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"is no readable safetensors file: {error}", where=path.name) from error
        left_out = [name for name in tensors if _is_of_connectors(name)]
        if left_out:
            log.warning("%s also adapts the text connectors; these %d tensors are left out", path.name, len(left_out))
        parts = _by_module({name: tensor for name, tensor in tensors.items() if name not in left_out}, path.name)
        scale = _scale_of_diffusers(metadata, path.name)
        pairs = {module: _pair(module, part, scale, path.name) for module, part in parts.items()}
        rank = max(down.shape[0] for down, _ in pairs.values())
        weights = {module: _padded(pair, rank) for module, pair in pairs.items()}
        return AdapterState(weights, rank=rank, alpha=float(rank), targets=tuple(sorted(weights)))


# --- writing -----------------------------------------------------------------------------------------------------
def _check_pairs(adapter: AdapterState) -> None:
    """Each A is (r, in), each B (out, r)."""
    shapes = {module: (tuple(a.shape), tuple(b.shape)) for module, (a, b) in adapter.weights.items()}
    problems = [
        f"{module}: A {a} and B {b} are no pair of rank {adapter.rank}"
        for module, (a, b) in shapes.items()
        if len(a) != 2 or len(b) != 2 or a[0] != adapter.rank or b[1] != adapter.rank
    ]
    _raise_for(problems or ([] if shapes else ["there is no adapted layer"]), "adapter", "")


def _folded(up: Tensor, scale: float) -> Tensor:
    """B times the adapter's scale; untouched when that is 1."""
    return up.contiguous() if scale == 1 else (up.float() * scale).to(up.dtype).contiguous()


# --- reading -----------------------------------------------------------------------------------------------------
def _split(key: str) -> tuple[str, str] | None:
    """Module name of this family and "A", "B" or "alpha"; None for a key of no known spelling."""
    for suffix, role in _SUFFIXES.items():
        if key.endswith(suffix):
            stem = key.removesuffix(suffix)
            if stem.startswith(ORIGINAL):
                module = keys.to_diffusers("transformer", stem.removeprefix(ORIGINAL))
                return None if module is None else (module, role)
            return (stem.removeprefix(DIFFUSERS), role) if stem.startswith(DIFFUSERS) else None
    return None


def _is_of_connectors(key: str) -> bool:
    """Whether a key belongs to the networks between the text encoder and the transformer, in the makers' spelling or diffusers'."""
    if not key.endswith(tuple(_SUFFIXES)):
        return False
    stem = key.removeprefix(ORIGINAL)
    return stem.startswith((keys.PROJECTION_PREFIX, *keys.CONNECTOR_PREFIXES, "connectors."))


def _by_module(tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    """Module -> role -> tensor. Raises `CheckpointError` for keys of another kind and for halves of pairs."""
    parts: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        split = _split(key)
        if split is None:
            problems.append(f"{key}: not a key of a LoRA for this family")
        elif split[1] in parts.setdefault(split[0], {}):
            problems.append(f"{key}: the layer occurs twice, in two spellings")
        else:
            parts[split[0]][split[1]] = tensor
    problems += [f"{module}: A or B is missing" for module, part in parts.items() if not {"A", "B"} <= part.keys()]
    _raise_for(problems or ([] if parts else ["the file is empty"]), where, "the file must hold a LoRA of an LTX-2 transformer")
    return parts


def _pair(module: str, part: Mapping[str, Tensor], scale: float, where: str) -> tuple[Tensor, Tensor]:
    """(A, B) with the scale in B: alpha / r where the file gives alpha, else `scale`."""
    down, up = part["A"], part["B"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise CheckpointError(f"{module}: A {tuple(down.shape)} and B {tuple(up.shape)} are no pair", where=where)
    if "alpha" in part:
        scale = float(part["alpha"].to(torch.float64)) / down.shape[0]
    return down, _folded(up, scale)


def _padded(pair: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """The same product at a higher rank, the new rows of A and columns of B zero: files may mix ranks, an `AdapterState` has one."""
    missing = rank - pair[0].shape[0]
    return (functional.pad(pair[0], (0, 0, 0, missing)), functional.pad(pair[1], (0, missing))) if missing else pair


def _scale_of_diffusers(metadata: Mapping[str, str], where: str) -> float:
    """alpha / rank as diffusers notes them in the metadata of its own files; 1 where it noted none."""
    if _DIFFUSERS_METADATA not in metadata:
        return 1.0
    try:
        noted = {str(key).removeprefix(DIFFUSERS): value for key, value in json.loads(metadata[_DIFFUSERS_METADATA]).items()}
        scale = float(noted["lora_alpha"]) / float(noted["r"])
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{_DIFFUSERS_METADATA} cannot be read: {error}", where=where) from error
    special = [key for key in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora") if noted.get(key)]
    if special:
        raise CheckpointError(f"the adapter uses {', '.join(special)}, which this format does not hold", where=where)
    return scale


def _raise_for(problems: list[str], where: str, remedy: str) -> None:
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise CheckpointError("; ".join(problems[:_NAMED]) + more, where=where, remedy=remedy)
