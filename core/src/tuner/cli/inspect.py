"""`tuner inspect`: what the dataset is and what would be trained of it, a row for every file, before any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from tuner.cli.common import ConfiguredCommand
from tuner.cli.status_line import CacheBar, is_interactive
from tuner.cli.table import columns, folded
from tuner.config.resolve import Settings
from tuner.config.settings import DataSettings
from tuner.errors import ConfigError, DataError
from tuner.plugins.registry import Registry
from tuner.text_files import replace_text

if TYPE_CHECKING:
    from tuner.data.epochs import GroupTurns
    from tuner.inspect.inspection import Inspection, Row, SoundRow

HEADERS = ("DATASET", "FILE", "SIZE", "FPS", "LENGTH", "BUCKET", "SOUND", "WORDS", "VERDICT")


def run(registry: Registry, settings: Settings, arguments: Mapping[str, Any]) -> int:
    """Prints rows and totals, or the object, and writes the contact sheet. Raises `DataError` for what `strict` does not allow."""
    page = _page_path(arguments["html"], quick=arguments["quick"])
    from tuner.inspect.contact_sheet import PICTURED, contact_sheet  # torch
    from tuner.inspect.inspection import inspect

    console = Console(stderr=True, highlight=False)
    with CacheBar(console, interactive=is_interactive(console)) as bar:
        progress = bar.report if is_interactive(console) else None
        inspection = inspect(registry, settings, decode=not arguments["quick"], thumbnails=PICTURED if page else 0, progress=progress)
    if arguments["as_json"]:
        click.echo(json.dumps(_object(inspection, problems=arguments["problems"]), indent=2))
    else:
        click.echo(_text(inspection, problems=arguments["problems"]))
    if page:
        replace_text(page, contact_sheet(inspection))
        click.echo(f"contact sheet: {page}", err=True)
    if settings.get(DataSettings).strict and not inspection.flawless:
        raise DataError(f"strict is on, and {_faults(inspection)}", where="strict", remedy="see above; --problems shows those files alone")
    return 0


def _page_path(given: str | None, *, quick: bool) -> Path | None:
    """Where the contact sheet goes. Raises `ConfigError` before anything is read."""
    if not given:
        return None
    path = Path(given)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError("the contact sheet is an .html file", where="html", value=given, remedy="write --html sheet.html")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError("there is no folder to write the contact sheet to", where="html", value=given, remedy="create the folder first")
    if quick:
        raise ConfigError("a contact sheet shows decoded files, --quick decodes none", where="html", value=given, remedy="leave one out")
    return path


def _faults(inspection: Inspection) -> str:
    """What keeps the dataset from being flawless, counted."""
    count = inspection.manifest.count
    remarked = sum(bool(row.remarks) for row in inspection.rows)
    counts = [(count("skipped"), "skipped"), (count("failed"), "failed"), (remarked, "with remarks"), (len(inspection.notices), "notices")]
    return ", ".join(f"{number} {words}" for number, words in counts if number) or inspection.stops


# --- for people ----------------------------------------------------------------------------------------------------
def plain(text: str) -> str:
    """On one line, whatever a file is called."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _text(inspection: Inspection, *, problems: bool) -> str:
    rows = [row for row in inspection.rows if not problems or not row.fine]
    table = [columns(HEADERS, [_cells(row) for row in rows]), ""] if rows else []
    return "\n".join([*table, *map(folded, _totals(inspection))])


def _cells(row: Row) -> tuple[str, ...]:
    media, use = row.media, row.use
    return (
        plain(row.dataset), plain(row.file), f"{media.width}x{media.height}" if media and media.width else "",
        f"{media.fps:.4g}" if media and media.fps else "", length(row), use.bucket if use else "", sound(row.sound),
        str(row.caption.words) if row.caption else "", plain(verdict(row)),
    )  # fmt: skip


def length(row: Row) -> str:
    """Frames, or seconds of sound alone, and how many of them are used."""
    media, use = row.media, row.use
    if media is None:
        return ""
    if media.kind == "audio" or (use and not use.frames):
        return f"{media.seconds:.2f} s" + (f" -> {use.seconds:g} s" if use else "")
    return f"{media.frames}" + (f" -> {use.frames}" if use and use.frames != media.frames else "")


def sound(row: SoundRow | None) -> str:
    """Format and loudness; where it is from, if not from the file itself; whether it is trained."""
    if row is None:
        return ""
    if row.source == "silence":
        return "silence is trained"
    words = [] if row.source == "own" else [plain(row.source)]
    words.append(f"{row.channels} ch {row.rate / 1000:g} kHz")
    if row.measured:
        words.append("silent" if row.loudness is None else f"{row.loudness:.1f} LUFS")
    return " ".join(words) + ("" if row.trained else ", not trained")


def verdict(row: Row) -> str:
    """In words, with all remarks."""
    own = f"{row.status}: {row.detail or row.reason}" if row.reason else row.status
    parts = [own + (" with other files" if row.belongs_to_others and row.status == "used" else "")]
    return "; ".join([*parts, *(remark.text for remark in row.remarks)])


def _totals(inspection: Inspection) -> list[str]:
    """What adds up."""
    manifest = inspection.manifest
    lines = [manifest.describe()]
    if len(inspection.datasets) > 1:
        for entry in inspection.datasets:
            counts = f"used {entry.used} + skipped {entry.skipped} + failed {entry.failed}"
            counts += f" + held out {entry.held_out}" if entry.held_out else ""
            lines.append(f"  {plain(entry.name)}: found {entry.found} = {counts}{turns(entry.repeats, entry.probability)}")
    lines += [f"  {count} {status}: {reason}" for (status, reason), count in manifest.reasons().items()]
    if len(inspection.datasets) == 1 and (often := turns(inspection.datasets[0].repeats, inspection.datasets[0].probability)):
        lines.append(often.removeprefix("; "))
    lines += [f"family     {inspection.family}, {' + '.join(inspection.streams) or 'nothing to train'}", f"sound      {inspection.sound}"]
    lines += _bucket_lines(inspection)
    remarks = ", ".join(f"{count} {kind}" for kind, count in inspection.remarked.items())
    lines.append(f"remarks    {remarks or 'none'}")
    lines += [f"notice: {plain(notice)}" for notice in inspection.notices]
    return lines + ([f"training would not start: {plain(inspection.stops)}"] if inspection.stops else [])


def turns(repeats: int, probability: float) -> str:
    """How often an epoch sees files, where that is not once."""
    words = [f"; each {repeats + 1} times an epoch"] if repeats else []
    return "".join(words) + (f"; {probability:.4g} of that in each epoch" if probability != 1 else "")


def _bucket_lines(inspection: Inspection) -> list[str]:
    if not inspection.groups:
        return []
    size = inspection.batch_size
    rows = [
        (bucket_name(group), str(group.items), str(group.turns), str(group.batches), f"{group.last} of {size}" if group.last < size else "")
        for group in inspection.groups
    ]
    short = sum(group.last < size for group in inspection.groups)
    ending = f"; in {short} of {len(rows)} buckets the last is incomplete" if short else ""
    table = columns(("BUCKET", "ITEMS", "TURNS", "BATCHES", "LAST BATCH"), rows, margin=2)
    return [*table.splitlines(), f"batches    {inspection.batches} an epoch, of {size}{ending}"]


def bucket_name(group: GroupTurns) -> str:
    """Size and length, and what else a batch has in common."""
    bucket, rate, kind, beside = group.group
    words = [str(bucket), *([f"at {rate:g} frames/s"] if kind == "video" else ["pictures"] if kind == "image" else [])]
    return " ".join([*words, *(f"+ {role} {other}" for role, other in beside)])


# --- for programs --------------------------------------------------------------------------------------------------
def _object(inspection: Inspection, *, problems: bool) -> dict[str, object]:
    """The same, with every number."""
    manifest, ledger = inspection.manifest, inspection.manifest.ledger
    statuses = ("used", "skipped", "failed", "held out")
    return {
        "family": inspection.family, "streams": list(inspection.streams), "found": len(manifest.verdicts),
        **{status.replace(" ", "_"): sum(row.status == status for row in inspection.rows) for status in statuses},
        "reasons": [{"status": status, "reason": reason, "count": n} for (status, reason), n in manifest.reasons().items()],
        "remarks": inspection.remarked, "notices": list(inspection.notices), "training_would_not_start": inspection.stops,
        "sound": {**asdict(ledger), "seconds": round(ledger.seconds, 3), "share_of_batches": round(inspection.sound_share, 4)},
        "datasets": [asdict(entry) for entry in inspection.datasets],
        "batch_size": inspection.batch_size, "batches_per_epoch": inspection.batches,
        "buckets": [_bucket(group) for group in inspection.groups],
        "files": [asdict(row) for row in inspection.rows if not problems or not row.fine],
    }  # fmt: skip


def _bucket(group: GroupTurns) -> dict[str, object]:
    bucket, rate, kind, beside = group.group
    companions: Sequence[dict[str, str]] = [{"role": role, "bucket": str(other)} for role, other in beside]
    return {
        "bucket": str(bucket), **bucket._asdict(), "frame_rate": rate, "kind": kind, "companions": companions, "items": group.items,
        "turns": group.turns, "batches": group.batches, "last_batch": group.last,
    }  # fmt: skip


command = ConfiguredCommand(
    "inspect",
    "Show what the dataset is and what would be trained of it: a row for every file, with verdict, reason and remarks, and totals that "
    "add up. Takes the configuration as `tuner train` does; no weights are needed. With --strict anything that is skipped, failed, "
    "adjusted or remarked ends with exit code 4.",
    run,
    [
        click.Option(["--problems"], is_flag=True, help="Only files that are not used or have a remark. Totals count all."),
        click.Option(["--quick"], is_flag=True, help="Decode nothing: no loudness, no remarks on picture and sound."),
        click.Option(["--json", "as_json"], is_flag=True, help="One object on stdout."),
        click.Option(["--html"], metavar="FILE", help="Write a contact sheet: pictures and waveform of each file, in one page."),
    ],
)
