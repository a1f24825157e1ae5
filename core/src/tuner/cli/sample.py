"""`tuner sample`: a prompt becomes an mp4 with sound."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tuner.cli.common import configured_command
from tuner.config.resolve import Settings
from tuner.plugins.registry import Registry


def run(registry: Registry, settings: Settings, arguments: Mapping[str, Any]) -> int:
    """Loads the model, puts what was trained over it, generates, writes."""
    from tuner.train.sample import Trained, sample  # torch

    weights, lora = (Path(arguments[name]) if arguments[name] else None for name in ("weights", "lora"))
    trained = Trained(weights, lora, arguments["strength"])
    written = sample(registry, settings, arguments["prompt"], Path(arguments["output"]), trained, arguments["no_sound"])
    click.echo(str(written))
    return 0


command = configured_command(
    "sample",
    "Generate a clip from a prompt, with an adapter or fully trained weights if they are named. Size, length, steps, guidance and "
    "seed come from the validation_* keys.",
    run,
    [
        click.Option(["--prompt"], default="", help="What to generate; validation_prompt when empty."),
        click.Option(["--lora"], metavar="FILE", help="An adapter file in any known layout, a checkpoint or a run folder."),
        click.Option(
            ["--weights"], metavar="FILE", help="Weights of a full fine-tuning, as its run folder holds them, in place of the base model's."
        ),
        click.Option(["--strength"], type=float, default=1.0, show_default=True, help="Scale of the adapter."),
        click.Option(["--output", "-o"], default="sample.mp4", show_default=True, metavar="FILE", help="The mp4 to write."),
        click.Option(["--no-sound", "no_sound"], is_flag=True, help="Generate the picture only."),
    ],
)
