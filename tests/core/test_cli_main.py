"""The command line: messages, exit codes, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

import tuner.cli.main
from tuner.cli import reference
from tuner.cli.main import COMMANDS, build, run
from tuner.cli.table import columns, folded
from tuner.config.settings import CORE_OPTIONS
from tuner.config.vocabulary import Vocabulary
from tuner.errors import DataError
from tuner.hookspecs import hookimpl
from tuner.plugins import loader

ROOT = Path(__file__).parents[2]


@pytest.fixture
def failing(monkeypatch):
    """Adds a command `fail` that raises what the test puts into it."""

    def add(error: BaseException) -> None:
        @click.command("fail")
        def fail() -> None:
            raise error

        @hookimpl
        def tuner_register_commands(cli: click.Group) -> None:
            cli.add_command(fail)

        plugin = SimpleNamespace(tuner_register_commands=tuner_register_commands)
        monkeypatch.setattr(loader, "load_plugins", lambda: load_with(("failing", plugin)))

    load_with = lambda extra, load=loader.load_plugins: load({"TUNER_PLUGINS": "failing"}, [extra])
    return add


class TestExitCodes:
    def test_an_error_of_the_user(self, failing, capsys):
        failing(DataError("is empty", where="clips/", value=0, remedy="add clips"))
        assert run(["fail"]) == 4
        out, err = capsys.readouterr()
        assert (out, err) == ("", "error: clips/: is empty (got 0)\n  -> add clips\n")

    def test_file_names_steer_no_terminal(self, failing, capsys):
        failing(DataError("is damaged:\n\ta\x1b[31mb\udcff.mp4"))
        assert run(["fail"]) == 4
        assert capsys.readouterr().err == "error: is damaged:\n\ta\\x1b[31mb\\udcff.mp4\n"

    @pytest.mark.parametrize("way", ["flag", "variable"])
    def test_debug_adds_the_traceback(self, failing, capsys, monkeypatch, way):
        failing(DataError("is empty"))
        if way == "variable":
            monkeypatch.setenv("TUNER_DEBUG", "1")
        assert run(["--debug", "fail"] if way == "flag" else ["fail"]) == 4
        assert "Traceback" in capsys.readouterr().err

    def test_a_bug(self, failing, capsys):
        failing(ZeroDivisionError("division"))
        assert run(["fail"]) == 1
        err = capsys.readouterr().err
        assert "ZeroDivisionError: division" in err and "this is a bug" in err

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
    def test_interrupted(self, failing, capsys, error):
        failing(error)
        assert run(["fail"]) == 130

    @pytest.mark.parametrize("arguments", [["plugins", "--nope"], ["no-such-command"], ["options", "a", "b"]])
    def test_usage(self, arguments, capsys):
        assert run(arguments) == 2
        assert "Usage:" in capsys.readouterr().err

    def test_a_misspelt_command_is_answered_with_the_nearest(self, capsys):
        assert run(["trian"]) == 2
        assert "No such command 'trian'. Did you mean 'train'?" in capsys.readouterr().err

    def test_done(self, capsys):
        assert run(["--version"]) == 0
        assert capsys.readouterr().out == f"tuner, version {tuner.__version__}\n"

    def test_exit_codes_of_commands_pass(self, failing, capsys):
        failing(click.exceptions.Exit(7))
        assert run(["fail"]) == 7
        failing(SystemExit(143))
        with pytest.raises(SystemExit) as caught:
            run(["fail"])
        assert caught.value.code == 143


class TestPluginsCommand:
    def test_json_is_one_object(self, capsys):
        assert run(["plugins", "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert listed["plugins"][0]["name"] == "builtins"
        assert "adam_beta1" in listed["plugins"][0]["keys"]
        assert listed["commands"] == []

    def test_list_and_show(self, capsys):
        assert run(["plugins"]) == run(["plugins", "list"]) == 0
        once = capsys.readouterr().out
        assert once.startswith("NAME") and "optimizer adamw, adamw_bf16, adamw8bit" in once
        assert run(["plugins", "show", "adamw"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("builtins (tuner-framework") and "adam_beta1" in shown
        assert run(["plugins", "show", "builtns"]) == 2
        assert "did you mean builtins?" in capsys.readouterr().err

    def test_check_fails_with_ten(self, capsys, monkeypatch):
        monkeypatch.setenv("TUNER_PLUGINS", "absent")
        assert run(["plugins", "check", "--json"]) == 10
        out, err = capsys.readouterr()
        findings = json.loads(out)
        assert findings["ok"] is False
        assert [f["plugin"] for f in findings["findings"] if not f["ok"]] == ["absent"]
        assert "plugin absent is not loaded" in err
        assert run(["plugins", "check"]) == 10
        assert "FAILED" in capsys.readouterr().out


class TestOptionsCommand:
    def test_table_schema_and_one_key(self, capsys):
        assert run(["options"]) == 0
        table = capsys.readouterr().out
        assert all(f"\n{name} " in table for name in Vocabulary(CORE_OPTIONS).keys)
        assert run(["options", "--json"]) == 0
        assert "lora_rank" in json.loads(capsys.readouterr().out)["properties"]
        assert run(["options", "--lora-rank".removeprefix("--")]) == 0
        assert "TUNER_LORA_RANK" in capsys.readouterr().out
        assert run(["options", "lora_rank", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["default"] == 16

    def test_of_a_plugin_or_group(self, capsys):
        assert run(["options", "builtins"]) == run(["options", "Adam"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 10 and lines[:5] == lines[5:]
        assert run(["options", "builtins", "--json"]) == 0
        assert list(json.loads(capsys.readouterr().out)["properties"]) == [
            "$schema", "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay",
        ]
        assert run(["options", "lora_rnk"]) == 2
        assert "did you mean lora_rank" in capsys.readouterr().err


class TestGroup:
    def test_short_helps_are_static_and_commands_exist(self):
        group = build()
        with click.Context(group) as context:
            assert group.list_commands(context)[: len(COMMANDS)] == list(COMMANDS)
            assert all(isinstance(group.get_command(context, name), click.Command) for name in ("plugins", "options"))

    @pytest.mark.parametrize("arguments", ["--help", "plugins", "options", "train --help"])
    def test_no_torch(self, arguments):
        program = f"import sys; from tuner.cli.main import run; sys.exit(run({arguments.split()!r}) or 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_help_needs_no_plugin(self):
        program = "import sys; from tuner.cli.main import run; run(['--help']); sys.exit('pydantic' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0

    def test_colour_only_where_it_is_wanted(self, failing, capsys, monkeypatch):
        failing(DataError("is empty"))
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        run(["fail"])
        assert "\x1b[" in capsys.readouterr().err
        monkeypatch.setenv("NO_COLOR", "1")
        run(["fail"])
        assert "\x1b[" not in capsys.readouterr().err


class TestTable:
    def test_columns_are_aligned(self):
        assert columns(("A", "B"), [("long", "x"), ("s", "")]) == "A     B\nlong  x\ns"

    def test_the_last_one_is_wrapped_on_a_terminal(self, monkeypatch):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", "40")
        assert columns(("A", "B"), [("x", "word " * 10)]).splitlines()[1:] == ["x  " + "word " * 6 + "word", "   word word word"]

    def test_columns_without_room_stand_on_further_lines(self, monkeypatch):
        headers, rows = ("NAME", "SIZE", "SOUND", "NOTE"), [("a.mp4", "96x64", "", ""), ("b.mp4", "1x1", "mono", "is small")]
        assert columns(headers, rows).splitlines()[2] == "b.mp4  1x1    mono   is small"
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", "16")
        wanted = ["NAME   SIZE", "    SOUND", "    NOTE", "a.mp4  96x64", "b.mp4  1x1", "    mono", "    is small"]
        assert columns(headers, rows).splitlines() == wanted
        monkeypatch.setenv("COLUMNS", "18")
        assert columns(headers, rows, margin=2).splitlines() == [f"  {line}" for line in wanted]

    def test_lines_end_between_words_and_go_on_below_their_text(self, monkeypatch):
        assert folded("sound   seven clips with sound", 20) == "sound   seven clips\n        with sound"
        assert folded("  -> give a size, such as 24GiB", 20) == "  -> give a size,\n      such as 24GiB"
        assert folded("file    /a/long/path/that/is/copied", 20) == "file\n    /a/long/path/that/is/copied"
        assert folded("one\n\ntwo", 20) == "one\n\ntwo" and folded("word " * 20, 0) == folded("word " * 20) == "word " * 20


class TestReference:
    def test_pages_are_current(self):
        assert reference.differences(ROOT / "docs" / "reference", reference.pages(ROOT)) == []

    def test_every_key_component_and_command_stands_there(self):
        pages = reference.pages(ROOT)
        assert all(f"`{name}`" in pages["options.md"] for name in Vocabulary(CORE_OPTIONS).keys)
        assert all(f"## tuner {name}" in pages["commands.md"] for name in [*COMMANDS, "plugins check"])
        assert "| `adamw` |" in pages["components.md"]

    def test_stale_pages_are_shown(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "docs" / "reference").mkdir(parents=True)
        (tmp_path / "deep").mkdir()
        monkeypatch.chdir(tmp_path / "deep")
        with pytest.raises(SystemExit) as caught:
            reference.command.main(["--check"], standalone_mode=False)
        assert caught.value.code == 1
        assert "options.md (declared)" in capsys.readouterr().err
        reference.command.main([], standalone_mode=False)
        reference.command.main(["--check"], standalone_mode=False)
        page = tmp_path / "docs" / "reference" / "hookspecs.md"
        page.write_text(page.read_text().replace("Adds commands", "Removes commands"))
        with pytest.raises(SystemExit):
            reference.command.main(["--check"], standalone_mode=False)
        assert "+Adds commands to `tuner`." in capsys.readouterr().err

    def test_outside_a_repository(self, tmp_path):
        with pytest.raises(tuner.cli.main.TunerError, match="no folder above holds docs/reference"):
            reference.find_root(tmp_path)
