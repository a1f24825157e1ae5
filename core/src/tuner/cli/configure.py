"""`tuner configure`: asks what is to be trained, and writes config.json and the dataset file in the language of `tuner train`.

Special here: the questions stand beside the keys (`tuner.config.options.option`), of plugins too; nothing is written before the last
answer, and every file is checked as `tuner train` will read it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from tuner.cli.common import LaterCommand
from tuner.cli.interview import Interview, as_json
from tuner.cli.main import COMMANDS
from tuner.cli.questionnaire import Questionnaire
from tuner.cli.table import folded
from tuner.config import edit
from tuner.config.datasets import load_datasets, read_entries
from tuner.config.entry_edit import with_answers
from tuner.config.flags import collect, flags_for
from tuner.config.questions import DatasetAnswers, MachineAnswers
from tuner.config.resolve import DEFAULT_CONFIG, Settings, resolve
from tuner.config.settings import CORE_OPTIONS, DataSettings, ModelSettings, RunSettings
from tuner.config.vocabulary import Vocabulary
from tuner.errors import ConfigError
from tuner.plugins.loader import load_plugins
from tuner.plugins.registry import Registry

DATASET_NAME = "dataset.json"
HEAD = "Enter takes the value in [brackets], ? explains, Ctrl-C leaves without writing anything."


def run(registry: Registry, flags: Mapping[str, object], arguments: Mapping[str, Any]) -> int:
    """The whole conversation. Raises `TunerError`; nothing is written then."""
    file = Path(arguments["config"] or DEFAULT_CONFIG)
    known = Vocabulary(registry.option_types)
    settings = _resolved(registry, file if file.exists() else None, {k: v for k, v in flags.items() if known.find(k)})
    own = resolve([DatasetAnswers, MachineAnswers], flags={k: v for k, v in flags.items() if not known.find(k)})
    dataset = _dataset_path(arguments["dataset"], file, settings)
    raw = read_entries(dataset) if dataset.exists() else []
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and not arguments["yes"]
    try:
        if not _may_change([path for path in (file, dataset) if path.exists()], terminal, arguments["force"]):
            click.echo(folded("nothing was changed; --config and --dataset name other files"))
            return 0
        if terminal:
            click.echo(folded(HEAD))
        found = Questionnaire(registry, settings, own, raw, terminal).go_through()
    except (KeyboardInterrupt, EOFError):
        click.echo("\nnothing was written", err=True)
        raise click.Abort from None
    entries = with_answers(raw, str(found.value("data")), str(found.value("dataset_type")), found.answers)
    content, said = _configuration(registry, file, dataset, settings, found)
    _check(registry, content, entries)
    edit.write(dataset, entries)
    edit.write(file, content)
    _tell(file, dataset, said, content, entries)
    if arguments["check"]:
        return _dry_run(file)
    return 0


def _resolved(registry: Registry, file: Path | None, flags: Mapping[str, object]) -> Settings:
    return resolve(registry.option_types, config_file=file, flags=flags, environ=os.environ, hint=registry.hint())


def _dataset_path(asked: str | None, config: Path, settings: Settings) -> Path:
    named = settings.get(DataSettings).data_backend_config
    return Path(asked or named or config.parent / DATASET_NAME).expanduser()


def _may_change(existing: list[Path], terminal: bool, force: bool) -> bool:
    """Raises `ConfigError` where nobody can be asked."""
    if not existing or force:
        return True
    names, verb = " and ".join(map(str, existing)), "exists" if len(existing) == 1 else "exist"
    if not terminal:
        remedy = "give --force to change what is asked about there and keep the rest, or name other files with --config and --dataset"
        raise ConfigError(f"{names} {verb} already", where="configure", remedy=remedy)
    click.echo(folded(f"{names} {verb}. The values there are offered, and what is not asked about stays."))
    return input("Change it? [no] ").strip().lower() in ("y", "yes")


# --- what is written ---------------------------------------------------------------------------------------------
def _configuration(
    registry: Registry, file: Path, dataset: Path, settings: Settings, found: Interview
) -> tuple[dict[str, object], list[str]]:
    """The content of the configuration file and, where there was one, what changes in it."""
    vocabulary = Vocabulary(registry.option_types)
    keys = {name: as_json(vocabulary.keys[name].owner, name, value) for name, value in found.answers.items() if name in vocabulary.keys}
    keys.pop("data", None)
    ordered: dict[str, object] = {}
    for name, value in keys.items():
        ordered[name] = value
        if name == "pretrained_model_name_or_path":
            ordered["data_backend_config"] = str(dataset)
    ordered.setdefault("data_backend_config", str(dataset))
    environment = resolve(registry.option_types, config_file=file if file.exists() else None, environ=os.environ)
    if file.exists():
        kept = {k: v for k, v in ordered.items() if environment.origin(k) != "file" or not _same(environment.value(k), v)}
        content, said = edit.changed(file, kept, vocabulary, environment)
        for name in [name for name in content if (key := vocabulary.find(name)) is not None and key.name == "data" and content[name]]:
            said.append(f"{name}: removed, the dataset file takes its place")
            del content[name]
        return content, said
    written = {k: v for k, v in ordered.items() if v not in (None, "") and (_is_core(vocabulary, k) or v != vocabulary.keys[k].default)}
    edit.changed(file, written, vocabulary, environment)  # says where a variable would overrule the file
    return written, []


def _same(value: object, written: object) -> bool:
    return value == written or json.dumps(value, default=str) == json.dumps(written, default=str)


def _is_core(vocabulary: Vocabulary, key: str) -> bool:
    return vocabulary.keys[key].owner in CORE_OPTIONS


def _check(registry: Registry, content: Mapping[str, object], entries: list[object]) -> None:
    """Reads both as `tuner train` will, before they take their places. Raises `ConfigError`, `DataError`."""
    with TemporaryDirectory() as folder:
        config, dataset = Path(folder) / "config.json", Path(folder) / DATASET_NAME
        edit.write(config, content)
        edit.write(dataset, entries)
        settings = _resolved(registry, config, {})
        if settings.get(DataSettings).data:
            raise ConfigError("a variable or the file names a folder, and a dataset file is about to be written", where="data",
                              value=settings.get(DataSettings).data, remedy="leave it out")  # fmt: skip
        model, output = settings.get(ModelSettings).model_family, settings.get(RunSettings).output_dir
        load_datasets(dataset, None, settings.get(DataSettings), {"model_family": model, "output_dir": output})


def _tell(file: Path, dataset: Path, said: list[str], content: Mapping[str, object], entries: list[object]) -> None:
    """What was written, and what comes next."""
    named = "" if file == DEFAULT_CONFIG else f" --config {shlex.quote(str(file))}"
    click.echo(f"wrote {dataset}: {len(entries)} {'entry' if len(entries) == 1 else 'entries'}")
    click.echo(folded(f"wrote {file}: " + ("; ".join(said) if said else f"{len(content)} keys")))
    steps = {
        "inspect": ("inspect", "a verdict on every clip"),
        "plan": ("plan", "which memory settings fit"),
        "train": ("train --dry-run", "checks everything, loads nothing"),
    }
    click.echo("next:")
    for name, (words, purpose) in steps.items():
        if name in COMMANDS:
            click.echo(folded(f"  tuner {words}{named}  # {purpose}"))
    click.echo(f"  tuner train{named}")


def _dry_run(file: Path) -> int:
    """The plan of a run, by the command that would run it."""
    from tuner.cli.train import command as train

    code = train.made().main(["--dry-run", "--config", str(file)], prog_name="tuner train", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _command() -> click.Command:
    registry = load_plugins()
    known = Vocabulary(registry.option_types)
    own = [flag for flag in flags_for([DatasetAnswers, MachineAnswers]) if not known.find(str(flag.name))]
    arguments = ("config", "dataset", "yes", "force", "check")

    def callback(**given: Any) -> int:
        flags = collect({key: value for key, value in given.items() if key not in arguments})
        return run(registry, flags, {key: given[key] for key in arguments})

    parameters = [
        click.Option(["--config"], metavar="FILE", help=f"Configuration file to write.  [default: {DEFAULT_CONFIG}]"),
        click.Option(["--dataset"], metavar="FILE", help=f"Dataset file to write.  [default: {DATASET_NAME} beside the configuration]"),
        click.Option(["--yes", "-y"], is_flag=True, help="Ask nothing: flags count, then what existing files say, then defaults."),
        click.Option(["--force"], is_flag=True, help="Change existing files without asking; keys that are not asked about stay."),
        click.Option(["--check"], is_flag=True, help="Then check everything as `tuner train --dry-run` does."),
    ]
    text = "Ask what is to be trained, and write the configuration and the dataset file. Every question has its flag; without a terminal " \
           "nothing is asked."  # fmt: skip
    return click.Command("configure", params=[*parameters, *own, *flags_for(registry.option_types)], callback=callback, help=text)


command = LaterCommand(_command)
