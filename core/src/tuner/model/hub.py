"""A hub repository at one commit: what it holds, its files on this disk, or their headers alone.

Special here: a revision becomes a commit before anything is downloaded, so a branch that moves meanwhile mixes nothing; without a
network the cache answers; and a plan that is only looked at gets the header of each weight file, in a sparse file of the full length,
so that it is checked like the file itself.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from tuner.errors import CheckpointError, DiskError, HubError, TunerError

log = logging.getLogger(__name__)
T = TypeVar("T")
_NETWORK_ERRORS: tuple[type[Exception], ...] = (OfflineModeIsEnabled, LocalEntryNotFoundError, OSError, *HfHubHTTPError.__bases__)
"""Whatever HTTP library the hub's client uses, the errors of a connection descend from a base of `HfHubHTTPError`."""
_SPARE_BYTES: Final = 2**30
_SMALL: Final = ("config.json", ".index.json")
"""Ends of names of files that are downloaded even for a plan that is only looked at: kilobytes that say what the weights are."""


@dataclass(frozen=True)
class Repository:
    """What is known of a repository."""

    name: str
    commit: str
    """Empty where the cache knows none."""
    files: Mapping[str, int]
    """Path -> bytes; 0 where the hub does not say."""
    snapshot: Path | None = None
    """Its folder in the cache; set where the hub could not be asked."""
    revision: str = ""
    """What was asked for."""

    def wanted(self, heads: Sequence[str], ends: Sequence[str]) -> list[str]:
        """Files whose paths begin and end so."""
        return [file for file in self.files if file.startswith(tuple(heads)) and file.endswith(tuple(ends))]


def open_repository(name: str, revision: str = "") -> Repository:
    """Asks the hub, or the cache where there is no network. Raises `HubError`, also for a licence that was not accepted."""
    try:
        return _told(name, lambda: _online(name, revision))
    except HubError as error:
        if not isinstance(error.__cause__, _NETWORK_ERRORS) or _is_refusal(error.__cause__):
            raise
        cached = _cached(name, revision)
        if cached is None:
            raise
        log.info("the hub cannot be reached; %s is taken from the cache, commit %s", name, cached.commit)
        return cached


def fetch(repository: Repository, files: Iterable[str]) -> Path:
    """Brings files onto this disk and returns the folder that they lie in by their paths. Raises `HubError`, `DiskError`."""
    wanted = sorted(files)
    absent = [file for file in wanted if _held(repository, file) is None]
    if repository.snapshot is not None:
        if absent:
            raise HubError(
                "the hub cannot be reached, and the cache lacks files", where=repository.name, value=absent[:8],
                remedy="connect once and begin the run, or download the files elsewhere and give their path",
            )  # fmt: skip
        return repository.snapshot
    _check_space(repository, absent)
    places = [_told(repository.name, lambda file=file: _download(repository, file)) for file in wanted]  # type: ignore[misc]
    _remember(repository)
    return _root(places[0], wanted[0])


def preview(repository: Repository, files: Iterable[str], folder: Path) -> tuple[Path, str]:
    """The same without downloading weights: the folder, and what would be downloaded in words (empty: nothing).

    Files that are in the cache are used as they are. Of others only headers are read, and `folder` gets files of the full length without
    content; small configuration files are downloaded.
    """
    wanted = sorted(files)
    absent = [file for file in wanted if _held(repository, file) is None]
    if not absent or repository.snapshot is not None:
        return fetch(repository, wanted), ""
    root = folder / "snapshots" / (repository.commit or "unknown")
    for file in wanted:
        target = root / file
        target.parent.mkdir(parents=True, exist_ok=True)
        held = _held(repository, file)
        if held is None and file.endswith(_SMALL):
            held = _told(repository.name, lambda file=file: _download(repository, file))  # type: ignore[misc]
        if held is not None:
            target.symlink_to(held)
        elif file.endswith(".safetensors"):
            _write_header(repository, file, target)
        else:
            target.touch()
    return root, pending(repository, wanted)


def pending(repository: Repository, files: Iterable[str]) -> str:
    """Those of the files that `fetch` would have to download, in words; empty: none."""
    absent = [file for file in files if _held(repository, file) is None]
    size = sum(repository.files.get(file, 0) for file in absent)
    return f"{size / 1e9:.1f} GB in {len(absent)} files from {repository.name}@{repository.commit}" if absent else ""


# --- asking ------------------------------------------------------------------------------------------------------
def _online(name: str, revision: str) -> Repository:
    api = HfApi()
    info = api.model_info(name, revision=revision or None, files_metadata=True)
    if info.gated:  # its files are listed for everybody, and refused one by one
        api.auth_check(name)
    files = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    return Repository(name, info.sha or revision, files, revision=revision)


def _cached(name: str, revision: str) -> Repository | None:
    try:
        snapshot = Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    found = {file.relative_to(snapshot).as_posix(): file.stat().st_size for file in snapshot.rglob("*") if file.is_file()}
    return Repository(name, snapshot.name, found, snapshot)


def _told(repository: str, call: Callable[[], T]) -> T:
    """Runs a call to the hub and tells its failures in words."""
    try:
        return call()
    except GatedRepoError as error:
        raise HubError(
            "the repository is open only to those who accepted its licence", where=repository,
            remedy=f"accept it on https://huggingface.co/{repository}, then run `hf auth login`",
        ) from error  # fmt: skip
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise HubError(
            "there is no such repository or revision, or it is private",
            where=repository,
            remedy="check the name; `hf auth login` for a private one",
        ) from error
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise _unreachable(repository, error) from error
        raise HubError(f"the repository lacks a file: {error}", where=repository, remedy="name another revision") from error
    except HFValidationError as error:
        raise HubError(f"is no name of a repository: {str(error).splitlines()[0]}", where=repository) from error
    except _NETWORK_ERRORS as error:
        raise _unreachable(repository, error) from error


def _unreachable(repository: str, error: Exception) -> HubError:
    return HubError(
        f"the hub cannot be reached: {type(error).__name__}", where=repository,
        remedy="check the connection, or download the files elsewhere and give their path; what is in the cache is used without a network",
    )  # fmt: skip


def _is_refusal(error: BaseException | None) -> bool:
    """The hub was reached and said no."""
    return isinstance(error, GatedRepoError | RepositoryNotFoundError | RevisionNotFoundError)


# --- files -------------------------------------------------------------------------------------------------------
def _held(repository: Repository, file: str) -> Path | None:
    """Where the cache has a file of this commit."""
    if repository.snapshot is not None:
        found = repository.snapshot / file
        return found if found.is_file() else None
    cached = try_to_load_from_cache(repository.name, file, revision=repository.commit)
    return Path(cached) if isinstance(cached, str) else None


def _download(repository: Repository, file: str) -> Path:
    """One file. Where the connection breaks the hub's client goes on from where it broke, several times."""
    return Path(hf_hub_download(repository.name, file, revision=repository.commit or None))


def _check_space(repository: Repository, files: Sequence[str]) -> None:
    needed = sum(repository.files.get(file, 0) for file in files)
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed and needed + _SPARE_BYTES > free:
        raise DiskError(
            f"{needed / 1e9:.1f} GB would be downloaded, and {free / 1e9:.1f} GB are free", where=f"the hub's cache {cache}",
            remedy="free space, or set HF_HOME to a larger disk",
        )  # fmt: skip


def _remember(repository: Repository) -> None:
    """Notes in the cache which commit a branch or tag stands for, as downloading the branch would: there it is asked without a network."""
    name = repository.revision or constants.DEFAULT_REVISION
    if name == repository.commit or not repository.commit:
        return
    reference = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository.name, repo_type="model") / "refs" / name
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(repository.commit, encoding="utf-8")


def _root(place: Path, file: str) -> Path:
    """The folder of a snapshot, given a file in it and its path there."""
    return place.parents[file.count("/")]


def _write_header(repository: Repository, file: str, target: Path) -> None:
    """A file with the header of a remote one and its length, without its data."""
    known = _told(repository.name, lambda: HfApi().parse_safetensors_file_metadata(repository.name, file, revision=repository.commit))
    entries: dict[str, object] = {"__metadata__": dict(known.metadata)}
    entries |= {
        key: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": list(tensor.data_offsets)}
        for key, tensor in known.tensors.items()
    }
    header = json.dumps(entries).encode()
    data = max((tensor.data_offsets[1] for tensor in known.tensors.values()), default=0)
    with target.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + data)  # a hole, which takes no space


def newest(files: Iterable[str], pattern: str, repository: Repository) -> str:
    """The last name in order, without suffix, so that `x-1.1` comes after `x`. Raises `CheckpointError`, `HubError` where there is none."""
    ordered = sorted(files, key=lambda file: Path(file).with_suffix("").as_posix())
    if not ordered:
        raise lacks(repository, pattern)
    return ordered[-1]


def lacks(repository: Repository, pattern: str) -> TunerError:
    """The error for a file that is not there: in the cache, where that had to answer, or in the repository."""
    if repository.snapshot is not None:
        return HubError(
            "the hub cannot be reached, and the cache lacks a file", where=repository.name, value=pattern,
            remedy="connect once and begin the run, or download the file elsewhere and give its path",
        )  # fmt: skip
    return CheckpointError("the repository lacks a file", where=repository.name, value=pattern, remedy="name another revision, or a path")
