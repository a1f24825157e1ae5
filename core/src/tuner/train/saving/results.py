"""What a finished run leaves for other programs: adapter files in every layout that fits the family, or the full weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tuner.config.settings import AdapterSettings, ModelSettings
from tuner.data.manifest import Manifest
from tuner.errors import CheckpointError, PluginError
from tuner.interfaces.family import ClipShape, ModelFamily
from tuner.interfaces.services import AdapterState, CheckpointFormat, TensorHeader
from tuner.model.adapters import adapter_alpha, adapter_state
from tuner.plugins.guard import asked
from tuner.tensor_files import write_tensors
from tuner.train.assemble import Assembly
from tuner.train.plan import Plan
from tuner.train.saving.adapter_files import FILE_NAMES, OWN_NAME

FULL_NAME = "transformer.safetensors"
"""What full fine-tuning leaves in the run folder."""
NAMED = 8
"""How many names an error lists before it only counts."""


def file_name(layout: str, own: bool) -> str:
    """Of an adapter file in `layout`; `own`: the first layout that belongs to the family."""
    return FILE_NAMES.get(layout) or (OWN_NAME if own else f"lora.{layout}.safetensors")


def write_results(plan: Plan, assembly: Assembly, folder: Path) -> tuple[Path, ...]:
    """Writes the trained weights for use elsewhere; the most widely readable file comes first."""
    if plan.settings.get(ModelSettings).model_type == "full":
        return (write_full(plan, assembly, folder / FULL_NAME),)
    return write_adapter_files(plan, assembly, folder)


def write_adapter_files(plan: Plan, assembly: Assembly, folder: Path, formats: Sequence[str] | None = None) -> tuple[Path, ...]:
    """Writes the adapter in `formats` (default: all that fit the family, the family's own first)."""
    if plan.settings.get(ModelSettings).model_type == "full":
        return ()
    adapter = trained_adapter(plan, assembly)
    found = []
    for component in plan.registry.components("checkpoint_format"):
        layout: CheckpointFormat = component.load()()  # type: ignore[operator]
        fits = not layout.families or plan.family_name in layout.families
        if fits and (formats is None or component.name in formats):
            found.append((not layout.families, component.name, layout))
    written, broken = list[Path](), list[PluginError]()
    found.sort(key=lambda entry: entry[:2])
    for index, (foreign, name, layout) in enumerate(found):
        path = folder / file_name(name, own=not foreign and not index)
        try:
            asked(f"checkpoint format {name}", "write", partial(layout.write, path, adapter, adapter_facts(plan)))
            if not path.exists():
                raise PluginError("write has made no file", where=f"checkpoint format {name}", value=path.name)
        except PluginError as error:  # the other layouts are written all the same
            broken.append(error)
            continue
        written.append(path)
    if broken:
        raise broken[0]
    return tuple(written)


def trained_adapter(plan: Plan, assembly: Assembly) -> AdapterState:
    """The adapter as the model computes with it, in the run's dtype."""
    settings = plan.settings.get(AdapterSettings)
    state = adapter_state(assembly.training.model, settings.lora_rank, adapter_alpha(settings))
    dtype = plan.context.dtype
    return replace(state, weights={name: (a.to(dtype), b.to(dtype)) for name, (a, b) in state.weights.items()})


def adapter_facts(plan: Plan) -> dict[str, str]:
    """Metadata of the file: base model and variant, and what the family says of the dataset; never captions or paths."""
    own = {"base_model": plan.source.description, "family": plan.family_name, "variant": plan.facts.variant.name}
    return {**plan.family.file_facts(companion_shapes(plan.manifest)), **own}


def companion_shapes(manifest: Manifest) -> dict[str, list[tuple[ClipShape, ClipShape]]]:
    """Role -> the different pairs of an item's shape and its companion's, in the order of the items."""
    found: dict[str, dict[tuple[ClipShape, ClipShape], None]] = {}
    for item in manifest.items:
        for companion in item.companions:
            width, height, frames, seconds = companion.bucket
            shape = ClipShape(width, height, frames, item.frame_rate, seconds or frames / item.frame_rate)
            found.setdefault(companion.role, {})[item.shape, shape] = None
    return {role: list(pairs) for role, pairs in found.items()}


def write_full(plan: Plan, assembly: Assembly, path: Path) -> Path:
    """All trained weights under the published checkpoint's names, in the run's dtype; raises `DiskError`."""
    assembly.session.materialize()
    dtype = plan.context.dtype
    weights = {
        plan.family.original_name(name): parameter.detach().to("cpu", dtype).contiguous()
        for name, parameter in assembly.training.model.state_dict().items()
        if isinstance(parameter, torch.Tensor)
    }
    write_tensors(
        path, weights, adapter_facts(plan), what="the trained model",
        remedy="free some space, then go on with --resume_from_checkpoint latest: the last checkpoint has them",
    )  # fmt: skip
    return path


@torch.no_grad()
def load_full(family: ModelFamily, model: nn.Module, headers: Mapping[str, TensorHeader], source: Path) -> None:
    """Puts the weights of a file of `write_full`, or of the run folder that holds it, over those of `model`, in the model's dtype.

    `headers`: of the base checkpoint, name -> header; what the file has of them and `model` was loaded without is left out.
    Raises `CheckpointError` with the names that are missing, unknown or of another shape; `model` is then as before.
    """
    path = source / FULL_NAME if source.is_dir() else source
    if not path.is_file():
        raise CheckpointError("there are no full weights", where=str(path), remedy="name a file or run folder of a full fine-tuning")
    own = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            stored = {family.module_name(key): key for key in file.keys()}  # noqa: SIM118 - not a mapping
            shapes = {name: tuple(file.get_slice(key).get_shape()) for name, key in stored.items()}
            _check_full(own, headers, shapes, path)
            for name, tensor in own.items():
                tensor.copy_(file.get_tensor(stored[name]))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be read as a safetensors file: {error}", where=str(path)) from error


def _check_full(
    own: Mapping[str, torch.Tensor], headers: Mapping[str, TensorHeader], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    wrong = [f"{name}: not in the file" for name in own if name not in shapes]
    wrong += [f"{name}: the model has no such weight" for name in shapes if name not in headers]
    wrong += [
        f"{name}: in the file {list(shape)}, in the model {list(headers[name].shape)}"
        for name, shape in shapes.items()
        if name in headers and shape != headers[name].shape
    ]
    if wrong:
        shown = "\n  ".join(wrong[:NAMED]) + (f"\n  ... and {len(wrong) - NAMED} more" if len(wrong) > NAMED else "")
        raise CheckpointError(
            f"{len(wrong)} weights do not fit the model:\n  {shown}", where=str(path),
            remedy="use the base model and the streams that it was trained with; for a LoRA file use --lora",
        )  # fmt: skip
