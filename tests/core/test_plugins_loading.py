"""Plugins are loaded one by one, and whatever is wrong with one stays with that one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import tuner
from tuner.component import Component
from tuner.config.options import Options, option
from tuner.config.settings import CORE_OPTIONS
from tuner.errors import EnvironmentProblem, PluginError
from tuner.hookspecs import hookimpl
from tuner.plugins.loader import load_plugins
from tuner.plugins.record import KINDS, PluginRecord, registration_hook
from tuner.plugins.registry import Registry

ONLY_MINE = {"TUNER_PLUGINS": "mine,other"}


class MineOptions(Options):
    """Keys of the plugin under test."""

    title = "Mine"
    mine_strength: float = option(1.0, ge=0, help="How much.", aliases=("mine_power",))


class RivalOptions(Options):
    """Claims an alias of MineOptions."""

    title = "Rival"
    mine_power: float = option(2.0, help="The same name.")


def offering(*components: Component, hook: str = "tuner_register_optimizers", **attributes: object) -> SimpleNamespace:
    def register() -> list[Component]:
        return list(components)

    return SimpleNamespace(**{hook: hookimpl(register)}, **attributes)


def optimizer(name: str, options: type[Options] = MineOptions) -> Component:
    return Component(name, "for a test", options, "collections:OrderedDict")


def load(plugin: object, *others: tuple[str, object]) -> Registry:
    return load_plugins(ONLY_MINE, [("mine", plugin), *others])


def record(registry: Registry, name: str) -> PluginRecord:
    return next(r for r in registry.plugins if r.name == name)


@pytest.mark.parametrize("kind", KINDS)
def test_components_of_every_kind_are_found(kind):
    """tuner_register_families, _loaders, _latent_encoders, _loss_terms, _regularizers, _memory_strategies, _quantizers, _optimizers,
    _trackers and _checkpoint_formats each feed their kind."""
    registry = load(offering(optimizer("thing"), hook=registration_hook(kind)))
    assert record(registry, "mine").status == "loaded"
    assert registry.component(kind, "thing").factory == "collections:OrderedDict"
    assert MineOptions in registry.option_types
    assert registry.owner_of(MineOptions) == "mine"


def test_options_without_component_are_registered():
    registry = load(SimpleNamespace(tuner_register_options=hookimpl(lambda: [MineOptions])))
    assert registry.owner_of(MineOptions) == "mine"
    assert registry.option_types[: len(CORE_OPTIONS)] == CORE_OPTIONS
    assert registry.owner_of(CORE_OPTIONS[0]) == "core"
    with pytest.raises(KeyError):
        registry.owner_of(RivalOptions)


def test_builtins_are_there_always_and_first():
    registry = load_plugins({"TUNER_PLUGINS": "mine", "TUNER_DISABLE_PLUGINS": "builtins"}, [("mine", offering())])
    assert registry.plugins[0].name == "builtins"
    assert registry.plugins[0].distribution == "tuner-framework"
    assert {"adamw", "adamw_bf16", "adamw8bit"} <= {c.name for c in registry.components("optimizer")}
    assert "peft" in {c.name for c in registry.components("checkpoint_format")}


def test_order_is_that_of_names():
    one, two = ("b", offering(optimizer("first"))), ("a", offering(optimizer("second")))
    both = [load_plugins({"TUNER_PLUGINS": "a,b"}, pair) for pair in ([one, two], [two, one])]
    names = [[c.name for c in registry.components("optimizer")][-2:] for registry in both]
    assert names == [["second", "first"]] * 2
    assert [r.name for r in both[0].plugins if r.status == "loaded"] == ["builtins", "a", "b"]


def raising() -> list[Component]:
    raise RuntimeError("the moon is\nfull")


def unknown_hook() -> list[Component]:
    return []


def undecorated() -> list[Component]:
    return []


def wrong_argument(plane: object) -> list[object]:
    return []


BROKEN = {
    "exception in a hook": (SimpleNamespace(tuner_register_optimizers=hookimpl(raising)), "RuntimeError: the moon is full"),
    "unknown hook": (SimpleNamespace(tuner_register_optimisers=hookimpl(unknown_hook)), "unknown hook 'tuner_register_optimisers'"),
    "wrong argument": (SimpleNamespace(tuner_check_plan=hookimpl(wrong_argument)), "'plane'"),
    "no decorator": (SimpleNamespace(tuner_register_loaders=undecorated), "tuner_register_loaders lacks the decorator"),
    "other version": (offering(TUNER_HOOKSPEC_VERSION=tuner.HOOKSPEC_VERSION + 1), f"built for hook version {tuner.HOOKSPEC_VERSION + 1}"),
    "version as text": (
        offering(TUNER_HOOKSPEC_VERSION=str(tuner.HOOKSPEC_VERSION)),
        f"its TUNER_HOOKSPEC_VERSION must be the number {tuner.HOOKSPEC_VERSION}, not text (got '{tuner.HOOKSPEC_VERSION}')",
    ),
    "no list": (SimpleNamespace(tuner_register_optimizers=hookimpl(lambda: "adamw")), "must return a list, not str"),
    "no component": (SimpleNamespace(tuner_register_optimizers=hookimpl(lambda: ["adamw"])), "must return Components, not str"),
    "no options": (SimpleNamespace(tuner_register_options=hookimpl(lambda: [dict])), "no subclass of tuner.config.options.Options"),
    "name twice inside": (offering(optimizer("twin"), optimizer("twin")), "optimizer 'twin' is offered by mine already"),
    "name of a built-in": (offering(optimizer("adamw")), "optimizer 'adamw' is offered by builtins already"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_one_line(case, caplog):
    plugin, reason = BROKEN[case]
    registry = load(plugin, ("other", offering(optimizer("fine"))))
    broken = record(registry, "mine")
    assert broken.status == "failed"
    assert reason in broken.reason
    assert "\n" not in broken.reason
    assert broken.components == {} and broken.option_types == ()
    assert registry.component("optimizer", "fine").name == "fine"
    assert [r.message for r in caplog.records] == [f"plugin mine is not loaded: {broken.reason}"]


def test_nothing_of_a_failed_plugin_stays():
    """Neither its names nor its keys: a second plugin may claim them."""
    plugin = offering(optimizer("wanted"))
    plugin.tuner_register_options = hookimpl(lambda: [MineOptions, RivalOptions])
    registry = load(plugin, ("other", offering(optimizer("wanted"))))
    assert [r.status for r in registry.plugins if r.name in ("mine", "other")] == ["failed", "loaded"]
    assert registry.owner_of(MineOptions) == "other"


def options_named(name: str, declared: object, annotation: object = int) -> type[Options]:
    return type("Odd", (Options,), {"__module__": __name__, "__annotations__": {name: annotation}, name: declared})


BAD_KEYS = {
    "an alias of another plugin's key": ([MineOptions, RivalOptions], "key mine_power belongs to mine"),
    "a key of the core": ([options_named("lora_rank", option(1, help="x"))], "key lora_rank belongs to core"),
    "an alias of the core": ([options_named("family", option(1, help="x"))], "key family belongs to core"),
    "a reserved name": ([options_named("config", option(1, help="x"))], "reserved"),
    "a reserved alias": ([options_named("quiet", option(1, help="x", aliases=("debug",)))], "key debug is reserved for the command line"),
    "capitals": ([options_named("Loud", option(1, help="x"))], "lower case"),
    "no help": ([options_named("silent", 1)], "not declared with"),
    "no default": ([options_named("bare", option(..., help="x"))], "key bare in Odd has no default"),
    "a default outside its limits": (
        [options_named("low", option(0, ge=1, help="x"))], "the default 0 of low in Odd is refused: must be at least 1 -> mend",
    ),
    "a default inside a list": (
        [options_named("many", option([1, "x"], help="x"), list[int])], "of many[1] in Odd is refused: must be a whole number -> mend",
    ),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_keys_have_one_owner_and_a_declaration(case):
    offered, reason = BAD_KEYS[case]
    broken = record(load(SimpleNamespace(tuner_register_options=hookimpl(lambda: offered))), "mine")
    assert broken.status == "failed"
    assert reason in broken.reason
    assert "pydantic" not in broken.reason


@pytest.mark.filterwarnings("ignore:Field name:UserWarning")
def test_a_key_may_not_hide_what_every_option_model_has():
    broken = record(load(SimpleNamespace(tuner_register_options=hookimpl(lambda: [options_named("enabled", option(1, help="x"))]))), "mine")
    assert broken.reason == "key enabled would hide Options.enabled, which every option model has"
    other = options_named("slow", option(1, help="x", aliases=("copy",)))
    assert record(load(SimpleNamespace(tuner_register_options=hookimpl(lambda: [other]))), "mine").status == "loaded"


def test_for_another_hook_version_both_ways_out_are_named():
    there, here = tuner.HOOKSPEC_VERSION + 1, tuner.HOOKSPEC_VERSION
    broken = record(load(offering(TUNER_HOOKSPEC_VERSION=there)), "mine")
    assert broken.reason.endswith(
        f"-> install a version of the plugin made for hook version {here}, or a tuner-framework with hook version {there}"
    )


def distribution(folder: Path, name: str, entry_points: str, requires: tuple[str, ...] = (), extras: tuple[str, ...] = ()) -> None:
    """As pip would leave it, in version 3.1."""
    info = folder / f"{name.replace('-', '_')}-3.1.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 3.1", *(f"Provides-Extra: {extra}" for extra in extras),
             *(f"Requires-Dist: {line}" for line in requires)]  # fmt: skip
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "entry_points.txt").write_text(f"[tuner]\n{entry_points}\n")


def test_two_plugins_may_not_share_a_name(tmp_path, monkeypatch):
    for name in ("tuner-moon", "tuner-dusk"):
        distribution(tmp_path, name, "mine = collections")
    monkeypatch.syspath_prepend(tmp_path)
    registry = load_plugins(ONLY_MINE, [("mine", offering())])
    words = "a module given directly and tuner-{} 3.1 both offer a plugin named 'mine'; the first is taken -> remove one of them"
    assert [(r.status, r.reason) for r in registry.plugins[1:] if r.name == "mine"] == [
        ("loaded", ""), ("failed", words.format("dusk")), ("failed", words.format("moon")),
    ]
    reasons = [r.reason for r in load_plugins(ONLY_MINE).plugins if r.name == "mine"]
    assert reasons[1].startswith("tuner-dusk 3.1 and tuner-moon 3.1 both offer")


PLUGIN = """
from tuner.component import Component
from tuner.config.options import Options
from tuner.hookspecs import hookimpl
@hookimpl
def tuner_register_optimizers():
    return [
        Component("plain", "x", Options, "moon_parts.plain:Thing"), Component("more", "x", Options, "moon_parts.more:Thing", extra="more"),
        Component("unsaid", "x", Options, "moon_parts.unsaid:Thing"), Component("lost", "x", Options, "moon_parts.lost:Thing"),
        Component("bug", "x", Options, "moon_parts.bug:Thing"), Component("quits", "x", Options, "moon_parts.quits:Thing"),
        Component("says", "x", Options, "moon_parts.says:Thing"),
    ]
"""
PARTS = {
    "plain": "import made_up_library", "more": "import made_up_extra", "unsaid": "import made_up_secret", "bug": "int('x')",
    "quits": "raise SystemExit('no licence')",
    "says": "from tuner.errors import EnvironmentProblem\nraise EnvironmentProblem('needs a moon')", "__init__": "",
}  # fmt: skip


@pytest.fixture
def moon(tmp_path, monkeypatch):
    """Makes a plugin with components that cannot be imported, from a distribution with these requirements."""

    def make(*requires: str) -> Registry:
        (tmp_path / "moon_plugin.py").write_text(PLUGIN)
        (tmp_path / "moon_parts").mkdir()
        for name, code in PARTS.items():
            (tmp_path / "moon_parts" / f"{name}.py").write_text(code + "\n")
        distribution(tmp_path, "tuner-moon", "moon = moon_plugin", requires, ("more",))
        monkeypatch.syspath_prepend(tmp_path)
        return load_plugins({"TUNER_PLUGINS": "moon"})

    yield make
    for name in [name for name in sys.modules if name.startswith("moon_p")]:
        del sys.modules[name]


def failure(registry: Registry, name: str) -> PluginError:
    with pytest.raises(PluginError) as caught:
        registry.component("optimizer", name).load()
    assert caught.value.exit_code == 10
    return caught.value


def test_of_a_missing_library_pips_line_is_given(moon):
    registry = moon("click>=1", "made-up-extra>=1; extra == 'more'")
    assert failure(registry, "more").remedy == 'pip install "tuner-moon[more]"'
    error = failure(registry, "unsaid")
    assert error.message == (
        "component 'unsaid' of plugin moon cannot be imported from moon_parts.unsaid:Thing: No module named 'made_up_secret'"
    )
    assert error.remedy == "install the package that has the module made_up_secret, which tuner-moon needs"


def test_of_an_unmet_requirement_pips_line_is_given(moon):
    registry = moon("made-up-library[fast]>=2; python_version > '3'", "click>=99", "pydantic")
    assert failure(registry, "plain").remedy == 'pip install "made-up-library[fast]>=2" "click>=99"'
    assert failure(registry, "lost").remedy.startswith("mend tuner-moon")  # pip does not bring what the plugin itself lacks


def test_whatever_an_import_raises_is_the_plugins_error(moon):
    registry = moon()
    error = failure(registry, "bug")
    assert "of plugin moon cannot be imported from moon_parts.bug:Thing: ValueError: invalid literal" in error.message
    assert error.remedy == "mend tuner-moon, or install another version of it; --debug shows where"
    assert "SystemExit: no licence" in failure(registry, "quits").message
    with pytest.raises(EnvironmentProblem, match="needs a moon"):
        registry.component("optimizer", "says").load()


def test_choosing_plugins_by_environment(caplog):
    everything = [("mine", offering(optimizer("a"))), ("other", offering(optimizer("b")))]
    only = load_plugins({"TUNER_PLUGINS": " mine , absent"}, everything)
    assert {r.name: r.status for r in only.plugins if r.name in ("mine", "other", "absent")} == {
        "mine": "loaded", "other": "disabled", "absent": "failed",
    }
    assert "not installed" in record(only, "absent").reason
    without = load_plugins({"TUNER_DISABLE_PLUGINS": "other,absent"}, everything)
    assert record(without, "other").reason == "switched off by TUNER_DISABLE_PLUGINS"
    assert record(without, "mine").status == "loaded"
    assert "TUNER_DISABLE_PLUGINS names 'absent', which is not installed" in caplog.messages


def test_entry_points_are_loaded_and_import_errors_kept(tmp_path, monkeypatch, capsys):
    """A real distribution on the path, as pip would leave it."""
    distribution(tmp_path, "tuner-moon", "moon = tuner_moon_module\nshade = tuner_moon_absent\nquits = tuner_moon_quits")
    (tmp_path / "tuner_moon_module.py").write_text("print('hello')\n")
    (tmp_path / "tuner_moon_quits.py").write_text("raise SystemExit('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = load_plugins({"TUNER_PLUGINS": "moon,shade,quits"})
    out, err = capsys.readouterr()
    assert out == "" and "hello" in err  # with --json the answer on stdout is one object
    moon, shade, quits = (record(registry, name) for name in ("moon", "shade", "quits"))
    assert (moon.status, moon.distribution, moon.version, moon.notes) == ("loaded", "tuner-moon", "3.1", ("it implements no hook",))
    assert (shade.status, shade.reason) == ("failed", "ModuleNotFoundError: No module named 'tuner_moon_absent'")
    assert (quits.status, quits.reason) == ("failed", "SystemExit: no licence")


def test_modules_are_plugins():
    module = ModuleType("a_plugin")
    module.tuner_register_optimizers = hookimpl(lambda: [optimizer("from_module")])
    assert load(module).component("optimizer", "from_module").options is MineOptions


def test_loading_imports_no_torch_and_notes_who_does(tmp_path):
    """A stand-in named torch is enough: it must not be imported by anyone but the plugin that asks for it."""
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "heavy_plugin.py").write_text("import torch\n")
    info = tmp_path / "heavy-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: heavy\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[tuner]\nheavy = heavy_plugin\n")
    program = (
        "import sys; from tuner.plugins.loader import load_plugins\n"
        "load_plugins({'TUNER_DISABLE_PLUGINS': 'heavy'}); assert 'torch' not in sys.modules\n"
        "print({p.name: p.notes for p in load_plugins({}).plugins}['heavy'])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "imports torch at registration" in done.stdout


def test_installed_plugins_of_this_repository_load():
    root = Path(__file__).parents[2]
    names = sorted(path.name for path in (root / "plugins").iterdir() if path.is_dir())
    registry = load_plugins({"TUNER_PLUGINS": ",".join(names)})
    assert {r.name: (r.status, r.reason) for r in registry.plugins if r.name in names} == dict.fromkeys(names, ("loaded", ""))
