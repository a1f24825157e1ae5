"""`tuner plan`: which settings fit this machine, or one of a given size, before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from tuner.cli.common import ConfiguredCommand
from tuner.cli.table import columns, folded
from tuner.config.edit import apply_keys
from tuner.config.resolve import Settings
from tuner.config.settings import DataSettings
from tuner.config.vocabulary import Vocabulary
from tuner.errors import ConfigError, OutOfMemoryError
from tuner.plugins.registry import Registry

if TYPE_CHECKING:
    import torch

    from tuner.interfaces.family import ClipShape
    from tuner.train.forecast.costs import Job
    from tuner.train.forecast.machine import Machine
    from tuner.train.forecast.row import Row

UNITS = {"": 2**30, "b": 1, "mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 2**20, "gib": 2**30, "tib": 2**40, "m": 2**20, "g": 2**30}
"""Bytes; a number alone means GiB, as the sizes of graphics cards are given."""
SHAPE = "832x480x17"
SHOWN = 12
"""Rows for people; --json has all."""


class Bytes(click.ParamType):
    """A size of memory."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes. Raises `ConfigError`."""
        return value if isinstance(value, int) else parse_size(str(value), param.name or "" if param else "")


def parse_size(text: str, where: str) -> int:
    """24, 24GiB, 24 GB, 24576MiB -> bytes. Raises `ConfigError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or not float(found[1]):
        raise ConfigError("is no size of memory", where=where, value=text, remedy="write 24GiB, or 24GB for 24 billion bytes")
    return round(float(found[1]) * unit)


def parse_shape(text: str, settings: Settings, step: int, frame_rate: float) -> ClipShape:
    """WIDTHxHEIGHTxFRAMES. Raises `ConfigError`."""
    from tuner.interfaces.family import ClipShape  # torch

    found = re.fullmatch(r"(\d+)x(\d+)[x@](\d+)", text.strip())
    width, height, frames = (int(number) for number in found.groups()) if found else (0, 0, 0)
    if not width or not height or not frames or width % step or height % step:
        raise ConfigError(f"is no width x height x frames in steps of {step} pixels", where="shape", value=text, remedy=f"write {SHAPE}")
    rate = settings.get(DataSettings).frame_rate or frame_rate
    return ClipShape(width, height, frames, rate, frames / rate)


# --- planning ----------------------------------------------------------------------------------------------------
def run(registry: Registry, settings: Settings, arguments: Mapping[str, Any]) -> int:
    """Prints the table, or the object; writes the first row's keys where asked to. Raises `OutOfMemoryError` where nothing fits."""
    import torch

    from tuner.train.forecast.advise import rank, rows
    from tuner.train.forecast.machine import find_machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = find_machine(device, arguments["gpu_memory"] or 0, arguments["host_memory"] or 0)
    with TemporaryDirectory() as scratch:
        job, work = find_job(registry, settings, arguments, device, Path(scratch))
        ranked = rank(list(rows(job, machine)), machine)
    if arguments["as_json"]:
        click.echo(json.dumps(_object(ranked, job, machine, work), indent=2))
    else:
        click.echo(_text(ranked, job, machine, work))
    if not ranked[0].fits(machine):
        raise _nothing_fits(ranked, job, machine)
    if arguments["apply"]:
        changed = apply_keys(Path(arguments["apply"]), ranked[0].keys, Vocabulary(registry.option_types), settings)
        click.echo(changed, err=arguments["as_json"])
    return 0


def find_job(
    registry: Registry, settings: Settings, arguments: Mapping[str, Any], device: torch.device, scratch: Path
) -> tuple[Job, str]:
    """What is to be trained, and in words what it was measured with: the dataset's largest bucket, or the shape asked for."""
    from tuner.config.settings import TrainSettings
    from tuner.train.forecast.advise import job_for, largest
    from tuner.train.planning import find_clips, plan_model, read_datasets

    data = settings.get(DataSettings)
    entries = read_datasets(registry, settings) if (data.data or data.data_backend_config) and not arguments["shape"] else []
    model = plan_model(registry, settings, device, scratch=scratch)
    family = model.family
    if entries:
        manifest = find_clips(entries, model, None, remember=False)
        streams, shape = family.select_streams(manifest.streams_available), largest(item.shape for item in manifest.items)
        words = "largest bucket"
    else:
        geometry = family.geometry
        shape = parse_shape(arguments["shape"] or SHAPE, settings, geometry.size_step, geometry.default_frame_rate)
        streams, words = family.select_streams(frozenset(family.stream_names)), "asked for" if arguments["shape"] else "assumed"
    job = job_for(model, family.inspect(model.source, streams), streams, shape, host=arguments["host_memory"] or 0)
    size = f"{shape.width}x{shape.height}x{shape.frames}" if shape.frames else f"{shape.seconds:g} s of sound"
    return job, f"{settings.get(TrainSettings).train_batch_size} x {size} ({words}), {' + '.join(streams)}"


def _nothing_fits(ranked: Sequence[Row], job: Job, machine: Machine) -> OutOfMemoryError:
    from tuner.train.forecast.advise import describe
    from tuner.train.forecast.row import gib

    nearest = next((row for row in ranked if not row.problem), ranked[0])
    if nearest.problem:
        return OutOfMemoryError(f"nothing fits: {nearest.problem}", where=nearest.where, remedy="plan for a machine with more host memory")
    lacking = gib(nearest.needs() - machine.memory)
    return OutOfMemoryError(
        f"nothing fits into {gib(machine.memory)}; {lacking} are short with {describe(nearest, job.model, machine)}",
        where="gpu_memory", remedy="lower resolution, num_frames, train_batch_size or lora_rank, or use another optimizer",
    )  # fmt: skip


# --- showing -----------------------------------------------------------------------------------------------------
def _text(ranked: Sequence[Row], job: Job, machine: Machine, work: str) -> str:
    """The table for people."""
    from tuner.train.forecast.row import gib

    fitting, impossible = [row for row in ranked if row.fits(machine)], [row for row in ranked if row.problem]
    too_large = len(ranked) - len(fitting) - len(impossible)
    host = f", {gib(machine.host)} of host memory free" if machine.host else ""
    taken = f" and {gib(machine.taken)} that other programs hold" if machine.taken else ""
    head = [
        f"machine  {machine.name}, {gib(machine.memory)}{taken}{host}; {machine.words}",
        f"work     {job.model.family_name} {job.facts.variant.name}, {job.facts.blocks} blocks, batches of {work}",
        f"fits     {len(fitting)} of {len(ranked)} combinations; {too_large} are too large, {len(impossible)} are not possible",
    ]
    shown = [*fitting[:SHOWN], *(row for row in ranked if row.current and row not in fitting[:SHOWN])]
    cells = [_cells(row, job, machine) for row in shown]
    table = columns(("", "GPU", "PINNED", "HOST", "S/STEP", "RESIDENCY", "PRECISION", "RECOMPUTED", "CONFIG"), cells)
    reasons = {row.where: f"not possible: {row.where + ': ' if row.where else ''}{row.problem}" for row in reversed(impossible)}
    more = [f"and {len(fitting) - SHOWN} more that fit, see --json"] if len(fitting) > SHOWN else []
    return "\n".join([*map(folded, head), "", table, *map(folded, [*more, *reasons.values()])])


def _cells(row: Row, job: Job, machine: Machine) -> tuple[str, ...]:
    from tuner.train.forecast.advise import lines
    from tuner.train.forecast.row import gib

    mark = ("*" if row.current else "") + ("" if row.fits(machine) else "!")
    pairs = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in lines(row, job.model).items())
    precision = f"{row.precision} ({row.error:.1%} off)" if row.error else row.precision
    recomputed = f"{job.facts.blocks - row.kept} of {job.facts.blocks}" if row.checkpointing == "some" else row.checkpointing
    return (
        mark, gib(row.needs()), gib(row.pinned), gib(row.host), f"{row.seconds:.2g}", row.residency, precision, recomputed,
        pairs or "as it is",
    )  # fmt: skip


def _object(ranked: Sequence[Row], job: Job, machine: Machine, work: str) -> dict[str, object]:
    """The same for programs, with all rows."""
    from tuner.train.forecast.advise import lines

    return {
        "machine": {
            "name": machine.name, "memory": machine.memory, "taken_by_others": machine.taken, "host_memory": machine.host,
            "speed": machine.words,
        },
        "work": work,
        "rows": [
            {
                "fits": row.fits(machine), "current": row.current, "residency": row.residency, "precision": row.precision,
                "checkpointing": row.checkpointing, "kept_blocks": row.kept, "device_bytes": row.needs(), "device_parts": dict(row.parts),
                "pinned_bytes": row.pinned, "host_bytes": row.host, "seconds_per_step": row.seconds, "error": row.error,
                "problem": row.problem, "keys": dict(row.keys), "changes": lines(row, job.model),
            }
            for row in ranked
        ],
    }  # fmt: skip


def _size_option(name: str, text: str) -> click.Option:
    return click.Option([f"--{name}", f"--{name.replace('_', '-')}", name], type=Bytes(), metavar="SIZE", help=text)


command = ConfiguredCommand(
    "plan",
    "Show which memory settings fit this machine, before anything is loaded. Takes the configuration as `tuner train` does.",
    run,
    [
        _size_option("gpu_memory", "Plan for a GPU of this size, such as 24GiB, in place of this machine's."),
        _size_option("host_memory", "Plan for so much free host memory in place of this machine's."),
        click.Option(["--shape"], metavar="WxHxF", help=f"Clips to plan for in place of the dataset's largest. [without dataset: {SHAPE}]"),
        click.Option(["--json", "as_json"], is_flag=True, help="One object on stdout, with all combinations."),
        click.Option(["--apply"], metavar="FILE", help="Write the first row's keys into this configuration file."),
    ],
)
