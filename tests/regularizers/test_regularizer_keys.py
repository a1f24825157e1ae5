"""This version recognises the keys of TREAD and CREPA: asking for either is an error, since results would differ."""

from __future__ import annotations

import json

import pytest

from tuner.config.resolve import resolve
from tuner.config.vocabulary import Vocabulary
from tuner.errors import ConfigError
from tuner.plugins.loader import load_plugins
from tuner_regularizers import plugin

ROUTES = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}


@pytest.mark.parametrize("value", [ROUTES, json.dumps(ROUTES), "config/tread.json"])
def test_tread_is_refused_with_its_reason(value):
    with pytest.raises(ConfigError, match="tread_config: is not supported: token routing is not part of this version"):
        resolve(plugin.tuner_register_options(), flags={"tread_config": value})


@pytest.mark.parametrize("value", [True, "true"])
def test_crepa_is_refused_with_its_reason(value):
    with pytest.raises(ConfigError, match="crepa_enabled: is not supported"):
        resolve(plugin.tuner_register_options(), flags={"crepa_enabled": value, "crepa_lambda": 0.4})


def test_what_is_read_only_with_crepa_is_a_notice():
    found = resolve(plugin.tuner_register_options(), flags={"crepa_enabled": False, "crepa_lambda": 0.4, "crepa_block_index": 8})
    assert found.notices == ("crepa_lambda: 0.4 has no effect: read only with crepa_enabled (--crepa_lambda)",)


def test_only_the_switches_change_results():
    keys = Vocabulary(plugin.tuner_register_options()).keys.values()
    assert {key.name for key in keys if key.changes_results} == {"tread_config", "crepa_enabled"}
    assert all(key.unsupported for key in keys)


def test_the_plugin_loads_and_defaults_say_nothing():
    registry = load_plugins({"TUNER_PLUGINS": "regularizers"})
    assert [record.status for record in registry.plugins if record.name == "regularizers"] == ["loaded"]
    assert resolve(registry.option_types).notices == ()
