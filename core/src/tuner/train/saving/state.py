"""Optimizer states as named tensors and JSON, without pickle.

Containers become tagged objects, so that int keys, tuples and tensors come back as what they were:

    {"dict": [[key, value], ...]}   {"list": [...]}   {"tuple": [...]}   {"tensor": name}   {"dtype": "float32"}
    {"subclass": "module:Class", "inner": {attribute: value}, "context": value, "size": [...], "stride": [...]}

The last is a wrapper tensor (torchao's 8-bit states and the like), taken apart and put together by its own
`__tensor_flatten__` and `__tensor_unflatten__`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tuner.errors import CheckpointError

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

TRUSTED_PACKAGES = frozenset({"torch", "torchao"})
"""Whose tensor classes a file may name. A file must not be able to have any other module imported."""


def flatten_state(state: Mapping[Any, Any]) -> tuple[dict[str, Tensor], JSON]:
    """Splits a state dict (nested dicts, lists, tuples, scalars, tensors) into tensors by name and a JSON description.

    The tensors are detached, not copied. Raises TypeError for anything else inside: it could not come back exactly.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _describe(state, "", tensors)


def _describe(value: Any, name: str, tensors: dict[str, Tensor]) -> JSON:
    if isinstance(value, Tensor):
        return _describe_tensor(value, name, tensors)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {"dict": [[_key(key), _describe(inner, _join(name, key), tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_describe(inner, _join(name, index), tensors) for index, inner in enumerate(value)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise TypeError(f"{name}: {type(value).__name__} cannot be saved without pickle")


def _describe_tensor(value: Tensor, name: str, tensors: dict[str, Tensor]) -> JSON:
    if type(value) in (Tensor, nn.Parameter):
        unique = name
        while unique in tensors:  # keys that themselves contain the separator
            unique += "'"
        tensors[unique] = value.detach()
        return {"tensor": unique}
    kind: Any = type(value)
    if not hasattr(value, "__tensor_flatten__") or kind.__module__.partition(".")[0] not in TRUSTED_PACKAGES:
        raise TypeError(f"{name}: a tensor of class {kind.__module__}.{kind.__qualname__} cannot be saved without pickle")
    attributes, context = value.__tensor_flatten__()
    return {
        "subclass": f"{kind.__module__}:{kind.__qualname__}",
        "inner": {attribute: _describe(getattr(value, attribute), _join(name, attribute), tensors) for attribute in attributes},
        "context": _describe(context, _join(name, "context"), tensors),
        "size": list(value.shape),
        "stride": list(value.stride()),
    }


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _key(key: object) -> JSON:
    if key is None or isinstance(key, bool | int | str):
        return key
    raise TypeError(f"a key of type {type(key).__name__} cannot be saved without pickle")


def restore_state(tensors: Mapping[str, Tensor], description: JSON) -> Any:
    """Inverse of `flatten_state`. Raises `CheckpointError` where the two do not belong together."""
    if not isinstance(description, dict):
        return description
    try:
        return _restore(tensors, description)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the saved state cannot be put together: {error}", remedy="resume from an earlier checkpoint") from error


def _restore(tensors: Mapping[str, Tensor], description: Any) -> Any:
    if not isinstance(description, dict):
        return description
    if "dict" in description:
        return {key: _restore(tensors, inner) for key, inner in description["dict"]}
    if "list" in description:
        return [_restore(tensors, inner) for inner in description["list"]]
    if "tuple" in description:
        return tuple(_restore(tensors, inner) for inner in description["tuple"])
    if "tensor" in description:
        return tensors[description["tensor"]]
    if "dtype" in description:
        return _dtype(description["dtype"])
    if "subclass" in description:
        inner = {attribute: _restore(tensors, part) for attribute, part in description["inner"].items()}
        context = _restore(tensors, description["context"])
        return _tensor_class(description["subclass"]).__tensor_unflatten__(
            inner, context, torch.Size(description["size"]), tuple(description["stride"])
        )
    raise ValueError(f"unknown entry {sorted(description)}")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return found


def _tensor_class(location: str) -> Any:
    """The class named by `module:Class`; only tensor classes of trusted packages."""
    module_name, _, name = location.partition(":")
    if module_name.partition(".")[0] not in TRUSTED_PACKAGES:
        raise ValueError(f"{location} is not from one of {', '.join(sorted(TRUSTED_PACKAGES))}")
    try:
        module = sys.modules.get(module_name) or importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{location} cannot be imported: {error}") from error
    found = getattr(module, name)
    if not (isinstance(found, type) and issubclass(found, Tensor) and hasattr(found, "__tensor_unflatten__")):
        raise ValueError(f"{location} is no wrapper tensor")
    return found
