"""LTX-2.5 as it is published: the transformer, the video VAE, the audio VAE with vocoder, and the text encoder in one file each.

Special here: only the transformer's file is named; the others are found beside it, in the layout of the repository (`diffusion_models`,
`vae`, `text_encoders`) or in the same folder. The text encoder's file also holds the connectors' first layers. A part that is
not found is an error that says which file would hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Final

from tuner.errors import CheckpointError
from tuner.interfaces.services import Loader, WeightSource
from tuner.model.stored import StoredFile, StoredTensor, read_header
from tuner_ltxvideo2.keys import DIFFUSION_DECODER, PROJECTION_PREFIX
from tuner_ltxvideo2.loading import TOKENIZER_KEY, StoredWeights, check_complete, is_transformer_file, place_files
from tuner_ltxvideo2.variants import FAMILY, variant_of

_FOLDERS: Final = ("diffusion_models", "vae", "text_encoders", "text_encoder", "")
_SUFFIXES: Final = (".safetensors", ".sft")
_VIDEO_HEADS: Final = ("encoder.", "decoder.", "per_channel_statistics.")
_ANCHOR: Final = "encoder.conv_in.conv.weight"


class SplitFiles(Loader):
    """The file of a transformer alone, or a folder with it; the other networks beside it."""

    families: ClassVar[tuple[str, ...]] = (FAMILY,)

    def accepts(self, location: Path) -> bool:
        return bool(_transformers(location))

    def open(self, location: Path, description: str) -> WeightSource:
        found = _transformers(location)
        if len(found) != 1:
            raise CheckpointError(
                "the folder holds several transformers", where="pretrained_model_name_or_path", value=[file.path.name for file in found],
                remedy="give the path of one; the other files are found beside it",
            )  # fmt: skip
        files = _assemble(found[0])
        metadata, index = place_files([_own_keys(role, file) for role, file in files.items()])
        text_encoder = files["text projection"].path if "text projection" in files else None
        source = SplitWeights(found[0].path, description, metadata, index, text_encoder)
        check_complete(source, variant_of(source))
        return source


class SplitWeights(StoredWeights):
    """Weights of several files; the text encoder's file stands for its folder."""

    def __init__(
        self,
        location: Path,
        description: str,
        metadata: Mapping[str, object],
        index: Mapping[str, Mapping[str, StoredTensor]],
        text_encoder: Path | None,
    ) -> None:
        super().__init__(location, description, metadata, index)
        self._text_encoder = text_encoder

    def folder(self, part: str) -> Path | None:
        if self._text_encoder is not None:
            if part == "text_encoder":
                return self._text_encoder
            if part == "tokenizer" and TOKENIZER_KEY in read_header(self._text_encoder).tensors:
                return self._text_encoder
        return super().folder(part)


# --- which file holds what ---------------------------------------------------------------------------------------
def _is_video(file: StoredFile) -> bool:
    return f"vae.{_ANCHOR}" in file.tensors or (_ANCHOR in file.tensors and '"vae"' in file.metadata.get("config", ""))


def _is_sound(file: StoredFile) -> bool:
    return f"audio_vae.{_ANCHOR}" in file.tensors


def _is_projection(file: StoredFile) -> bool:
    return any(key.startswith(PROJECTION_PREFIX) for key in file.tensors)


_ROLES: Final[Mapping[str, tuple[Callable[[StoredFile], bool], str]]] = {
    "video VAE": (_is_video, "ltx-2.5-video-vae-conv-bf16.safetensors (folder vae)"),
    "audio VAE and vocoder": (_is_sound, "ltx-2.5-audio-vae-bf16.safetensors (folder vae)"),
    "text projection": (_is_projection, "gemma4-12b-with-proj-ltx-2.5-bf16.safetensors (folder text_encoders), the text encoder"),
}


def _transformers(location: Path) -> list[StoredFile]:
    """Files that hold a transformer and nothing else that a combined file has."""
    if location.is_file():
        candidates = [location]
    else:
        candidates = [file for name in ("", "diffusion_models") for file in sorted((location / name).glob("*.safetensors"))]
    return [file for file in _headers(candidates) if is_transformer_file(file.tensors) and not (_is_video(file) or _is_sound(file))]


def _assemble(transformer: StoredFile) -> dict[str, StoredFile]:
    """What is found for each role, the transformer first. Raises `CheckpointError` for what is not found, or found twice."""
    files = {"transformer": transformer}
    nearby = _headers(_nearby(transformer.path))
    missing = []
    for role, (fits, published) in _ROLES.items():
        if role == "text projection" and _is_projection(transformer):
            continue
        fitting = _preferred([file for file in nearby if fits(file) and file.path != transformer.path], transformer)
        if not fitting:
            missing.append(f"{role}: {published}")
        elif len(fitting) > 1:
            raise CheckpointError(
                f"more than one file beside the transformer holds the {role}", where=transformer.path.name,
                value=[file.path.name for file in fitting], remedy="keep one of them there",
            )  # fmt: skip
        else:
            files[role] = fitting[0]
    if missing:
        raise CheckpointError(
            "this file holds the transformer alone, and beside it these are missing:\n  " + "\n  ".join(missing),
            where=transformer.path.name, remedy="download them into the same folder, or into the folders of the repository",
        )  # fmt: skip
    return files


def _preferred(fitting: Sequence[StoredFile], transformer: StoredFile) -> list[StoredFile]:
    """Of the same version, where any are; of two video VAEs the one whose decoder makes pictures here; bfloat16 before quantized ones."""
    version = transformer.metadata.get("model_version")
    for better in (
        lambda file: file.metadata.get("model_version") == version,
        lambda file: DIFFUSION_DECODER.removeprefix("vae.") not in file.tensors and DIFFUSION_DECODER not in file.tensors,
        lambda file: not any(key.endswith(("weight_scale", "comfy_quant")) for key in file.tensors),
    ):
        fitting = [file for file in fitting if better(file)] or fitting
    return list(fitting)


def _nearby(file: Path) -> list[Path]:
    """Checkpoint files in the folder of `file` and, where that is one of the repository's folders, in the others of it."""
    root = file.parent.parent if file.parent.name in _FOLDERS else file.parent
    folders = dict.fromkeys([file.parent, *(root / name for name in _FOLDERS if name)])
    return [found for folder in folders if folder.is_dir() for found in sorted(folder.iterdir()) if found.suffix in _SUFFIXES]


def _headers(files: Sequence[Path]) -> list[StoredFile]:
    return [read_header(file) for file in files if file.is_file() and file.suffix in _SUFFIXES]


def _own_keys(role: str, file: StoredFile) -> StoredFile:
    """The part of a file that belongs to the checkpoint, under the names of a combined one."""
    if role == "text projection":
        return replace(file, tensors={key: tensor for key, tensor in file.tensors.items() if key.startswith(PROJECTION_PREFIX)})
    if role == "video VAE" and _ANCHOR in file.tensors:
        return replace(file, tensors={f"vae.{k}" if k.startswith(_VIDEO_HEADS) else k: tensor for k, tensor in file.tensors.items()})
    return file
