"""`tuner push`: uploads what a finished run has put into its outbox."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("push")
@click.argument("run_folder", metavar="RUN_FOLDER", type=click.Path(path_type=Path))
@click.option("--repo", metavar="OWNER/NAME", default="", help="Repository to upload to; the run's hub_model_id when empty.")
@click.option("--public", is_flag=True, help="Everybody may see it; a private repository is opened.")
def command(run_folder: Path, repo: str, public: bool) -> None:
    """Upload a finished run to the model hub: model card, trained weights, samples.

    They lie in the folder `outbox` of the run, where the model card can be edited first. Uploading again replaces what has changed.
    """
    from tuner.train.publish import outbox, upload
    from tuner.train.saving.lock import FolderLock

    outbox.read(run_folder)  # says what is wrong with the folder before a lock is put into it
    with FolderLock(run_folder):
        sent = upload.send(outbox.read(run_folder), repo, private=False if public else None)
    click.echo(upload.page(sent.repository))
