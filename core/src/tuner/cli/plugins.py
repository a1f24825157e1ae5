"""`tuner plugins`: what is installed, what it offers, whether it works; and a new one to start from."""

from __future__ import annotations

import json

import click

from tuner.cli import plugins_new
from tuner.cli.table import columns
from tuner.config.vocabulary import keys_of
from tuner.errors import PluginError
from tuner.plugins import report
from tuner.plugins.loader import load_plugins

as_json_flag = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


@click.group("plugins", invoke_without_command=True)
@as_json_flag
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List plugins, show one, check all, write a new one."""
    if ctx.invoked_subcommand is None:
        list_plugins(as_json)


@command.command("list")
@as_json_flag
def list_command(as_json: bool) -> None:
    """One line per plugin."""
    list_plugins(as_json)


def list_plugins(as_json: bool) -> None:
    """Prints every plugin, loaded or not, and the commands they add."""
    registry = load_plugins()
    added = click.Group()
    registry.add_commands(added)
    if as_json:
        plugins = [report.facts(record) for record in registry.plugins]
        click.echo(json.dumps({"plugins": plugins, "commands": sorted(added.commands)}, indent=2))
        return
    click.echo(columns(("NAME", "VERSION", "STATUS", "PROVIDES"), report.rows(registry)))
    if added.commands:
        click.echo(f"\ncommands: {', '.join(sorted(added.commands))}")


@command.command("show")
@click.argument("name")
@as_json_flag
def show(name: str, as_json: bool) -> None:
    """Everything about the plugin NAME, or about the plugin that offers the component NAME."""
    record = report.record_named(load_plugins(), name)
    if as_json:
        click.echo(json.dumps(report.facts(record), indent=2))
        return
    source = f" ({record.distribution} {record.version})" if record.distribution else ""
    click.echo(f"{record.name}{source}: {record.status}{': ' + record.reason if record.reason else ''}")
    for note in record.notes:
        click.echo(f"note: {note}")
    offered = [(kind, c.name, c.summary, c.source) for kind, group in record.components.items() for c in group]
    if offered:
        click.echo("\n" + columns(("KIND", "NAME", "SUMMARY", "SOURCE"), offered))
    keys = [(key.name, key.type_name, key.help) for options in record.option_types for key in keys_of(options)]
    if keys:
        click.echo("\n" + columns(("KEY", "TYPE", "HELP"), keys))


@command.command("check")
@as_json_flag
def check(as_json: bool) -> None:
    """Import everything that plugins offer; exit code 10 when something fails."""
    findings = report.check(load_plugins())
    failed = [finding for finding in findings if not finding.ok]
    if as_json:
        click.echo(json.dumps({"ok": not failed, "findings": [finding.as_json() for finding in findings]}, indent=2))
    else:
        rows = [(f.plugin, f.subject, "ok" if f.ok else "FAILED", f.reason) for f in findings]
        click.echo(columns(("PLUGIN", "SUBJECT", "RESULT", "REASON"), rows))
    if failed:
        raise PluginError(f"{len(failed)} of {len(findings)} checks failed", value=[f"{f.plugin}: {f.subject}" for f in failed])


command.add_command(plugins_new.command)
