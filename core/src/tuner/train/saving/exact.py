"""When a run may be continued: what decides the numbers of a step must be what it was, else the differences are named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tuner.config.masking import is_secret
from tuner.errors import CheckpointError

_ABSENT = object()


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], ignore: frozenset[str] = frozenset()) -> list[str]:
    """A line for each fact that differs, such as `settings.seed: 1 in the checkpoint, 2 now`.

    Nested facts are named with dots; `ignore` names facts, whole branches included. Secrets are named, not shown.
    """
    return list(_compare(saved, current, ignore, ""))


def _compare(saved: Any, current: Any, ignore: frozenset[str], name: str) -> Iterator[str]:
    if name in ignore:
        return
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in [*saved, *(key for key in current if key not in saved)]:
            yield from _compare(saved.get(key, _ABSENT), current.get(key, _ABSENT), ignore, f"{name}.{key}" if name else str(key))
    elif not _same(saved, current):
        yield f"{name}: differs" if is_secret(name) else f"{name}: {_shown(saved)} in the checkpoint, {_shown(current)} now"


def _same(saved: Any, current: Any) -> bool:
    """Equality as JSON sees it: tuples are lists, NaN is NaN, true is not 1."""
    if isinstance(saved, list | tuple) and isinstance(current, list | tuple):
        return len(saved) == len(current) and all(_same(a, b) for a, b in zip(saved, current, strict=True))
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        return saved.keys() == current.keys() and all(_same(saved[key], current[key]) for key in saved)
    if isinstance(saved, bool) != isinstance(current, bool):
        return False
    return bool(saved == current) or (saved != saved and current != current)


def _shown(value: Any) -> str:
    text = "absent" if value is _ABSENT else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def require_exact(saved: Mapping[str, Any], current: Mapping[str, Any], ignore: frozenset[str] = frozenset(), *, where: str = "") -> None:
    """Raises `CheckpointError` listing the differences, if there are any. `where`: the checkpoint."""
    found = differences(saved, current, ignore)
    if found:
        raise CheckpointError(
            "the run cannot be continued exactly, because these differ:\n  " + "\n  ".join(found), where=where,
            remedy="set them as they were, or start anew in another output_dir",
        )
