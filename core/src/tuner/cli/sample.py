"""`tuner sample`: a prompt becomes an mp4 with sound, from a first frame or to a sound if one is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tuner.cli.common import ConfiguredCommand
from tuner.config.resolve import Settings
from tuner.config.settings import ModelSettings
from tuner.plugins.registry import Registry
from tuner.watch.folder import CONFIG


def run(registry: Registry, settings: Settings, arguments: Mapping[str, Any]) -> int:
    """Loads the model, puts what was trained over it, generates, writes."""
    from tuner.train.samples.sample import GivenFiles, Trained, sample  # torch

    weights, first_frame, sound = (Path(arguments[name]) if arguments[name] else None for name in ("weights", "first_frame", "given_sound"))
    trained, given = Trained(weights, arguments["lora"] or "", arguments["strength"]), GivenFiles(first_frame, sound)
    written = sample(registry, settings, arguments["prompt"], Path(arguments["output"]), trained, arguments["no_sound"], given)
    click.echo(str(written))
    return 0


def model_of_run(arguments: Mapping[str, Any]) -> Mapping[str, object]:
    """The model keys that were set for the run in whose folder the adapter or the weights lie; empty where they lie elsewhere."""
    given = Path(arguments["weights"] or arguments["lora"] or "")
    places = (given, *given.parents[:2]) if given.name and given.exists() else ()
    file = next((folder / CONFIG for folder in places if (folder / CONFIG).is_file()), None)
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    entries = {key: content.get(key) for key in ModelSettings.model_fields}
    return {key: entry["value"] for key, entry in entries.items() if isinstance(entry, dict) and entry.get("origin") != "default"}


command = ConfiguredCommand(
    "sample",
    "Generate a clip from a prompt, with an adapter or fully trained weights if they are named. Size, length, steps, guidance and "
    "seed come from the validation_* keys. The model is that of the run in whose folder they lie, unless keys say otherwise.",
    run,
    [
        click.Option(["--prompt"], default="", help="What to generate; validation_prompt when empty."),
        click.Option(["--lora"], metavar="FILE", help="An adapter in any known layout: a file, checkpoint or run folder, OWNER/NAME:FILE."),
        click.Option(
            ["--weights"], metavar="FILE", help="Weights of a full fine-tuning, as its run folder holds them, in place of the base model's."
        ),
        click.Option(["--strength"], type=float, default=1.0, show_default=True, help="Scale of the adapter."),
        click.Option(["--first-frame", "first_frame"], metavar="FILE", help="A picture, or a clip whose first frame the clip begins with."),
        click.Option(["--sound", "given_sound"], metavar="FILE", help="A sound, or a clip whose sound the picture is made to."),
        click.Option(["--output", "-o"], default="sample.mp4", show_default=True, metavar="FILE", help="The mp4 to write."),
        click.Option(["--no-sound", "no_sound"], is_flag=True, help="Generate the picture only."),
    ],
    model_of_run,
)
