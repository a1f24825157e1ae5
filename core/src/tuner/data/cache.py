"""The cache of encoded records: one safetensors file each, named by everything that its content depends on.

An entry can therefore not go stale: a changed setting asks for another name, and switching back finds the old one. Files appear
under their name only when they are whole, so any number of processes may write the same folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import uuid
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tuner.errors import DataError, DiskError
from tuner.interfaces.encoders import Record

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Of the files; part of every key."""

Setting = str | int | float | bool


class MissingRecord(DataError):
    """An entry that is not there, or was damaged and has been removed."""


def record_key(source: Mapping[str, Setting], encoder: str, settings: Mapping[str, Setting]) -> str:
    """sha256 over canonical JSON of what is encoded, by which encoder (see `records.EncoderIdentity`), with which settings."""
    content = {"format": FORMAT_VERSION, "source": dict(source), "encoder": encoder, "settings": dict(settings)}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class RecordCache:
    """A folder of records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where `key` is kept: 256 subfolders keep listings short."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the entry is there with a sound header and the length that the header states. A damaged one is reported and removed."""
        path = self.path(key)
        if not path.is_file():
            return False
        try:
            with safe_open(str(path), framework="pt") as file:
                if "crc32" in (file.metadata() or {}):
                    return True
        except (SafetensorError, OSError) as error:
            self._drop(path, str(error))
            return False
        self._drop(path, "it has no checksum")
        return False

    def read(self, key: str) -> Record:
        """Raises `MissingRecord` when the entry is not there, or its checksum does not fit; then it is reported and removed."""
        path = self.path(key)
        try:
            content = path.read_bytes()
            tensors = load_tensors(content)
            metadata = _metadata(content)
        except FileNotFoundError:
            raise MissingRecord("this record is not in the cache", where=str(path), remedy="run `tuner cache`, or start again") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(path, str(error)) from error
        if metadata.get("crc32") != str(_checksum(tensors)):
            raise self._damaged(path, "its checksum does not fit")
        return Record(tensors, json.loads(metadata.get("facts", "{}")))

    def write(self, key: str, record: Record) -> None:
        """Atomic: temporary file in the same folder, fsync, rename. Raises `DiskError`."""
        path = self.path(key)
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in record.tensors.items()}
        metadata = {"facts": json.dumps(dict(record.facts), sort_keys=True), "crc32": str(_checksum(tensors))}
        content = save_tensors(tensors, metadata)
        temporary = path.with_name(f".{key}.{os.getpid()}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = f"free at least {len(content)} bytes there" if full else "choose another cache_dir"
            raise DiskError(f"the cache cannot be written: {error.strerror}", where=str(self.folder), remedy=remedy) from error
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _drop(self, path: Path, reason: str) -> None:
        log.warning("damaged cache entry %s is treated as missing and will be encoded anew: %s", path, reason)
        with suppress(OSError):
            path.unlink()

    def _damaged(self, path: Path, reason: str) -> MissingRecord:
        self._drop(path, reason)
        remedy = "start again: the damaged file was removed and will be encoded anew"
        return MissingRecord(f"this cache entry was damaged: {reason}", where=str(path), remedy=remedy)


def _metadata(content: bytes) -> dict[str, str]:
    """The `__metadata__` of a safetensors file: eight bytes with the header's length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over names, shapes, dtypes and bytes, in the order of names."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        value = zlib.crc32(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode(), value)
        value = zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"", value)
    return value
