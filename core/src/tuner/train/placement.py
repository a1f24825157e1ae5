"""Moves batches and noise to the device, without waiting for the copy."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(value: T, device: torch.device, pin: bool = False) -> T:
    """A copy of a (nested) frozen dataclass, mapping or tuple with every tensor on `device`; `pin` pins host memory instead."""
    return _convert(value, device, pin)  # type: ignore[return-value]


def _convert(value: object, device: torch.device, pin: bool) -> object:
    if isinstance(value, Tensor):
        return value.pin_memory() if pin else value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _convert(item, device, pin) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        # Samples keep their records on the host: the batch holds what the step needs.
        changed = {f.name: _convert(getattr(value, f.name), device, pin) for f in fields(value) if f.name != "samples"}
        return replace(value, **changed)
    return value
