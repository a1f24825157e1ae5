"""The three strategies keep to what every memory strategy promises."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

import tuner_offload.plugin
from tuner.testing import MemoryStrategyConformance


class TestBlockSwapConforms(MemoryStrategyConformance):
    plugin = tuner_offload.plugin
    component = "block_swap"
    options: ClassVar[Mapping[str, object]] = {"musubi_blocks_to_swap": 3}
    refused: ClassVar[list[tuple[Mapping[str, object], str]]] = [
        ({"musubi_blocks_to_swap": 4}, "musubi_blocks_to_swap"), ({"model_type": "full"}, "musubi_blocks_to_swap"),
    ]  # fmt: skip


class TestGroupOffloadConforms(MemoryStrategyConformance):
    plugin = tuner_offload.plugin
    component = "group_offload"
    options: ClassVar[Mapping[str, object]] = {"enable_group_offload": True, "group_offload_use_stream": True}
    refused: ClassVar[list[tuple[Mapping[str, object], str]]] = [
        ({"group_offload_blocks_per_group": 5}, "group_offload_blocks_per_group"), ({"model_type": "full"}, "enable_group_offload"),
    ]  # fmt: skip


class TestGroupsOfTwoOnDiskConform(MemoryStrategyConformance):
    plugin = tuner_offload.plugin
    component = "group_offload"
    options: ClassVar[Mapping[str, object]] = {"enable_group_offload": True, "group_offload_blocks_per_group": 2}
    copies = False

    @pytest.fixture(autouse=True)
    def on_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(self), "options", {**self.options, "group_offload_to_disk_path": str(tmp_path)})


class TestRamTorchConforms(MemoryStrategyConformance):
    """Layers of 64 KiB, the smallest that are streamed."""

    plugin = tuner_offload.plugin
    component = "ramtorch"
    options: ClassVar[Mapping[str, object]] = {"ramtorch": True, "ramtorch_transformer_percent": 75, "tiny_width": 128}
    refused: ClassVar[list[tuple[Mapping[str, object], str]]] = [({"model_type": "full"}, "ramtorch")]
