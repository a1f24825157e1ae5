"""Components by name, the hooks of a run, and what `tuner plugins` says about it all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from tuner.component import Component
from tuner.config.options import Options
from tuner.errors import ConfigError, PluginError
from tuner.hookspecs import hookimpl
from tuner.plugins import report
from tuner.plugins.loader import load_plugins
from tuner.plugins.registry import Registry


def load(**plugins: object) -> Registry:
    return load_plugins({"TUNER_PLUGINS": ",".join(plugins) or "builtins"}, list(plugins.items()))


def family(name: str, factory: str = "collections:OrderedDict") -> Component:
    return Component(name, "for a test", Options, factory)


def families(*components: Component) -> SimpleNamespace:
    return SimpleNamespace(tuner_register_families=hookimpl(lambda: list(components)))


def broken(*components: Component) -> SimpleNamespace:
    """Offers components and then fails."""
    plugin = families(*components)
    plugin.tuner_register_options = hookimpl(lambda: 1 / 0)
    return plugin


class TestComponentByName:
    def test_near_names_are_offered(self):
        registry = load_plugins({"TUNER_DISABLE_PLUGINS": ""}, [("zoo", families(family("tiger"), family("tapir")))])
        with pytest.raises(ConfigError, match="tiger") as caught:
            registry.component("family", "tigre")
        assert caught.value.exit_code == 2
        assert caught.value.value == "tigre"

    def test_all_are_offered_when_none_is_near(self):
        registry = load_plugins({}, [("zoo", families(family("tiger")))])
        with pytest.raises(ConfigError, match=r"there is .*tiger"):
            registry.component("family", "qqq")

    @pytest.mark.parametrize("wanted", ["lynx", "zoo"])
    def test_a_failed_plugin_that_would_have_it_is_named_with_its_reason(self, wanted):
        registry = load(zoo=broken(family("lynx")), park=families(family("lynxes")))
        with pytest.raises(PluginError, match=r"plugin zoo is not loaded \(ZeroDivisionError: division by zero\)") as caught:
            registry.component("family", wanted)
        assert caught.value.exit_code == 10

    def test_a_disabled_plugin_is_named(self):
        registry = load_plugins({"TUNER_PLUGINS": "park"}, [("zoo", families(family("lynx"))), ("park", families())])
        with pytest.raises(PluginError, match=r"plugin zoo is not loaded \(not among TUNER_PLUGINS\)"):
            registry.component("family", "lynx")

    def test_a_typing_error_stays_one_beside_a_failed_plugin(self):
        registry = load(zoo=broken(), park=families(family("tiger")))
        with pytest.raises(ConfigError, match=r"did you mean tiger\?; plugin "):
            registry.component("family", "tigre")


class TestHooksOfARun:
    def test_check_plan_collects_the_problems_of_all(self):
        """tuner_check_plan"""
        problem, raised = ConfigError("too big"), ConfigError("raised")
        plan = object()
        seen = []

        @hookimpl
        def tuner_check_plan(plan):
            seen.append(plan)
            return [problem]

        registry = load(
            a=SimpleNamespace(tuner_check_plan=tuner_check_plan),
            b=SimpleNamespace(tuner_check_plan=hookimpl(lambda: 1 / 0)),
            c=SimpleNamespace(tuner_check_plan=hookimpl(lambda: ["text"])),
            d=SimpleNamespace(tuner_check_plan=hookimpl(lambda: _raise(raised))),
            e=SimpleNamespace(tuner_check_plan=hookimpl(lambda: None)),
        )
        problems = registry.check_plan(plan)
        assert seen == [plan]
        assert problems[0] is problem and problems[3] is raised and len(problems) == 4
        assert isinstance(problems[1], PluginError) and "ZeroDivisionError" in str(problems[1]) and "plugin b" in str(problems[1])
        assert isinstance(problems[2], PluginError) and "plugin c" in str(problems[2])

    def test_events_reach_all_and_failures_are_warnings(self, caplog):
        """tuner_checkpoint_saved, tuner_run_finished"""
        heard = []
        registry = load(
            a=SimpleNamespace(tuner_checkpoint_saved=hookimpl(lambda path: 1 / 0), tuner_run_finished=hookimpl(lambda: 1 / 0)),
            b=SimpleNamespace(
                tuner_checkpoint_saved=hookimpl(lambda run, path, step: heard.append((run, path, step))),
                tuner_run_finished=hookimpl(lambda outcome: heard.append(outcome)),
            ),
        )
        run = object()
        saved = registry.checkpoint_saved(run, Path("there"), 7)
        finished = registry.run_finished(run, "finished")
        assert heard == [(run, Path("there"), 7), "finished"]
        assert saved == ("plugin a: tuner_checkpoint_saved failed: ZeroDivisionError: division by zero",)
        assert finished == ("plugin a: tuner_run_finished failed: ZeroDivisionError: division by zero",)
        assert caplog.messages == [*saved, *finished]

    def test_commands_are_added_and_do_not_replace(self):
        """tuner_register_commands"""
        mine, theirs = click.Command("hello"), click.Command("train")
        group = click.Group()
        existing = click.Command("train")
        group.add_command(existing)

        @hookimpl
        def tuner_register_commands(cli):
            cli.add_command(mine)
            cli.add_command(theirs)

        @hookimpl(specname="tuner_register_commands")
        def fails(cli):
            cli.add_command(click.Command("half"))
            raise OSError("no disk")

        registry = load(a=SimpleNamespace(tuner_register_commands=tuner_register_commands), b=SimpleNamespace(fails=fails))
        warnings = registry.add_commands(group)
        assert group.commands["hello"] is mine and group.commands["train"] is existing
        assert len(warnings) == 2 and "'train' exists already" in warnings[0] and "OSError: no disk" in warnings[1]
        assert "half" not in group.commands


class TestReport:
    def test_rows_say_what_is_provided_or_why_not(self):
        registry = load(park=families(family("tiger")), zoo=broken())
        rows = {name: (status, text) for name, _, status, text in report.rows(registry)}
        assert rows["park"] == ("loaded", "family tiger")
        assert rows["zoo"] == ("failed", "ZeroDivisionError: division by zero")

    def test_check_imports_factories_and_compares_them_with_the_interface(self):
        registry = load(park=families(
            family("absent", "no_such_module:Thing"), family("nameless", "collections:Thing"), family("number", "math:pi"),
            family("other", "collections:OrderedDict"), family("abstract", "tuner.interfaces.family:ModelFamily"),
        ))  # fmt: skip
        found = {f.subject: f.reason for f in report.check(registry) if f.plugin == "park"}
        assert found["plugin"] == ""
        assert "No module named 'no_such_module'" in found["family absent"]
        assert "has no attribute 'Thing'" in found["family nameless"]
        assert found["family number"] == "its factory cannot be called"
        assert found["family other"] == "its factory is no subclass of tuner.interfaces.family.ModelFamily"
        assert found["family abstract"].startswith("its factory does not implement adapter_targets, block_set, call_block")

    def test_a_component_names_its_plugin(self):
        registry = load(park=families(family("tiger")))
        assert report.record_named(registry, "tiger").name == "park"
        with pytest.raises(ConfigError, match=r"did you mean park\?"):
            report.record_named(registry, "prk")


def _raise(error: Exception) -> list[object]:
    raise error
