"""`tuner server`: runs in a browser."""

from __future__ import annotations

from pathlib import Path

import click

from tuner.errors import ConfigError


@click.command("server")
@click.argument("folder", default=".", metavar="[FOLDER]", type=click.Path(path_type=Path))
@click.option("--port", default=8650, show_default=True, type=click.IntRange(0, 65535), help="Where to listen; 0: any free port.")
def command(folder: Path, port: int) -> None:
    """Show runs in the browser: those in and below FOLDER, the current one by default, as they are when you look.

    Their list, the report of each with its samples, and /status.json with what `tuner status --json` prints. It only reads, and only
    programs on this machine reach it; from another one: ssh -L 8650:localhost:8650 MACHINE. Ctrl-C ends it.
    """
    from tuner.watch.server import serve

    if not folder.is_dir():
        raise ConfigError("there is no such folder", where="FOLDER", value=str(folder), remedy="name the folder that holds your runs")
    with serve(folder, port) as server:
        click.echo(f"http://{server.server_address[0]}:{server.server_address[1]}/")  # type: ignore[str-bytes-safe]
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
