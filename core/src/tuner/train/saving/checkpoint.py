"""Training checkpoints: either whole and verified, or not there.

A save goes through these stages, and may be killed after any of them:

    free space checked -> `.checkpoint-N.tmp-<pid>/` written, every file synced -> manifest.json (size and sha256 of each file)
    -> COMPLETE (sha256 of the manifest) -> renamed to `checkpoint-N` -> parent synced -> read back -> older ones pruned

A folder counts only with a guard that fits its manifest and files that fit the manifest. Callers hold the run folder's lock, so
whatever a save finds with a temporary name belongs to a dead process.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuner.errors import CheckpointError, DiskError
from tuner.tensor_files import share
from tuner.train.saving.exact import differences, require_exact
from tuner.train.saving.state import JSON, flatten_state, restore_state

__all__ = [
    "JSON", "LoadedCheckpoint", "checkpoints", "differences", "find_checkpoint", "flatten_state", "load_checkpoint", "read_facts",
    "require_exact", "restore_state", "save_checkpoint", "verify_checkpoint",
]

FORMAT = 1
"""Of state.json and manifest.json; a higher number is refused."""
GUARD, MANIFEST, STATE = "COMPLETE", "manifest.json", "state.json"
HEADROOM = 4 * 2**20
"""Bytes kept free beyond the estimate: safetensors headers, JSON, the file system's own blocks."""
_FINAL = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.checkpoint-(\d+)\.(tmp|old|pruned)-\d+")
_PART_NAME = re.compile(r"\w[\w.-]*")
_log = logging.getLogger("tuner.checkpoint")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What `save_checkpoint` was given; tensors on the CPU."""

    step: int
    parts: dict[str, dict[str, Tensor]]
    facts: dict[str, JSON]


# --- saving --------------------------------------------------------------------------------------------------------
def save_checkpoint(
    folder: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, object],
    *,
    keep: int,
    extra: Callable[[Path], None] | None = None,
    extra_bytes: int = 0,
) -> Path:
    """Commits `checkpoint-<step>` inside the run folder and returns its path.

    Each part becomes `<part>.safetensors` (plain tensors on any device), `facts` go into state.json. `extra(path)` may write further
    files, about `extra_bytes` bytes. `keep`: how many intact checkpoints stay, this one always among them; 0 keeps all. One of the
    same step is replaced. Raises `DiskError` without space or when the disk returns other bytes; older checkpoints are untouched then.
    """
    final = folder / f"checkpoint-{step}"
    with _disk_errors(final, "a checkpoint cannot be written; older ones are untouched"):
        folder.mkdir(parents=True, exist_ok=True)
        _clean_leftovers(folder)
        state = json.dumps({"format": FORMAT, "step": step, "parts": sorted(parts), "facts": facts}, indent=1)
        _check_space(folder, _bytes_of(parts) + len(state) + extra_bytes)
        temporary = folder / f".{final.name}.tmp-{os.getpid()}"
        try:
            _write(temporary, parts, state, extra)
            _commit(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    with _disk_errors(folder, "the new checkpoint is safe, but an old one cannot be deleted"):
        _prune(folder, final, keep)
    return final


def _write(temporary: Path, parts: Mapping[str, Mapping[str, Tensor]], state: str, extra: Callable[[Path], None] | None) -> None:
    """Everything up to and including the guard, synced."""
    temporary.mkdir()
    if extra is not None:
        extra(temporary)
    for name, tensors in parts.items():
        path = temporary / f"{name}.safetensors"
        if not _PART_NAME.fullmatch(name) or path.exists():
            raise ValueError(f"{name!r} cannot name a part: it is no plain file name, or `extra` wrote a file of that name")
        _write_part(path, tensors)
    (temporary / STATE).write_text(state, encoding="utf-8")
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    entries = {path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files}
    (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1), encoding="utf-8")
    for path in [*files, temporary / MANIFEST]:
        _sync(path)
    (temporary / GUARD).write_text(_digest(temporary / MANIFEST) + "\n", encoding="ascii")
    for path in [temporary / GUARD, *(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
        _sync(path)


def _write_part(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file(_storable(tensors), path)
        share(path)
    except SafetensorError as error:
        # the Rust side reports a failed write by text only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of which share memory: safetensors stores nothing else."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        ready[name] = plain
    return ready


def _commit(temporary: Path, final: Path) -> None:
    """Gives the finished folder its name, reads it back, and only then drops what had that name before."""
    old = final.with_name(f".{final.name}.old-{os.getpid()}")
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    _sync(final.parent)
    try:
        verify_checkpoint(final)
    except CheckpointError as error:
        final.rename(temporary)
        if old.exists():
            old.rename(final)
        raise DiskError(
            f"the checkpoint read back differs from what was written: {error.message}", where=error.where, remedy="check the disk"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def _clean_leftovers(folder: Path) -> None:
    """Finishes what killed saves began: brings back a checkpoint whose replacement never came, deletes the rest."""
    for path in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        final = folder / f"checkpoint-{match[1]}"
        if match[2] == "old" and not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Deletes the oldest intact checkpoints beyond `keep`; renamed first, so that none is ever half there under its name."""
    intact = [path for _, path in checkpoints(folder) if path != newest and _is_whole(path)]
    for path in intact[: max(0, len(intact) - (keep - 1))] if keep else []:
        doomed = path.with_name(f".checkpoint-{_step_in(path)}.pruned-{os.getpid()}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _bytes_of(parts: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensors in parts.values() for tensor in tensors.values())


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    needed = size + size // 100 + HEADROOM
    if free < needed:
        raise DiskError(
            f"a checkpoint needs {needed} bytes and {free} are free; nothing was written, older checkpoints are untouched",
            where=str(folder),
            remedy="free some space, or lower checkpoints_total_limit",
        )


@contextmanager
def _disk_errors(place: Path, what: str) -> Iterator[None]:
    """Failures of the operating system as `DiskError`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DiskError(
            f"{what}: {error.strerror}",
            where=str(error.filename or place),
            remedy="free some space, or lower checkpoints_total_limit" if full else "check the folder and its permissions",
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- finding and loading -------------------------------------------------------------------------------------------
def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint folder by name, oldest first, verified or not.

    Of a step whose replacement was interrupted between two renames, the one that was to be replaced.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        final, leftover = _FINAL.fullmatch(path.name), _LEFTOVER.fullmatch(path.name)
        if final is not None and path.is_dir():
            found[int(final[1])] = path
        elif leftover is not None and leftover[2] == "old":
            found.setdefault(int(leftover[1]), path)
    return sorted(found.items())


def find_checkpoint(run_folder: Path, wanted: str) -> Path | None:
    """`wanted`: "latest", "checkpoint-100" (in the run folder) or a path. None: nothing was wanted, or there is none to be the latest.

    "latest" passes over damaged checkpoints with a warning. Raises `CheckpointError` when all are damaged, and when a checkpoint that
    was named is damaged or missing, so that no run begins at step 0 by mistake.
    """
    if not wanted:
        return None
    if wanted != "latest":
        path = next((path for path in (run_folder / wanted, Path(wanted)) if path.is_dir()), None)
        if path is None:
            there = ", ".join(path.name for _, path in checkpoints(run_folder)) or "none"
            raise CheckpointError(
                f"no such checkpoint; in {run_folder} there are: {there}", where="resume_from_checkpoint", value=wanted,
                remedy="name one of these, or `latest`",
            )
        verify_checkpoint(path)
        return path
    return _latest(run_folder)


def _latest(run_folder: Path) -> Path | None:
    problems: list[str] = []
    for _, path in reversed(checkpoints(run_folder)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            problems.append(f"{path.name}: {error.message}")
            _log.warning("%s is damaged and passed over: %s", path, error.message)
        else:
            return path
    if problems:
        raise CheckpointError(
            f"there are checkpoints, but none is whole: {'; '.join(problems)}", where=str(run_folder),
            remedy="restore one from a copy, or start anew in another output_dir",
        )
    return None


def read_facts(path: Path) -> dict[str, JSON]:
    """The facts of a checkpoint that `find_checkpoint` gave, without its tensors."""
    facts: dict[str, JSON] = _read_json(path / STATE)["facts"]
    return facts


def read_step(path: Path) -> int:
    """After how many steps a checkpoint that `find_checkpoint` gave was saved."""
    return int(_read_json(path / STATE)["step"])


def load_checkpoint(path: Path) -> LoadedCheckpoint:
    """Verifies and reads it. Raises `CheckpointError` naming the damaged file."""
    verify_checkpoint(path)
    state = _read_json(path / STATE)
    parts = {}
    for name in state["parts"]:
        try:
            parts[name] = load_file(path / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise _damaged(path / f"{name}.safetensors", str(error)) from error
    return LoadedCheckpoint(int(state["step"]), parts, state["facts"])


def verify_checkpoint(path: Path) -> None:
    """Reads every byte. Raises `CheckpointError` naming the first file that is missing or differs from the manifest."""
    for name, entry in _files(path).items():
        file = path / name
        if _digest(file) != entry["sha256"]:
            raise _damaged(file, "its content differs from the manifest (sha256)")


def _is_whole(path: Path) -> bool:
    """Whether guard, manifest and sizes fit, without reading the contents."""
    try:
        _files(path)
    except CheckpointError:
        return False
    return True


def _files(path: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries, once guard, manifest and the files' sizes agree."""
    manifest, guard = path / MANIFEST, path / GUARD
    for file, problem in ((guard, "it is missing, so the save was not finished"), (manifest, "it is missing")):
        if not file.is_file():
            raise _damaged(file, problem)
    if guard.read_text(encoding="ascii", errors="replace").strip() != _digest(manifest):
        raise _damaged(manifest, f"it differs from what {GUARD} says")
    entries: dict[str, dict[str, Any]] = _read_json(manifest)["files"]
    for name, entry in entries.items():
        inside = PurePosixPath(name)
        file = path / inside
        if inside.is_absolute() or ".." in inside.parts or not file.is_file():
            raise _damaged(file, "it is missing")
        if file.stat().st_size != entry["bytes"]:
            raise _damaged(file, f"it has {file.stat().st_size} bytes instead of {entry['bytes']}")
    return entries


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no JSON object")
    if content.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"written by a newer version, in format {content['format']}; known is {FORMAT}", where=str(path), remedy="update tuner"
        )
    return content


def _damaged(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{file.name} is damaged: {problem}", where=str(file), remedy="resume from another checkpoint")


def _step_in(path: Path) -> int:
    match = _FINAL.fullmatch(path.name) or _LEFTOVER.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is no checkpoint's name")
    return int(match[1])
