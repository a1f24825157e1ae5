"""The keys of memory strategies: which ones switch a strategy on, and what they allow; published configurations are taken as they are."""

from __future__ import annotations

import pytest

from tuner.config.resolve import resolve
from tuner.errors import ConfigError
from tuner.plugins.loader import load_plugins
from tuner_offload import plugin
from tuner_offload.options import BlockSwapOptions, GroupOffloadOptions, RamTorchOptions, StartupOptions

COMPONENTS = {component.name: component for component in plugin.tuner_register_memory_strategies()}
TYPES = [*plugin.tuner_register_options(), *(component.options for component in COMPONENTS.values())]

SWITCHES = {
    "enable_group_offload": GroupOffloadOptions, "group_offload_text_encoder": GroupOffloadOptions,
    "group_offload_vae": GroupOffloadOptions,
    "musubi_blocks_to_swap": BlockSwapOptions, "ramtorch": RamTorchOptions, "ramtorch_text_encoder": RamTorchOptions,
    "ramtorch_vae": RamTorchOptions,
}  # fmt: skip
SETTINGS = {
    "group_offload_type": "leaf_level", "group_offload_blocks_per_group": "2", "group_offload_use_stream": "true",
    "group_offload_to_disk_path": "disk", "musubi_block_swap_device": "cpu:0", "ramtorch_target_modules": "*.attn*",
    "ramtorch_transformer_percent": "50", "ramtorch_text_encoder_percent": 50, "offload_during_startup": True,
}  # fmt: skip


@pytest.mark.parametrize("key", SWITCHES)
def test_a_switch_turns_its_strategy_on_without_a_notice(key: str) -> None:
    found = resolve(TYPES, flags={key: "4" if key == "musubi_blocks_to_swap" else "true"})
    assert not found.notices
    assert [options for options in set(SWITCHES.values()) if found.get(options).enabled()] == [SWITCHES[key]]


def test_other_keys_switch_nothing_on() -> None:
    assert not resolve(TYPES, flags={}).notices
    for settings in ({}, SETTINGS):
        found = resolve(TYPES, flags=settings)
        assert not any(found.get(options).enabled() for options in SWITCHES.values())
    assert len(found.notices) == len(set(SWITCHES.values())) and all("no effect" in notice for notice in found.notices)
    assert found.get(GroupOffloadOptions).group_offload_blocks_per_group == 2 and found.get(StartupOptions).offload_during_startup


def test_values_outside_their_limits_name_the_key() -> None:
    wrong = {
        "group_offload_type": "layer_level", "group_offload_blocks_per_group": 0, "musubi_blocks_to_swap": -1,
        "ramtorch_transformer_percent": 101,
    }  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        resolve(TYPES, flags=wrong)
    assert all(key in str(raised.value) for key in wrong)


def test_the_published_group_offload_configuration_is_taken_as_it_is() -> None:
    flags = {
        "enable_group_offload": True, "group_offload_type": "block_level", "group_offload_blocks_per_group": 1,
        "group_offload_use_stream": True,
    }  # fmt: skip
    registry = load_plugins({"TUNER_PLUGINS": "offload"})
    assert not resolve(registry.option_types, flags=flags).notices
    assert {component.name for component in registry.components("memory_strategy")} == {"block_swap", "group_offload", "ramtorch"}


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_strategy_can_be_imported(name: str) -> None:
    assert COMPONENTS[name].load().name == name  # type: ignore[attr-defined]
