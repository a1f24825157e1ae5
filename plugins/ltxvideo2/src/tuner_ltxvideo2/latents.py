"""What the encoders and decoders of pictures and sound have in common: networks of one checkpoint, on a device for a while.

Special here: where a network's weights live while it is used is asked of the run, network by network, under the part name "vae".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tuner.interfaces.family import Variant
from tuner.interfaces.memory import PartMemory, Placement
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.loading import build_part

MEMORY_PART = "vae"
"""What memory strategies call all of these networks."""


def without(half: str) -> Callable[[nn.Module], None]:
    """Takes the half of a VAE away that is not used, before its weights are read."""
    return lambda vae: delattr(vae, half)


class Networks:
    """The networks that one encoder or decoder uses, loaded from `source` in `dtype` between `load` and `unload`."""

    def __init__(self, source: WeightSource, variant: Variant, dtype: torch.dtype, memory: PartMemory | None = None) -> None:
        """`memory`: says where weights live; None: they are put on the device as they are."""
        self._source = source
        self._variant = variant
        self._dtype = dtype
        self._memory = memory
        self._device = torch.device("cpu")
        self._loaded: dict[str, Any] = {}
        self._placements: list[Placement] = []

    def load(self, device: torch.device) -> None:
        """Brings the networks onto `device`."""
        self._device = device

    def unload(self) -> None:
        """Frees them, also where loading them failed half-way."""
        while self._placements:
            self._placements.pop().close()
        self._loaded.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _open(self, part: str, prepare: Callable[[nn.Module], None] | None = None) -> Any:
        """Loads one network; `prepare` takes away what is not needed before anything is read."""
        placement = self._memory.open(MEMORY_PART, 0, self._device) if self._memory is not None else None
        if placement is not None:
            self._placements.append(placement)
        reading = placement.reading if placement is not None else self._device
        network = build_part(self._source, part, self._variant, dtype=self._dtype, device=reading, prepare=prepare)
        if placement is not None:
            placement.hold(network)
        self._loaded[part] = network
        return network

    def _network(self, part: str) -> Any:
        """A loaded one. diffusers' classes are used through attributes that nn.Module does not declare."""
        return self._loaded[part]
