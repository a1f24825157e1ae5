"""safetensors files without their tensors: header, byte ranges, and an identity that does not read 40 GB.

Layout of the format: 8 bytes little-endian length n, n bytes of JSON (name -> dtype, shape, data_offsets), then the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tuner.errors import CheckpointError
from tuner.interfaces.services import TensorHeader

_PAGE: Final = 4096
_PAGES: Final = 64
_LARGEST_HEADER: Final = 100_000_000
"""The format's own limit, in bytes."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    key: str
    header: TensorHeader
    start: int
    """First byte in the file."""
    end: int
    """One behind the last byte."""
    scales: tuple[StoredTensor, ...] = ()
    """What it has to be multiplied by, of a quantized weight; `header` is then the weight's own."""


@dataclass(frozen=True)
class StoredFile:
    """One file's header."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path) -> StoredFile:
    """Parses the header of a safetensors file. Raises `CheckpointError` for one that is damaged or cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(_LARGEST_HEADER, size - 8):
                raise CheckpointError(
                    "this is no safetensors file, or it is cut short", where=path.name, value=f"{size} bytes", remedy="download it again"
                )
            entries: dict[str, Any] = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path.name) from error
    except ValueError as error:
        raise CheckpointError(f"the header is damaged: {error}", where=path.name, remedy="download it again") from error
    metadata = entries.pop("__metadata__", {})
    data = 8 + length
    tensors = {key: _tensor(path, key, entry, data) for key, entry in entries.items()}
    needed = max((tensor.end for tensor in tensors.values()), default=data)
    if needed > size:
        raise CheckpointError("the file is cut short", where=path.name, value=f"{size} of {needed} bytes", remedy="download it again")
    return StoredFile(path, metadata, tensors)


def _tensor(path: Path, key: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    return StoredTensor(path, key, TensorHeader(tuple(entry["shape"]), entry["dtype"]), data + start, data + end)


def fingerprint_tensors(tensors: Mapping[str, StoredTensor]) -> str:
    """sha256 over names, shapes, dtypes, the number of bytes, and 64 pages of 4 KiB spread evenly over the data.

    Two trainings of one architecture differ everywhere, so pages find them out without reading everything. Ranges count in the order of
    names, so that the same weights in one file or in shards, under either naming, have the same identity.
    """
    scales = {f"{name} {scale.key.rpartition('.')[2]}": scale for name, tensor in tensors.items() for scale in tensor.scales}
    ordered = sorted({**tensors, **scales}.items())
    digest = hashlib.sha256(json.dumps([(name, t.header.dtype, list(t.header.shape)) for name, t in ordered]).encode())
    total = sum(t.end - t.start for _, t in ordered)
    digest.update(str(total).encode())
    spots = sorted({index * max(0, total - _PAGE) // (_PAGES - 1) for index in range(_PAGES)})
    begin = 0
    for _, tensor in ordered:
        size = tensor.end - tensor.start
        here = [spot - begin for spot in spots if begin <= spot < begin + size]
        if here:
            with tensor.file.open("rb") as file:
                for offset in here:
                    file.seek(tensor.start + offset)
                    digest.update(file.read(min(_PAGE, size - offset)))
        begin += size
    for _, scale in sorted(scales.items()):  # a few bytes that no page would hit, and that change a whole weight
        if scale.end - scale.start <= _PAGE:
            digest.update(read_bytes(scale))
    return digest.hexdigest()


def read_bytes(tensor: StoredTensor) -> bytes:
    """A tensor's data as it lies in its file."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.end - tensor.start)


def named(keys: Iterable[str], most: int = 8) -> str:
    """The first keys in order, and how many more there are: for errors."""
    ordered = sorted(keys)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those that an index lists, or the single one; a file itself. Raises `CheckpointError`."""
    if folder.is_file():
        return [folder]
    for stem in ("model", "diffusion_pytorch_model"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise CheckpointError("shards are missing", where=folder.name, value=missing[:8], remedy="download the folder again")
            return [folder / name for name in names]
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    raise CheckpointError(
        "the folder holds no safetensors weights", where=folder.name, remedy="download it again; pickled weights are not read"
    )
