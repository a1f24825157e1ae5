"""Adapter files of any known layout: found, read, and compared with the model that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from tuner.errors import CheckpointError
from tuner.interfaces.services import AdapterState, CheckpointFormat, TensorHeader
from tuner.train.saving.checkpoint import find_checkpoint

if TYPE_CHECKING:
    from tuner.plugins.registry import Registry

OWN_NAME = "lora.safetensors"
"""The adapter in the family's own layout."""
FILE_NAMES = {"peft": "pytorch_lora_weights.safetensors"}
"""Layouts with a name that other programs look for."""


def find_adapter(source: Path) -> Path:
    """The adapter file of a run folder, a checkpoint folder, or the file itself."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise CheckpointError("there is no such run, checkpoint or file", where=str(source))
    names = [OWN_NAME, *FILE_NAMES.values()]
    newest = find_checkpoint(source, "latest")
    for folder in [source, *([newest] if newest else [])]:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    remedy = "name a run or checkpoint folder of a LoRA training"
    raise CheckpointError("no adapter file is in this folder", where=str(source), remedy=remedy)


def read_adapter(registry: Registry, source: Path) -> AdapterState:
    """Reads an adapter in any known layout. Raises `CheckpointError`."""
    path = find_adapter(source)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            problem = f"is damaged, or no safetensors file: {error}"
            raise CheckpointError(problem, where=str(path), remedy="copy or download it again") from error
    layouts = formats(registry)
    for layout in layouts.values():
        if layout.accepts(path):
            return layout.read(path)
    raise CheckpointError("is no adapter in a known layout", where=str(path), remedy=f"layouts that are read: {', '.join(layouts)}")


def formats(registry: Registry) -> dict[str, CheckpointFormat]:
    """Name -> layout, those that belong to a family first."""
    built = {c.name: c.load()() for c in registry.components("checkpoint_format")}  # type: ignore[operator]
    return dict(sorted(built.items(), key=lambda entry: (not entry[1].families, entry[0])))


def check_adapter(adapter: AdapterState, headers: Mapping[str, TensorHeader], where: str) -> None:
    """Every pair must name a linear layer of the model and fit its shape. Raises `CheckpointError` naming those that do not."""
    wrong = []
    for name, (down, up) in adapter.weights.items():
        header = headers.get(f"{name}.weight")
        if header is None:
            wrong.append(f"{name}: the model has no such layer")
        elif header.shape != (up.shape[0], down.shape[1]):
            wrong.append(f"{name}: adapter {up.shape[0]}x{down.shape[1]}, model {'x'.join(map(str, header.shape))}")
    if wrong:
        shown = "\n  ".join(wrong[:8]) + (f"\n  ... and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise CheckpointError(f"{len(wrong)} of {len(adapter.weights)} adapted layers do not fit the model:\n  {shown}", where=where)
