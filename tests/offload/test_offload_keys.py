"""This version recognises the keys of memory strategies: they never change a result, so they are notices."""

from __future__ import annotations

import pytest

from tuner.config.resolve import resolve
from tuner.config.vocabulary import Vocabulary
from tuner.plugins.loader import load_plugins
from tuner_offload import plugin

REQUESTS = {
    "enable_group_offload": True, "group_offload_type": "leaf_level", "group_offload_blocks_per_group": 2, "group_offload_use_stream": True,
    "group_offload_to_disk_path": "disk", "group_offload_text_encoder": True, "group_offload_vae": True, "musubi_blocks_to_swap": 12,
    "musubi_block_swap_device": "cpu:0", "ramtorch": True, "ramtorch_text_encoder": True, "ramtorch_vae": True,
    "ramtorch_target_modules": "*.attn*", "ramtorch_transformer_percent": 50, "ramtorch_text_encoder_percent": 50,
    "offload_during_startup": True,
}  # fmt: skip


def test_the_requests_above_are_all_keys():
    assert set(Vocabulary(plugin.tuner_register_options()).keys) == set(REQUESTS)


@pytest.mark.parametrize("key", REQUESTS)
def test_each_request_is_a_notice_with_its_reason(key):
    found = resolve(plugin.tuner_register_options(), flags={key: REQUESTS[key]})
    assert len(found.notices) == 1
    assert found.notices[0].startswith(f"{key}: ") and "has no effect: " in found.notices[0]


def test_the_published_group_offload_configuration_runs():
    flags = {
        "enable_group_offload": True, "group_offload_type": "block_level", "group_offload_blocks_per_group": 1,
        "group_offload_use_stream": True,
    }  # fmt: skip
    found = resolve(load_plugins({"TUNER_PLUGINS": "offload"}).option_types, flags=flags)
    assert [notice.partition(":")[0] for notice in found.notices] == ["enable_group_offload", "group_offload_use_stream"]


def test_defaults_say_nothing():
    assert resolve(plugin.tuner_register_options()).notices == ()
