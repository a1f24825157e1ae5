"""Further adapters for samples: found, checked while planning, and put beside the trained one for a sample's time.

Special here: nothing of the model is replaced. A hook adds strength · alpha / rank · B·A·x to what a layer gives, whatever the layer is:
trained, quantized or streamed. So no trained weight is touched, and taking a hook away leaves the model as it was.

Dimensions: A (rank, in), B (out, rank).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner.config.validation_settings import ValidationSettings
from tuner.errors import CheckpointError, ConfigError, DiskError, HubError, TunerError
from tuner.interfaces.services import AdapterState
from tuner.model.hub import Repository, fetch, open_repository, pending
from tuner.train.samples.prompts import label, read_json, unused
from tuner.train.samples.wanted import CONFIG_KEY, AdapterRun, AdapterUse
from tuner.train.saving.adapter_files import check_adapter, read_adapter

if TYPE_CHECKING:
    from tuner.plugins.registry import Registry
    from tuner.train.plan import ModelPlan

LAYOUTS: Final = '{"soft": "soft.safetensors", "hard": {"path": "owner/name:hard.safetensors", "strength": 0.7}}'
REPOSITORY: Final = re.compile(r"[\w.-]+/[\w.-]+")
SPARE: Final = 6 * 2**30
"""Bytes that stay free on a device for activations and decoders; adapters that leave less stay in host memory and travel layer by layer."""


# --- what is asked for -------------------------------------------------------------------------------------------
def adapter_runs(settings: ValidationSettings) -> tuple[AdapterRun, ...]:
    """What the keys name, each to be sampled with. Raises `ConfigError`."""
    runs: list[AdapterRun] = []
    if settings.validation_adapter_path:
        use = AdapterUse(settings.validation_adapter_path, settings.validation_adapter_strength)
        runs.append(AdapterRun(_name_of(use.path), (use,)))
    config: object = settings.validation_adapter_config
    if isinstance(config, str) and config:
        config = read_json(Path(config).expanduser(), CONFIG_KEY, f"write {LAYOUTS} into it")
    for name, value in _named(config):
        uses = tuple(_uses(value, f"{CONFIG_KEY}.{name}" if name else CONFIG_KEY))
        runs.append(AdapterRun(unused(label(name) if name else _name_of(uses[0].path), [run.name for run in runs]), uses))
    return tuple(runs)


def _named(config: object) -> Iterator[tuple[str, object]]:
    """(name, run) of an object, of a list, or of an object with such a list under `runs`."""
    if isinstance(config, Mapping) and set(config) == {"runs"}:
        config = config["runs"]
    if isinstance(config, Mapping):
        yield from ((str(name), value) for name, value in config.items())
    elif isinstance(config, list):
        for value in config:
            named = value if isinstance(value, Mapping) else {}
            yield str(named.get("label") or named.get("name") or ""), value
    elif config:
        raise ConfigError("must be an object or a list", where=CONFIG_KEY, value=config, remedy=f"for example {LAYOUTS}")


def _uses(value: object, where: str) -> Iterator[AdapterUse]:
    """Of one run: a path, an object with `path` and `strength`, or several of these as a list or under `adapters`."""
    if isinstance(value, str) and value:
        yield AdapterUse(value, key=where)
    elif isinstance(value, list) and value:
        for one in value:
            yield from _uses(one, where)
    elif isinstance(value, Mapping):
        yield from _described(value, where)
    else:
        raise ConfigError("must be a path, an object with `path`, or a list of these", where=where, value=value, remedy=f"as in {LAYOUTS}")


def _described(value: Mapping[str, object], where: str) -> Iterator[AdapterUse]:
    unknown = sorted(set(value) - {"label", "name", "path", "strength", "adapters"})
    if unknown:
        raise ConfigError(f"unknown key {unknown[0]!r}", where=where, remedy="known: path, strength, adapters, label")
    if ("path" in value) == ("adapters" in value):
        raise ConfigError("needs either `path` or `adapters`", where=where, value=dict(value), remedy=f"as in {LAYOUTS}")
    if "adapters" in value:
        if "strength" in value:
            raise ConfigError("`strength` belongs to each of `adapters`", where=where, value=value["strength"])
        yield from _uses(value["adapters"] if isinstance(value["adapters"], list) else [value["adapters"]], where)
        return
    path, strength = value["path"], value.get("strength", 1.0)
    if not isinstance(path, str) or not path:
        raise ConfigError("must be text", where=f"{where}.path", value=path)
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not abs(strength) <= sys.float_info.max:
        raise ConfigError("must be a finite number", where=f"{where}.strength", value=strength)
    yield AdapterUse(path, float(strength), where)


def _name_of(path: str) -> str:
    """The file's name without suffix, else the repository's or folder's."""
    return label(Path(path.rpartition(":")[2]).stem)


# --- where it is -------------------------------------------------------------------------------------------------
def locate_adapter(path: str, key: str, *, preview: bool = False) -> Path | None:
    """The file or folder on this disk; from the hub it is downloaded. None: it is not here yet, and `preview` downloads nothing.

    Raises `ConfigError` where neither a file nor a repository can be meant, `HubError`.
    """
    here = Path(path).expanduser()
    if here.exists():
        return here
    place, _, name = path.partition(":")
    folder = Path(place).expanduser()
    if folder.is_dir() and name:
        if (folder / name).is_file():
            return folder / name
        raise ConfigError("there is no such file in that folder", where=key, value=path, remedy=_files_in(folder))
    if not REPOSITORY.fullmatch(place) or place.endswith(".safetensors"):
        raise ConfigError("there is no such file or folder", where=key, value=path, remedy="on the hub it would be owner/name:file")
    return _from_hub(place, name, key, preview=preview)


def _files_in(folder: Path) -> str:
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    return f"it holds {', '.join(files[:8])}" if files else "it holds no .safetensors file"


def _from_hub(repository: str, name: str, key: str, *, preview: bool) -> Path | None:
    try:
        found = open_repository(repository)
        name = name or _only_file(found, key)
        if name not in found.files and found.snapshot is not None:
            raise HubError("the hub cannot be reached, and the file is not in its cache", value=name)
        if name not in found.files:
            remedy = f"write {repository}:FILE with one of: {_weights_in(found)}"
            raise HubError("the repository has no such file", value=name, remedy=remedy)
        if preview and pending(found, [name]):
            return None
        return fetch(found, [name]) / name
    except HubError as error:
        raise HubError(error.message, where=f"{key}: {repository}", value=error.value, remedy=error.remedy) from error


def _only_file(repository: Repository, key: str) -> str:
    files = repository.wanted([""], [".safetensors"])
    if len(files) != 1:
        raise ConfigError(
            f"the repository has {len(files)} .safetensors files", where=key, value=repository.name,
            remedy=f"write {repository.name}:FILE with one of: {_weights_in(repository)}",
        )  # fmt: skip
    return files[0]


def _weights_in(repository: Repository) -> str:
    return ", ".join(sorted(repository.wanted([""], [".safetensors"]))[:8]) or "none"


@dataclass(frozen=True)
class Checked:
    """What became of the adapters that are asked for."""

    runs: tuple[AdapterRun, ...]
    """With the places of those that are on this disk."""
    problems: tuple[TunerError, ...]
    """What does not fit the model."""
    downloads: tuple[str, ...]
    """What would have to be downloaded."""


def check_runs(model: ModelPlan, runs: Sequence[AdapterRun], *, preview: bool) -> Checked:
    """Finds the files and reads them, each once; unless `preview` they are downloaded."""
    headers = model.source.headers("transformer")
    problems: list[TunerError] = []
    places: dict[str, Path | None] = {}
    for use in {use.path: use for run in runs for use in run.uses}.values():
        try:
            places[use.path] = path = locate_adapter(use.path, use.key, preview=preview)
            if path is not None:
                check_adapter(read_adapter(model.registry, path), headers, f"{use.key}: {use.path}")
        except (ConfigError, CheckpointError, HubError, DiskError) as error:
            problems.append(error)
    placed = tuple(replace(run, uses=tuple(replace(use, place=places.get(use.path)) for use in run.uses)) for run in runs)
    return Checked(placed, tuple(problems), tuple(f"adapter {path}" for path, place in places.items() if place is None))


# --- at work -----------------------------------------------------------------------------------------------------
@contextmanager
def beside(model: nn.Module, registry: Registry, run: AdapterRun | None, device: torch.device) -> Iterator[None]:
    """Inside, the layers that the adapters of `run` name give their share too. Raises `CheckpointError`, `HubError`, `ConfigError`.

    Layers that the model was loaded without, such as those of sound, are passed over.
    """
    with ExitStack() as stack:
        for use in run.uses if run is not None else ():
            path = use.place or locate_adapter(use.path, use.key)
            assert path is not None
            if use.strength:
                stack.enter_context(added(model, read_adapter(registry, path), use.strength, device))
        yield


@contextmanager
def added(model: nn.Module, adapter: AdapterState, strength: float, device: torch.device) -> Iterator[None]:
    """The same for one adapter in memory."""
    layers = dict(model.named_modules())
    fitting = {name: pair for name, pair in adapter.weights.items() if name in layers}
    resident = _fits(fitting, device)
    scale = strength * adapter.alpha / adapter.rank
    handles = []
    try:
        for name, (down, up) in fitting.items():
            pair = (down.to(device), up.to(device)) if resident else (down, up)
            handles.append(layers[name].register_forward_hook(_Share(*pair, scale)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fits(weights: Mapping[str, tuple[Tensor, Tensor]], device: torch.device) -> bool:
    """Whether they can lie on the device beside the model."""
    if device.type != "cuda":
        return True
    size = sum(tensor.numel() * tensor.element_size() for pair in weights.values() for tensor in pair)
    return size + SPARE <= torch.cuda.mem_get_info(device)[0]


@dataclass(frozen=True)
class _Share:
    """Adds scale · B·A·x to a layer's result."""

    down: Tensor
    up: Tensor
    scale: float

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        given = inputs[0].to(output.dtype)
        down, up = (tensor.to(given.device, given.dtype, non_blocking=True) for tensor in (self.down, self.up))
        return output + functional.linear(functional.linear(given, down), up) * self.scale
