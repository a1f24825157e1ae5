"""Numbers of a step, gathered on the device and read in groups: one transfer for many steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class StepMetrics:
    """Rows of device scalars (shape ()) and host numbers, per step, until `flush`."""

    rows: list[tuple[int, dict[str, Tensor], dict[str, float]]] = field(default_factory=list)

    def add(self, step: int, device: Mapping[str, Tensor], host: Mapping[str, float]) -> None:
        """Keeps a row; no synchronisation."""
        self.rows.append((step, {name: value.detach() for name, value in device.items()}, dict(host)))

    def flush(self) -> list[tuple[int, dict[str, float]]]:
        """All rows as host numbers, in order; one transfer. A loss that nothing was counted for (NaN in `loss/...`) is left out."""
        if not self.rows:
            return []
        scalars = [value.float() for _, row, _ in self.rows for value in row.values()]
        numbers = iter(torch.stack(scalars).tolist() if scalars else [])
        result = [(step, _counted({name: next(numbers) for name in row}) | host) for step, row, host in self.rows]
        self.rows.clear()
        return result


def _counted(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not (name.startswith("loss/") and math.isnan(value))}
