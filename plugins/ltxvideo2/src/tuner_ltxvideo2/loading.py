"""Reading weights: layouts, the accounting of every key, and modules built straight from the file.

Special here: nothing is read before it is asked for, and nothing is held twice. Headers are parsed by hand, because fingerprints and
reading need the byte ranges; modules are made without storage, given memory where each tensor will live, and filled from the file.

A checkpoint is accepted only when every stored key has exactly one place in the modules that its own configuration describes, and
every place has its key. What is missing or left over is named.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
from diffusers.models.modeling_utils import no_init_weights
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from diffusers.pipelines.ltx2.vocoder import UpSample1d
from torch import Tensor, nn

from tuner.errors import CheckpointError
from tuner.interfaces.family import Variant
from tuner.interfaces.memory import Placement
from tuner.interfaces.services import Loader, TensorHeader, WeightSource
from tuner.model.reading import memory_for
from tuner.model.stored import StoredFile, StoredTensor, fingerprint_tensors, named, read_header, weight_files
from tuner_ltxvideo2.keys import DIFFUSION_DECODER, PARTS, TRANSFORMER_PREFIX, is_unread, join_original, split_original, to_diffusers
from tuner_ltxvideo2.quantized import read_weights, weight_of, with_scales
from tuner_ltxvideo2.variants import FAMILY, variant_of

_CLASSES: Final[Mapping[str, type[nn.Module]]] = {
    "transformer": LTX2VideoTransformer3DModel,
    "connectors": LTX2TextConnectors,
    "vae": AutoencoderKLLTX2Video,
    "audio_vae": AutoencoderKLLTX2Audio,
    "vocoder": LTX2Vocoder,
}
TOKENIZER_KEY: Final = "tokenizer_json"
"""A text encoder in one file embeds its tokenizer.json, as a tensor of bytes."""
_BLOCKS: Final = "transformer_blocks"
_STATISTICS: Final = frozenset({"latents_mean", "latents_std"})
ENCODER_ONLY: Final = "encoder_only"
"""Among the video VAE's arguments: its decoder is of a kind that is not built here."""


class StoredWeights(WeightSource):
    """Weights in safetensors files, whatever the layout: an index of part -> module's name -> place in a file."""

    def __init__(
        self, location: Path, description: str, metadata: Mapping[str, object], index: Mapping[str, Mapping[str, StoredTensor]]
    ) -> None:
        self.location = location
        self.description = description
        self._metadata = metadata
        self._index = index

    def metadata(self) -> Mapping[str, object]:
        return self._metadata

    def parts(self) -> Sequence[str]:
        return tuple(part for part in PARTS if part in self._index)

    def headers(self, part: str) -> Mapping[str, TensorHeader]:
        return {name: stored.header for name, stored in self._part(part).items()}

    def tensors(self, part: str, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        stored = self._part(part)
        return ((name, weight_of(stored[name])) for name in (stored if names is None else names))

    def fill(self, part: str, targets: Mapping[str, Tensor]) -> None:
        stored = self._part(part)
        read_weights((stored[name], target) for name, target in targets.items())

    def fingerprint(self, part: str) -> str:
        return fingerprint_tensors(self._part(part))

    def folder(self, part: str) -> Path | None:
        root = self.location if self.location.is_dir() else self.location.parent
        found = root / part
        if found.is_dir():
            return found
        beside = root / "text_encoder"  # one folder may hold both the model and its tokenizer
        return beside if part == "tokenizer" and has_tokenizer(beside) else None

    def _part(self, part: str) -> Mapping[str, StoredTensor]:
        if part not in self._index:
            raise CheckpointError(
                f"{self.description} holds no {part}", value=list(self.parts()), remedy="give the checkpoint that holds the whole model"
            )
        return self._index[part]


class CombinedFile(Loader):
    """One .safetensors file in the published layout, or a folder that holds exactly one."""

    families: ClassVar[tuple[str, ...]] = (FAMILY,)

    def accepts(self, location: Path) -> bool:
        return bool(_combined_files(location))

    def open(self, location: Path, description: str) -> WeightSource:
        files = _combined_files(location)
        if len(files) != 1:
            raise CheckpointError(
                "the folder does not hold exactly one combined checkpoint",
                where="pretrained_model_name_or_path", value=[file.name for file in files], remedy="give the path of one .safetensors file",
            )  # fmt: skip
        source = StoredWeights(files[0], description, *place_files([read_header(files[0])]))
        check_complete(source, variant_of(source))
        return source


class DiffusersFolder(Loader):
    """A folder with `transformer/`, `connectors/`, `vae/`, ... as diffusers saves a pipeline; single files or shards.

    Where such a folder holds several transformers, one of them may be given: `.../transformer_full`.
    """

    families: ClassVar[tuple[str, ...]] = (FAMILY,)

    def accepts(self, location: Path) -> bool:
        return (location / "transformer" / "config.json").is_file() or _is_transformer(location)

    def open(self, location: Path, description: str) -> WeightSource:
        chosen = location if _is_transformer(location) else location / "transformer"
        metadata: dict[str, object] = {}
        index: dict[str, Mapping[str, StoredTensor]] = {}
        for part in PARTS:
            folder = chosen if part == "transformer" else chosen.parent / part
            if not (folder / "config.json").is_file():
                continue
            metadata[part] = _read_json(folder / "config.json")
            index[part] = _merge([with_scales(read_header(file)) for file in weight_files(folder)], part)
        source = StoredWeights(chosen.parent, description, metadata, index)
        check_complete(source, variant_of(source))
        return source


def build_part(
    source: WeightSource,
    part: str,
    variant: Variant,
    *,
    dtype: torch.dtype,
    device: torch.device,
    skip: Callable[[str], bool] | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
    placement: Placement | None = None,
) -> nn.Module:
    """The module of `part` with its weights on `device` in `dtype`, in evaluation mode, needing no gradient.

    Parameters for whose name `skip` is true are not read: they stay on the meta device, and the caller deletes their modules, or
    `prepare` does so before anything is read. With a `placement` the blocks in `transformer_blocks` are read one by one, last of
    all, onto `placement.reading`, and handed over.
    The statistics that normalise latents stay float32 in any case: they are read once per clip and cost nothing.
    Raises `CheckpointError` when a tensor that the module needs is not stored, or one that is stored has no place.
    """
    module = empty_part(part, variant)
    _check_part(_shapes(module), part, source.headers(part))
    if prepare is not None:
        prepare(module)
    wanted = [name for name in module.state_dict() if skip is None or not skip(name)]
    blocks = _by_block(wanted) if placement is not None else {}
    inside = {name for names in blocks.values() for name in names}
    _read_into(module, source, part, [name for name in wanted if name not in inside], dtype, device)
    for index, names in blocks.items():
        assert placement is not None
        block = module.get_submodule(f"{_BLOCKS}.{index}")
        placement.expect(index, block, dtype)
        _read_into(module, source, part, names, dtype, placement.reading)
        placement.received(index, block.eval().requires_grad_(False))
    if isinstance(module, LTX2VocoderWithBWE):
        # Its resampling filter is not stored: it follows from the rates, so it is made here, off the meta device.
        ratio = module.config.output_sampling_rate // module.config.input_sampling_rate
        module.resampler = UpSample1d(ratio=ratio, window_type="hann", persistent=False).to(device=device)
    return module.eval().requires_grad_(False)


def _by_block(names: Iterable[str]) -> dict[int, list[str]]:
    """Index of a block -> the names in it, in order of the blocks."""
    found: dict[int, list[str]] = {}
    for name in names:
        if name.startswith(_BLOCKS + "."):
            found.setdefault(int(name.split(".")[1]), []).append(name)
    return dict(sorted(found.items()))


def _read_into(
    module: nn.Module, source: WeightSource, part: str, names: Sequence[str], dtype: torch.dtype, device: torch.device
) -> None:
    def kept(name: str) -> torch.dtype:
        return torch.float32 if name.rpartition(".")[2] in _STATISTICS else dtype

    source.fill(part, memory_for(module, names, kept, device))


def empty_part(part: str, variant: Variant) -> nn.Module:
    """The module of `part` on the meta device: names and shapes, no storage."""
    # Initializing weights without storage computes nothing, and takes two thirds of the time that building the modules does.
    with no_init_weights():
        if part == "vocoder":  # its filters are computed as it is built, which takes seconds on the meta device; the rest is never touched
            return make_part(part, variant).to("meta")
        with torch.device("meta"):
            return make_part(part, variant)


def part_class(part: str, arguments: Mapping[str, object]) -> type[nn.Module]:
    """diffusers' class of `part`; a vocoder with a bandwidth extension has one of its own."""
    return LTX2VocoderWithBWE if part == "vocoder" and "bwe_hidden_channels" in arguments else _CLASSES[part]


def make_part(part: str, variant: Variant) -> nn.Module:
    """The module of `part` as its class initializes it, on the default device."""
    arguments: dict[str, Any] = dict(variant.config[part])
    encoder_only = arguments.pop(ENCODER_ONLY, False)
    module = part_class(part, arguments)(**arguments)
    if encoder_only:
        del module.decoder
    if part == "audio_vae":
        # diffusers sizes these by `base_channels`, which is the packed width (channels x mel) only in the released model.
        width = arguments["latent_channels"] * arguments["mel_bins"] // 4
        for name in _STATISTICS:
            module.register_buffer(name, torch.zeros(width))
    return module


def check_complete(source: WeightSource, variant: Variant) -> None:
    """Raises `CheckpointError` unless stored names and shapes are exactly those of the modules that the variant describes."""
    for part in source.parts():
        _check_part(_expected_shapes(part, json.dumps(variant.config[part], sort_keys=True)), part, source.headers(part))


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer as transformers saves it; a file: whether one is embedded in it."""
    if folder.is_file():
        return TOKENIZER_KEY in read_header(folder).tensors
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


# --- accounting --------------------------------------------------------------------------------------------------
def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@functools.lru_cache(maxsize=32)
def _expected_shapes(part: str, arguments: str) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a part built with `arguments`, as JSON. Kept: every checkpoint that is opened needs them."""
    return _shapes(empty_part(part, Variant(FAMILY, "", {part: json.loads(arguments)})))


def _check_part(needed: Mapping[str, tuple[int, ...]], part: str, headers: Mapping[str, TensorHeader]) -> None:
    wrong = [
        f"{name} is {list(headers[name].shape)}, not {list(shape)}"
        for name, shape in needed.items()
        if name in headers and tuple(headers[name].shape) != shape
    ]
    _raise_keys(
        part, missing=[name for name in needed if name not in headers], unknown=[n for n in headers if n not in needed], misshapen=wrong
    )


def _raise_keys(part: str, **problems: Sequence[str]) -> None:
    """One error for all kinds of problems with keys, each with its first names and its total; nothing when there are none."""
    told = [f"{len(keys)} {kind}: {named(keys)}" for kind, keys in problems.items() if keys]
    if told:
        raise CheckpointError(
            f"the weights do not fit the model; {'; '.join(told)}", where=part,
            remedy="download the checkpoint again; if it is complete, it is of a kind that this version does not know",
        )  # fmt: skip


def place_files(files: Sequence[StoredFile]) -> tuple[dict[str, object], dict[str, dict[str, StoredTensor]]]:
    """What published files say about themselves, and part -> module's name -> tensor, each stored key used once.

    The first file that says something about a part counts. Raises `CheckpointError` for unknown and for doubled keys.
    """
    metadata: dict[str, object] = {}
    index: dict[str, dict[str, StoredTensor]] = {}
    for file in map(with_scales, files):
        for part, table in _configuration(file).items():
            if table is not None and not metadata.get(part):
                metadata[part] = table
        if DIFFUSION_DECODER in file.tensors:
            metadata["vae"] = {**dict(_table(metadata.get("vae"))), ENCODER_ONLY: True}
        _place_original(file, index)
    return metadata, index


def _table(found: object) -> Mapping[str, object]:
    return found if isinstance(found, Mapping) else {}


def _place_original(stored: StoredFile, index: dict[str, dict[str, StoredTensor]]) -> None:
    unknown, doubled = [], []
    encoder_only = DIFFUSION_DECODER in stored.tensors
    for key, tensor in stored.tensors.items():
        if is_unread(key) or (encoder_only and key.startswith("vae.decoder.")):
            continue
        placed = split_original(key)
        if placed is None:
            unknown.append(key)
            continue
        part, original = placed
        name = to_diffusers(part, original)
        if name is None:
            continue
        if name in index.setdefault(part, {}):
            doubled.append(join_original(part, original))
        index[part][name] = tensor
    _raise_keys(stored.path.name, unknown=unknown, doubled=doubled)


def _merge(files: Iterable[StoredFile], part: str) -> dict[str, StoredTensor]:
    merged: dict[str, StoredTensor] = {}
    for file in files:
        _raise_keys(part, doubled=[key for key in file.tensors if key in merged])
        merged.update(file.tensors)
    return merged


# --- small steps -------------------------------------------------------------------------------------------------
def _combined_files(location: Path) -> list[Path]:
    files = sorted(location.glob("*.safetensors")) if location.is_dir() else [location]
    return [file for file in files if file.suffix in (".safetensors", ".sft") and file.is_file() and _is_combined(file)]


def _is_combined(file: Path) -> bool:
    keys = read_header(file).tensors
    return is_transformer_file(keys) and any(key.startswith(("vae.", "audio_vae.", "vocoder.")) for key in keys)


def is_transformer_file(keys: Iterable[str]) -> bool:
    """Whether a file with these keys holds the transformer. Adapters begin with the same prefix; they are told by their factors."""
    listed = list(keys)
    return any(key.startswith(TRANSFORMER_PREFIX) for key in listed) and not any(".lora_" in key for key in listed)


def _is_transformer(folder: Path) -> bool:
    """Whether `folder` is one network as diffusers saves it, and a transformer."""
    if not (folder / "config.json").is_file() or not (folder.parent / "connectors").is_dir():
        return False
    return _read_json(folder / "config.json").get("_class_name") == "LTX2VideoTransformer3DModel"


def _configuration(stored: StoredFile) -> dict[str, object]:
    """Part -> configuration, and `model_version`, from the file's metadata; empty where it says nothing."""
    text = stored.metadata.get("config", "{}")
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"the configuration in the metadata is damaged: {error}", where=stored.path.name) from error
    found: dict[str, object] = dict(parsed) if isinstance(parsed, dict) else {}
    if "model_version" in stored.metadata:
        found["model_version"] = stored.metadata["model_version"]
    return found


def _read_json(path: Path) -> dict[str, object]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=f"{path.parent.name}/{path.name}") from error
    return dict(parsed)


def fingerprint_folder(folder: Path) -> str:
    """Identity of a model folder as transformers saves it: its configuration and weights, never its path. One file may hold both."""
    if folder.is_file():
        stored = read_header(folder)
        told = json.dumps(sorted(stored.metadata.items()))
        return hashlib.sha256((told + fingerprint_tensors(stored.tensors)).encode()).hexdigest()
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        digest.update(fingerprint_tensors(read_header(file).tensors).encode())
    return digest.hexdigest()
