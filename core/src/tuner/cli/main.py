"""`tuner`: a group whose commands are imported when they are used, so that `tuner --help` costs no torch.

Every error ends here: those a user can mend as one message with their exit code, everything else as a traceback with exit code 1.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import click

import tuner
from tuner.cli.quiet import silence_libraries
from tuner.cli.table import folded, terminal_width, visible
from tuner.errors import TunerError

COMMANDS: Mapping[str, str] = {
    "train": "Train a model as config.json and flags say.",
    "inspect": "Show what the dataset is, and what would be trained of it.",
    "plan": "Show which memory settings fit this machine, before anything is loaded.",
    "cache": "Encode the dataset into the cache, without training.",
    "status": "Show how runs are doing.",
    "report": "Write the page about a run anew, or one to pass on.",
    "server": "Show runs in the browser, as they go on.",
    "sample": "Generate clips, with or without a trained adapter.",
    "export": "Write a trained adapter to the file layout of another program.",
    "push": "Upload a finished run to the model hub.",
    "configure": "Ask what is to be trained, and write the configuration.",
    "doctor": "Say what is missing on this machine, and how to mend it.",
    "plugins": "List plugins, show one, check all.",
    "options": "List the keys of config.json, or explain one.",
}
"""Name -> short help; the module `tuner.cli.<name>` holds the `command`, or what makes it."""

EPILOG = "`tuner plugins` lists what is installed, and the commands that plugins add."

BUG, INTERRUPTED = 1, 130
NARROW = 52
"""Characters of a line, below which click does not follow the terminal."""


@dataclass(slots=True)
class Invocation:
    """What the options before the command decide."""

    debug: bool = False


class LazyGroup(click.Group):
    """Knows its own commands by name only; plugins are asked for theirs when a name is none of those, or for completion."""

    asked_plugins = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The core's commands in the order of use, then those of plugins."""
        self._ask_plugins()
        return [*COMMANDS, *sorted(self.commands)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command's module."""
        if cmd_name in COMMANDS:
            found = importlib.import_module(f"tuner.cli.{cmd_name}").command
            command: click.Command = found.made() if hasattr(found, "made") else found
            return command
        self._ask_plugins()
        near = get_close_matches(cmd_name, [*COMMANDS, *self.commands], n=1)
        if cmd_name not in self.commands and near and not ctx.resilient_parsing:
            ctx.fail(f"No such command '{cmd_name}'. Did you mean '{near[0]}'?")
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The core's commands, from short texts: asking plugins for theirs would take longer than all the rest."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def _ask_plugins(self) -> None:
        if not self.asked_plugins:
            self.asked_plugins = True
            from tuner.plugins.loader import load_plugins  # with pydantic, which takes longer than all of `tuner --help`

            load_plugins().add_commands(self)


def build() -> LazyGroup:
    """The command line. Each call gives a group of its own, so that plugins' commands are those of that moment."""

    width = terminal_width()
    narrow = {"terminal_width": width - 2} if 0 < width < NARROW else {}

    @click.group("tuner", cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], **narrow})
    @click.version_option(tuner.__version__, prog_name="tuner")
    @click.option("--debug", is_flag=True, help="Show tracebacks of all errors, and debug messages (TUNER_DEBUG=1).")
    @click.pass_context
    def group(ctx: click.Context, debug: bool) -> None:
        """Fine-tunes large video and audio models; families and techniques arrive as plugins."""
        invocation = ctx.ensure_object(Invocation)
        invocation.debug = invocation.debug or debug
        if invocation.debug:
            logging.getLogger("tuner").setLevel(logging.DEBUG)
        else:
            silence_libraries()

    return group


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code. Messages and logs go to stderr."""
    invocation = Invocation(debug=os.environ.get("TUNER_DEBUG", "") not in ("", "0"))
    color = False if os.environ.get("NO_COLOR") else None
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("tuner")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if invocation.debug else logging.INFO)
    try:
        return _outcome(arguments, invocation, color)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _outcome(arguments: Sequence[str], invocation: Invocation, color: bool | None) -> int:
    try:
        result = build().main(list(arguments), prog_name="tuner", standalone_mode=False, obj=invocation, color=color)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except TunerError as error:
        if invocation.debug:
            traceback.print_exc()
        text = folded(f"error: {visible(str(error))}", terminal_width(sys.stderr)).removeprefix("error: ")
        click.echo(click.style("error: ", fg="red", bold=True) + text, err=True, color=color)
        return error.exit_code
    except Exception:  # the last one to see it: shown in full, never swallowed
        traceback.print_exc()
        click.echo("this is a bug in tuner or one of its plugins: please report it with the lines above", err=True)
        return BUG


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
